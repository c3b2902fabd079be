"""A memory among the settings of transformers' ``GenerationConfig``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeAlias, overload

from attrs import define
from transformers import GenerationConfig, PreTrainedModel

from mplus.memory.memory import Memory

P = ParamSpec("P")
Setting: TypeAlias = "bool | int | float | str | Memory | MemoryReference | list[Setting] | dict[str, Setting] | None"
"""A value in a generation config, as data that can be written; and a memory."""


@define(frozen=True, eq=False)
class MemoryReference:
    """The value that a generation config holds in place of a memory: its copies refer to the same memory."""

    memory: Memory

    def __deepcopy__(self, memo: dict[int, MemoryReference]) -> MemoryReference:
        """Return this reference, since transformers copies a config before every use.

        Of a decoder that is copied whole, the memory is copied with it.
        """
        if id(getattr(self.memory.engine, "model", None)) in memo:
            return MemoryReference(copy.deepcopy(self.memory, memo))
        return self


class MemorySetting:
    """The attribute ``memory`` of ``GenerationConfig``; values that are no memory are kept as they are anywhere."""

    @overload
    def __get__(self, config: None, owner: type) -> MemorySetting: ...
    @overload
    def __get__(self, config: GenerationConfig, owner: type | None = None) -> Setting: ...
    def __get__(self, config: GenerationConfig | None, owner: type | None = None) -> Setting | MemorySetting:
        if config is None:
            return self
        try:
            value: Setting = config.__dict__["memory"]
        except KeyError:
            raise AttributeError(f"{type(config).__name__!r} object has no attribute 'memory'") from None
        return value.memory if isinstance(value, MemoryReference) else value

    def __set__(self, config: GenerationConfig, value: Setting) -> None:
        config.__dict__["memory"] = MemoryReference(value) if isinstance(value, Memory) else value

    def __delete__(self, config: GenerationConfig) -> None:
        if config.__dict__.pop("memory", config) is config:
            raise AttributeError("memory")


def register() -> None:
    """Let transformers' generation configs refer to a memory, which they neither copy nor write; harmless when done."""
    if isinstance(GenerationConfig.__dict__.get("memory"), MemorySetting):
        return
    # They write, compare and print themselves by ``to_dict``, which copies all that they hold.
    setattr(GenerationConfig, "to_dict", _without_memory(GenerationConfig.to_dict))  # noqa: B010 - of a class not ours
    setattr(GenerationConfig, "memory", MemorySetting())  # noqa: B010


def drop_memory(model: PreTrainedModel) -> None:
    """Take a memory out of a decoder's own generation config, if there is one."""
    config = getattr(model, "generation_config", None)
    if config is not None and isinstance(getattr(config, "memory", None), Memory):
        del config.memory


def _without_memory(to_dict: Callable[P, dict[str, Setting]]) -> Callable[P, dict[str, Setting]]:
    @functools.wraps(to_dict)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> dict[str, Setting]:
        plain = to_dict(*args, **kwargs)
        if isinstance(plain.get("memory"), MemoryReference):
            del plain["memory"]
        return plain

    return wrapper
