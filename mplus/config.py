"""The configuration of a memory: validated attrs classes, to and from plain data, JSON and TOML."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeGuard, TypeVar, cast

import attrs
import cattrs
from attrs import define, field

from mplus.errors import ConfigError

T = TypeVar("T")

JsonValue: TypeAlias = "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
"""Plain data, as JSON and TOML hold it."""


class Validator(Protocol):
    """Checks the value of a field of an attrs class."""

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise ConfigError, which names field, rule and value, where the rule is broken."""


def must_be(
    rule: str, holds: Callable[[JsonValue], bool], shown: Callable[[JsonValue], JsonValue] = lambda value: value
) -> Validator:
    """Return a validator that raises ``ConfigError("FIELD must be RULE, got VALUE")`` unless ``holds(value)``.

    ``shown`` makes of a value what a person gave, where a converter had changed it.
    """

    def check(instance: attrs.AttrsInstance, attribute: attrs.Attribute[JsonValue], value: JsonValue) -> None:
        if not holds(value):
            raise ConfigError(f"{attribute.name} must be {rule}, got {shown(value)!r}")

    return check


def is_whole(value: JsonValue, minimum: int) -> TypeGuard[int]:
    """Return whether ``value`` is an int, and no bool, of at least ``minimum``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: JsonValue, minimum: float, maximum: float = float("inf")) -> TypeGuard[float]:
    """Return whether ``value`` is an int or float, and no bool, in ``[minimum, maximum]``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum


def whole(minimum: int, optional: bool = False) -> Validator:
    """Return a validator: an int of at least ``minimum`` (or None)."""
    rule = f"a whole number of at least {minimum}" + (", or None" if optional else "")
    return must_be(rule, lambda value: (optional and value is None) or is_whole(value, minimum))


def size(minimum: int) -> Validator:
    """Return a validator: an int of at least ``minimum``, or None where it is left to be chosen."""
    return must_be(f"a whole number of at least {minimum}", lambda value: value is None or is_whole(value, minimum))


def number(minimum: float, below: float = float("inf")) -> Validator:
    """Return a validator: a number in ``[minimum, below)``."""
    upper = "" if below == float("inf") else f" and below {below}"
    return must_be(
        f"a number of at least {minimum}{upper}",
        lambda value: is_number(value, minimum, below) and value != below,
    )


any_number = must_be("a number, or None", lambda value: value is None or is_number(value, float("-inf")))
"""Validator: any number, or None."""


def one_of(*choices: JsonValue) -> Validator:
    """Return a validator: one of ``choices``."""
    return must_be(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


flag = must_be("True or False", lambda value: isinstance(value, bool))
"""Validator: True or False."""


PUBLISHED = {
    "chunk_tokens": 512,
    "memory_tokens_per_chunk": 256,
    "short_term_tokens": 10_240,
    "retrieved_tokens": 2_560,
}
"""The published sizes, for an 8B decoder of 128k positions (M+ section 4.1)."""


def shortest_chunk(chunk_tokens: int) -> int:
    """Return ``min_chunk_tokens`` where it is left out: with more than half of a chunk not every text could be cut."""
    return min(16, (chunk_tokens + 1) // 2)


UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate(("k", "M", "G", "T"))}}
UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate(("K", "M", "G", "T"))} | {"KB": 1000}
"""Bytes in a unit, by its name."""


def byte_count(value: JsonValue, name: str = "bytes_budget") -> int:
    """Return the number of bytes that an int or a text such as "512MiB", "8GiB" or "1.5GB" says.

    Raises ConfigError, which calls it ``name``, for others.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found is not None and found[2] in UNITS:
        count = int(Fraction(found[1]) * UNITS[found[2]])
        if count > 0:
            return count
    raise ConfigError(
        f"{name} must be a whole number of bytes above 0, or a text with a unit "
        f"({', '.join(unit for unit in UNITS if unit)}) such as '8GiB', got {value!r}"
    )


@define(frozen=True)
class Component:
    """An implementation by its registered ``name``, with that implementation's own ``options``.

    In a configuration file it is written ``"ram"`` or ``{"name": "linear", "width": 128}``.
    """

    name: str
    options: dict[str, JsonValue] = field(factory=dict)

    @staticmethod
    def of(value: JsonValue | Component) -> Component:
        """Read ``"name"``, ``{"name": ..., option: value}`` or a Component."""
        if isinstance(value, Component):
            return value
        if isinstance(value, str):
            return Component(value)
        name = value.get("name") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(name, str):
            return Component(name, {key: option for key, option in value.items() if key != "name"})
        raise ConfigError(f"an implementation must be a name or a table with a 'name' and its options, got {value!r}")

    def plain(self) -> str | dict[str, JsonValue]:
        """Return the form that a configuration file uses."""
        return {"name": self.name, **self.options} if self.options else self.name


def as_component(value: JsonValue | Component) -> Component:
    """Convert a name, or a table with a name and options, to a Component: for fields of attrs classes."""
    return Component.of(value)


def _both(*sizes: int | None) -> bool:
    return None not in sizes


def _names(value: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)


@define(frozen=True, kw_only=True)
class AdapterConfig:
    """The two LoRA adapters, "write" and "read" (M+ section 3.3; published: rank 16, alpha 32).

    Attributes:
        rank: r of the low-rank factors.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input, in training only.
        target_modules: names of the projections to adapt; None: attention and dense MLP projections of the layers
            that carry memory, found by the probe.
        shared: reading uses the write adapter too (one LoRA in all).
    """

    rank: int = field(default=16, validator=whole(1))
    alpha: float = field(default=32.0, validator=number(0))
    dropout: float = field(default=0.0, validator=number(0, 1))
    target_modules: tuple[str, ...] | None = field(default=None, converter=_names)
    shared: bool = field(default=False, validator=flag)


def _adapters(value: AdapterConfig | Mapping[str, JsonValue] | bool | None) -> AdapterConfig | None:
    if value is False:  # TOML has no word for None
        return None
    # True, say, is left for the validator to refuse.
    return structure(AdapterConfig, value) if isinstance(value, Mapping) else cast("AdapterConfig | None", value)


LONG_TERM_TOKENS = int("150000")  # not a literal: no other number of that value is this very object
"""The capacity of a config that says nothing of it; a mechanism may have another in the place of this very object."""

ADAPTERS = AdapterConfig()
"""The adapters of a config that says nothing of them; a mechanism that needs none goes without this very object."""


@define(frozen=True, kw_only=True)
class MPlusConfig:
    """Configuration of a memory: how a decoder writes, keeps and reads it. Sizes are tokens per layer.

    Sizes that are left out (None) get their numbers when a decoder is wrapped: ``PUBLISHED``, those of M+ section 4.1,
    where the decoder has room for them, else smaller ones (``mplus.hf.model.sizes.resolve``). ``model.mplus_config``
    holds the numbers, and so does what is saved.

    Example:
        >>> from mplus import MPlusConfig
        >>> config = MPlusConfig(chunk_tokens=128, retriever={"name": "linear", "width": 64})
        >>> config.retriever
        Component(name='linear', options={'width': 64})
        >>> MPlusConfig.from_dict(config.to_dict()) == config
        True

    Attributes:
        mechanism: "mplus", "memoryllm" (no long-term memory), "kv" (keys and values of the text's own tokens) or
            "notes" (passages of text in front of the prompt), or a third party's.
        variant: "paper", or "published" to follow the released code to the letter.
        chunk_tokens: text tokens read by one write.
        min_chunk_tokens: shorter chunks are joined with their neighbour, or wait for more text of their source where
            there is none. Left out: 16, but at most half of ``chunk_tokens``, so that every text of that length can be
            cut into chunks.
        memory_tokens_per_chunk: K, rows written per chunk.
        short_term_tokens: N, rows of short-term memory (STM).
        retrieved_tokens: K0, long-term rows brought back by a read.
        long_term_tokens: capacity of long-term memory (LTM); 0 keeps none, None sets no limit. Left out, it is 150,000,
            or what the mechanism says: "kv" then has no limit.
        bytes_budget: bytes that a whole memory may take, all layers and streams together, as a number or "8GiB": what
            short-term memory leaves of it sets the capacity of LTM, in place of ``long_term_tokens``. None: no budget.
        drop_per_layer: draw the rows that leave the STM independently per layer.
        query_tokens: retrieve with the first so many text tokens only; None: all of them. Scoring a text without
            leaking its future needs a number here, or ``query_tokens`` or ``retrieve_every`` in the call.
        memory_positions: "sequential" (-P..-1), "compressed" (the same order squeezed into ``position_span``
            positions), "constant" (all at one position), or "auto": sequential, but constant under ALiBi.
        position_span: positions that compressed memory takes.
        rope_inv_freq_dtype: round rotary frequencies to this dtype ("bfloat16" in published M+ checkpoints).
        memory_rows: what is kept of a row. "projected": its keys and values under the reading adapter, not rotated,
            so that no read computes them again; hidden states only of the newest K, so a memory is refused once weights
            or adapters that it is read with have changed. "hidden": hidden states, projected at every read. "both".
            "auto": the smaller of the two where keys can be rotated later, else (in the variant "published", and where
            there are adapters of the user on the projections) hidden.
        store, eviction: implementations with their options.
        retriever: what is brought back: of rows ("linear" where it is left out), or of whole chunks with the mechanism
            "kv" (see ``mplus.retrievers.chunks``).
        min_score: bring back only what the retriever scores higher; 0: anything may come back; None: as the mechanism
            and its retriever have it. For a mechanism with such a threshold ("kv"); ``generate`` overrides it.
        backend: attention backend; "auto" picks the first usable one.
        adapters: LoRA adapters, or None (in TOML: false) to add none. Left out: those of ``AdapterConfig()``, or none
            with a mechanism that has nothing to train ("kv").
    """

    mechanism: Component = field(default=Component("mplus"), converter=as_component)
    variant: Literal["paper", "published"] = field(default="paper", validator=one_of("paper", "published"))
    # None until ``wrap`` has resolved them; everything behind ``wrap`` has numbers, hence the type.
    chunk_tokens: int = field(default=cast("int", None), validator=size(1))
    min_chunk_tokens: int = field(default=cast("int", None), validator=size(1))
    memory_tokens_per_chunk: int = field(default=cast("int", None), validator=size(1))
    short_term_tokens: int = field(default=cast("int", None), validator=size(1))
    retrieved_tokens: int = field(default=cast("int", None), validator=size(0))
    long_term_tokens: int | None = field(default=LONG_TERM_TOKENS, validator=whole(0, optional=True))
    bytes_budget: int | str | None = field(default=None)
    drop_per_layer: bool = field(default=True, validator=flag)
    query_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    memory_positions: Literal["auto", "sequential", "compressed", "constant"] = field(
        default="auto", validator=one_of("auto", "sequential", "compressed", "constant")
    )
    position_span: int | None = field(default=None, validator=whole(1, optional=True))
    rope_inv_freq_dtype: Literal["bfloat16", "float16"] | None = field(
        default=None, validator=one_of(None, "bfloat16", "float16")
    )
    memory_rows: Literal["auto", "projected", "hidden", "both"] = field(
        default="auto", validator=one_of("auto", "projected", "hidden", "both")
    )
    store: Component = field(default=Component("ram"), converter=as_component)
    eviction: Component = field(default=Component("fifo"), converter=as_component)
    retriever: Component = field(default=Component("linear"), converter=as_component)
    min_score: float | None = field(default=None, validator=any_number)
    backend: str = field(default="auto", validator=attrs.validators.instance_of(str))
    adapters: AdapterConfig | None = field(
        default=cast("AdapterConfig | None", ADAPTERS),
        converter=_adapters,
        validator=attrs.validators.optional(attrs.validators.instance_of(AdapterConfig)),
    )

    def __attrs_post_init__(self) -> None:
        if self.bytes_budget is not None:
            byte_count(self.bytes_budget)
        if self.min_chunk_tokens is None and self.chunk_tokens is not None:
            object.__setattr__(self, "min_chunk_tokens", shortest_chunk(self.chunk_tokens))
        if _both(self.memory_tokens_per_chunk, self.short_term_tokens) and (
            self.memory_tokens_per_chunk > self.short_term_tokens
        ):
            raise ConfigError(
                "memory_tokens_per_chunk must not exceed short_term_tokens "
                f"({self.short_term_tokens}), got {self.memory_tokens_per_chunk}: one write must fit into the STM"
            )
        if _both(self.min_chunk_tokens, self.chunk_tokens) and self.min_chunk_tokens > self.chunk_tokens:
            raise ConfigError(
                f"min_chunk_tokens must not exceed chunk_tokens ({self.chunk_tokens}), got {self.min_chunk_tokens}"
            )
        if (self.memory_positions == "compressed") != (self.position_span is not None):
            raise ConfigError(
                "position_span must be given exactly when memory_positions is 'compressed', "
                f"got memory_positions={self.memory_positions!r} and position_span={self.position_span!r}"
            )

    def to_dict(self) -> dict[str, JsonValue]:
        """Return plain data that ``from_dict`` reads back."""
        return cast("dict[str, JsonValue]", _converter().unstructure(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, JsonValue]) -> MPlusConfig:
        """Build from plain data. Raises ConfigError naming an unknown key and the nearest known ones."""
        return structure(cls, data)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return JSON text; also written to ``path`` when given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_file(cls, path: str | Path) -> MPlusConfig:
        """Read a ``.json`` or ``.toml`` file. Raises ConfigError where it is none, or as ``from_dict``."""
        path = Path(path)
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} must be valid {path.suffix.lstrip('.').upper() or 'JSON'}: {error}") from error
        try:
            return cls.from_dict(data)
        except RecursionError as error:  # read, but too deep to be looked at
            raise ConfigError(f"{path} must hold a table of fields, got one of too many levels") from error


def structure(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build the attrs class ``cls`` from plain data.

    Raises:
        ConfigError: an unknown key (the nearest known ones are named), a wrong type, or a broken rule.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{cls.__name__} must be a table of fields, got {data!r}")
    known = [attribute.name for attribute in attrs.fields(cast(Any, cls)) if attribute.init]
    for key in data:
        if key not in known:
            # A low cutoff: "chunk_size" should find "chunk_tokens".
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {', '.join(map(repr, near))}?" if near else f"known fields: {', '.join(known) or 'none'}"
            )
            raise ConfigError(f"{key!r} is not a field of {cls.__qualname__}; {hint}")
    try:
        # Validators of the class check the values; structuring would coerce wrong types silently.
        return cls(**data)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # of validators of attrs, say
        raise ConfigError(f"{cls.__qualname__}: {error}") from error


def options_of(implementation: Any, options: Mapping[str, JsonValue]) -> Any:
    """Build the implementation's own ``Options`` from a component's table. Raises ConfigError as ``structure``."""
    return structure(implementation.Options, options)


def _converter() -> cattrs.BaseConverter:
    # Not cattrs.Converter: an interrupt while that one generates code leaves the class unusable in this thread.
    for cls in (MPlusConfig, AdapterConfig):
        attrs.resolve_types(cls)
    converter = cattrs.BaseConverter()
    converter.register_unstructure_hook(Component, lambda component: component.plain())
    converter.register_unstructure_hook(tuple, list)
    return converter
