"""Tables of a recipe that stand by themselves: model, optimiser, checkpoints, data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import attrs
from attrs import define, field

from mplus.config import JsonValue, is_number, must_be, number, one_of, options_of, structure, whole
from mplus.errors import ConfigError, UnknownNameError
from mplus.training.activations.planning import check_settings, is_host_bytes, is_mode, is_share
from mplus.training.data import SOURCES
from mplus.training.data.options import as_texts, share, text, texts

T = TypeVar("T")
OLD_ACTIVATIONS = "gradient_checkpointing"
"""Earlier name of a setting."""


@contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """Put the place in a recipe in front of what an error says."""
    try:
        yield
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"{where}: {error}") from error


def as_table(value: JsonValue, name: str) -> Mapping[str, JsonValue]:
    """Return ``value``. Raises ConfigError, which calls it ``name``, where it is no table of fields."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table of fields, got {value!r}")
    return value


plain_name = must_be(
    "a name without spaces and slashes",
    lambda value: isinstance(value, str) and bool(value) and not set(value) & set("/\\ "),
)
"""Validator: a name that can be part of a path."""

_two_shares = must_be(
    "two numbers of at least 0 and below 1",
    lambda value: (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
    ),
)
_rates = must_be(
    "a table of numbers of at least 0, by the names of modules",
    lambda value: isinstance(value, Mapping) and all(is_number(rate, 0) for rate in value.values()),
)
_positive = must_be("a number above 0", lambda value: value is None or (is_number(value, 0) and value != 0))


def _betas(value: Sequence[float]) -> tuple[float, float]:
    return cast("tuple[float, float]", tuple(value) if isinstance(value, list) else value)


def _unless_false(value: T | Literal[False]) -> T | None:
    return None if value is False else value  # TOML has no word for None


@define(frozen=True, kw_only=True)
class Build:
    """A decoder with new weights.

    Attributes:
        model_type: of a transformers configuration ("llama").
        fields: of that configuration.
        init: "default" as in transformers, or "mimetic": attention starts as matching and copying.
    """

    model_type: str = field(validator=text)
    fields: dict[str, JsonValue] = field(factory=dict)
    init: Literal["default", "mimetic"] = field(default="default", validator=one_of("default", "mimetic"))

    @staticmethod
    def of(table: Mapping[str, JsonValue]) -> Build:
        """Read ``model_type``, ``init`` and fields of the configuration from one table."""
        own = {key: value for key, value in table.items() if key in {"model_type", "init"}}
        return structure(Build, {**own, "fields": {key: value for key, value in table.items() if key not in own}})

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the table."""
        return {"model_type": self.model_type, "init": self.init, **self.fields}


@define(frozen=True, kw_only=True)
class NewTokenizer:
    """A byte-level BPE tokenizer trained before everything else.

    Attributes:
        data: names of data sets of kind "documents".
        vocabulary: tokens.
        characters: text to train on, shared equally among the data sets.
    """

    data: tuple[str, ...] = field(converter=as_texts, validator=texts)
    vocabulary: int = field(default=8192, validator=whole(1))
    characters: int = field(default=20_000_000, validator=whole(1))


@define(frozen=True, kw_only=True)
class ModelTable:
    """The decoder: ``path`` or ``build``.

    Attributes:
        path: folder or Hub name of a decoder, "stories260K", "recall-tiny", or what mplus saved: then its adapters,
            begin rows, mark and retriever go on from there.
        build: a decoder with new weights.
        dtype: of weights that are not trained.
        tokenizer: folder or Hub name, "recall" for the little language, or a table of ``NewTokenizer``; None: the one
            at ``path``.
    """

    path: str | None = field(default=None, validator=text)
    build: Build | None = field(default=None)
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", validator=one_of("float32", "bfloat16", "float16")
    )
    tokenizer: str | NewTokenizer | None = field(default=None)

    @staticmethod
    def of(table: JsonValue) -> ModelTable:
        """Read a table."""
        plain = as_table(table, ModelTable.__name__)
        build, tokenizer = plain.get("build"), plain.get("tokenizer")
        values: dict[str, JsonValue | Build | NewTokenizer] = dict(plain)
        if isinstance(build, Mapping):
            with error_prefix("build"):
                values["build"] = Build.of(build)
        if isinstance(tokenizer, Mapping):
            with error_prefix("tokenizer"):
                values["tokenizer"] = structure(NewTokenizer, tokenizer)
        return structure(ModelTable, values)


@define(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and how fast it goes.

    Attributes:
        parameters: "adapters": LoRA and the mechanism's own parameters; "all": the decoder too.
        learning_rate: at the top of the schedule.
        learning_rates: of modules that the mechanism adds (children of ``model.mplus``), by name, where they differ.
        retriever_learning_rate: the same for the module "retriever", as ``learning_rates`` has it; None: not given.
        betas, weight_decay: of AdamW; the decay is on all that is trained.
        clip: largest norm of the gradient, of each of those modules and of everything else; None (in TOML false): no
            limit.
        warmup_steps: steps in which the rate rises to its top.
        schedule: how it falls: "cosine", "linear" or "constant".
        fall_from: name of the stage from which on it falls; None: the first. A stage that ends early counts in full.
        schedule_steps: after so many steps in all it has fallen, whatever the stages; None: at the end of the last.
        floor: share of the top it falls to.
        dtype: what the decoder computes in; "bfloat16" is mixed precision. Trained weights are float32.
        activations: what backward needs of the decoder's layers: "keep" it, "recompute" it from each layer's input,
            "swap" it to host memory and back, or swap a part and recompute the rest ("memo").
        swapped_share: of the tokens that "memo" swaps, 0 to 1; "auto": found in the first step. None: "auto".
        host_bytes: the most that swapped activations may take of host memory, in each process; None: no limit.
    """

    parameters: Literal["adapters", "all"] = field(default="adapters", validator=one_of("adapters", "all"))
    learning_rate: float = field(default=1e-3, validator=number(0))
    learning_rates: dict[str, float] = field(factory=dict, validator=_rates)
    retriever_learning_rate: float | None = field(default=None, validator=attrs.validators.optional(number(0)))
    betas: tuple[float, float] = field(default=(0.9, 0.999), converter=_betas, validator=_two_shares)
    weight_decay: float = field(default=0.01, validator=number(0))
    clip: float | None = field(default=1.0, converter=_unless_false, validator=_positive)
    warmup_steps: int = field(default=0, validator=whole(0))
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", validator=one_of("cosine", "linear", "constant")
    )
    fall_from: str | None = field(default=None, validator=attrs.validators.optional(text))
    schedule_steps: int | None = field(default=None, validator=whole(1, optional=True))
    floor: float = field(default=0.1, validator=share)
    dtype: Literal["float32", "bfloat16"] = field(default="float32", validator=one_of("float32", "bfloat16"))
    activations: Literal["keep", "recompute", "swap", "memo"] = field(default="keep", validator=is_mode)
    swapped_share: float | Literal["auto"] | None = field(default=None, validator=is_share)
    host_bytes: int | None = field(default=None, validator=is_host_bytes)

    @staticmethod
    def of(table: JsonValue) -> Optimizer:
        """Read a table. Raises ConfigError for a setting that has another name now."""
        plain = as_table(table, Optimizer.__name__)
        if OLD_ACTIVATIONS in plain:
            value = "recompute" if plain[OLD_ACTIVATIONS] is True else "keep"
            raise ConfigError(
                f"{OLD_ACTIVATIONS} is called activations now, got {OLD_ACTIVATIONS} = {plain[OLD_ACTIVATIONS]!r}: "
                f"write activations = {value!r}"
            )
        return structure(Optimizer, plain)

    def __attrs_post_init__(self) -> None:
        check_settings(self.activations, self.swapped_share, self.host_bytes)
        if self.retriever_learning_rate is not None and "retriever" in self.learning_rates:
            raise ConfigError(
                "one of retriever_learning_rate and learning_rates.retriever must be given, got "
                f"{self.retriever_learning_rate} and {self.learning_rates['retriever']}"
            )

    def rate_of(self, module: str) -> float:
        """Return the learning rate at the top of a module that the mechanism adds ("": of everything else)."""
        if module == "retriever" and self.retriever_learning_rate is not None:
            return self.retriever_learning_rate
        return self.learning_rates.get(module, self.learning_rate)


@define(frozen=True, kw_only=True)
class Checkpoints:
    """When the whole state of training is written into the run folder.

    Attributes:
        every_steps, every_minutes: whichever comes first; None (false): not by this. One is written at the end of
            a stage too.
        keep: how many of the newest stay.
    """

    every_steps: int | None = field(default=1000, converter=_unless_false, validator=whole(1, optional=True))
    every_minutes: float | None = field(default=None, validator=_positive)
    keep: int = field(default=2, validator=whole(1))


@define(frozen=True, kw_only=True)
class Metrics:
    """``every_steps``: a line of metrics is the mean over so many steps."""

    every_steps: int = field(default=20, validator=whole(1))


@define(frozen=True, kw_only=True)
class DataSet:
    """A source of batches: its ``kind`` and that source's own ``options``."""

    kind: str
    options: dict[str, JsonValue]
    parsed: Any = field(eq=False)  # the Options of whichever source it is

    @staticmethod
    def of(table: JsonValue) -> DataSet:
        """Read ``kind`` and options from one table."""
        kind = table.get("kind") if isinstance(table, Mapping) else None
        if not isinstance(table, Mapping) or not isinstance(kind, str):
            raise ConfigError(f"a data set must be a table with a 'kind' ({', '.join(SOURCES.names())}), got {table!r}")
        options = {key: value for key, value in table.items() if key != "kind"}
        return DataSet(kind=kind, options=options, parsed=options_of(SOURCES.get(kind), options))
