"""ForwardInputs: the arguments of one forward of a decoder, each under its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ParamSpec, Self, TypeVar, cast

import torch
from attrs import define
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mplus.errors import InputError
from mplus.hf.types import Argument, ForwardArguments

P = ParamSpec("P")
R = TypeVar("R")


@lru_cache(maxsize=64)  # looked up for every token
def signature_of(function: Callable[P, R]) -> inspect.Signature:
    """Return the signature of a method of a decoder."""
    return inspect.signature(function)


def by_name(
    base: type[PreTrainedModel], args: tuple[Argument, ...], kwargs: Mapping[str, Argument]
) -> ForwardArguments:
    """Return the arguments of one ``forward``, each under its name."""
    signature = signature_of(base.forward)
    _, *inputs = signature.bind_partial(None, *args, **kwargs).arguments.items()  # without self
    named = dict(inputs)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return cast("ForwardArguments", named)  # a decoder that takes these names takes them as transformers does


@define(eq=False)
class ForwardInputs:
    """The arguments of one forward with a memory.

    Attributes:
        named: all of them, by name.
        takes_positions: whether the decoder has ``position_ids``.
    """

    named: ForwardArguments
    takes_positions: bool

    @classmethod
    def of(cls, base: type[PreTrainedModel], args: tuple[Argument, ...], kwargs: Mapping[str, Argument]) -> Self:
        """Return the arguments of a call of ``base.forward``."""
        return cls(by_name(base, args, kwargs), "position_ids" in signature_of(base.forward).parameters)

    @property
    def ids(self) -> Tensor | None:
        """``[B, T]`` int64; None where there are embeddings."""
        return self.named.get("input_ids")

    @property
    def text(self) -> Tensor:
        """Ids ``[B, T]`` or embeddings ``[B, T, w]`` of the text. Raises InputError where there are none."""
        text = self.named.get("inputs_embeds") if self.ids is None else self.ids
        if not isinstance(text, Tensor) or text.dim() < 2:
            raise InputError(
                "forward with a memory needs input_ids [B, T] or inputs_embeds [B, T, d], "
                f"got {list(text.shape) if isinstance(text, Tensor) else text!r}"
            )
        return text

    @property
    def is_masked(self) -> bool:
        """Return whether there is a mask, of whatever form."""
        return self.named.get("attention_mask") is not None

    @property
    def mask(self) -> Tensor | None:
        """``[B, S + T]``, 0 at padding, of the text in the cache and this one; None where there is no such mask."""
        mask = self.named.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    @property
    def cache(self) -> Cache | None:
        """The key/value cache of the text before this one."""
        return self.named.get("past_key_values")

    @property
    def positions(self) -> Tensor | None:
        """``[B or 1, T]`` int64; None: the decoder counts."""
        return self.named.get("position_ids")

    @positions.setter
    def positions(self, positions: Tensor) -> None:
        self.named["position_ids"] = positions

    def counted_positions(self) -> Tensor:
        """Return ``positions``, or where there are none what the decoder would count, ``[B, T]``."""
        if self.positions is not None:
            return self.positions
        rows, tokens = self.text.shape[:2]
        past = 0 if self.cache is None else int(self.cache.get_seq_length())
        return torch.arange(past, past + tokens, device=self.text.device).expand(rows, -1)

    def skip_padding(self) -> Tensor | None:
        """Return ``[B, T]`` bool, False at padding of this text, and give the decoder positions that do not count it.

        None where there is no padding, in the text before this one either.
        """
        mask = self.mask
        if mask is None or bool(mask.all()):
            return None
        tokens = self.text.shape[1]
        if self.takes_positions and self.positions is None:
            self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        return mask[:, -tokens:].bool()
