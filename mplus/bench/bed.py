"""One decoder with random weights, wrapped as often as there are ways to read, and what it reads."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import torch
from attrs import define, evolve, field
from torch import Tensor

import mplus
from mplus.bench.filling import Content, fill
from mplus.bench.floor import Floor
from mplus.bench.layers import prefix_keys_values
from mplus.bench.presets import Preset
from mplus.bench.published import PublishedRead
from mplus.config import MPlusConfig
from mplus.hf.decoders.bench_models import DecoderWeights, PrefixedCache, random_llama, twin, weights_of
from mplus.memory.memory import Memory

PUBLISHED_SCORE = "sigmoid_mean"
SPREAD = 2.0
"""Standard deviation of the products of queries and keys."""


@define(eq=False)
class Bed:
    """Everything that the ways of reading are built from; they share weights and rows.

    Attributes:
        preset: the sizes.
        device: where everything is.
        seed: of weights, rows and prompts.
        base: the decoder, as transformers has it; made when not given.
        filled: short-term rows there are, where that is fewer than there may be.
        keep: hold the long-term rows as plain tensors too, for ``published``.
        weights: the decoder's tensors.
    """

    preset: Preset
    device: torch.device
    seed: int = 0
    base: Any = None
    filled: int | None = None
    keep: bool = True
    weights: DecoderWeights = field(init=False)
    _first: Any = field(init=False)
    _content: Content | None = None

    def __attrs_post_init__(self) -> None:
        if self.base is None:
            self.base = random_llama(self.preset.fields, self.preset.torch_dtype, self.device, self.seed)
        self.weights = weights_of(self.base)
        self._first = None
        self._first = self.wrapped("auto")
        _spread(self._first.mplus.retriever, self.seed)

    def wrapped(self, backend: str, score: str = PUBLISHED_SCORE, **changes: Any) -> Any:
        """The decoder with a memory: same weights, same begin rows, same retriever."""
        retriever = {"name": "linear", "width": self.preset.retriever_width, "score": score}
        config = MPlusConfig.from_dict({**self.preset.memory, "retriever": retriever, "backend": backend, **changes})
        model = mplus.wrap(twin(self.base), config, check=False)
        if self._first is not None:
            model.mplus.load_state_dict(self._first.mplus.state_dict(), strict=False)
        return model.requires_grad_(False)

    @property
    def content(self) -> Content:
        """The memory's rows; made when first asked for."""
        if self._content is None:
            preset = self.preset
            self._content = fill(
                self._first.mplus_engine,
                preset.short_term_tokens if self.filled is None else self.filled,
                preset.long_term_rows,
                self.seed,
                oldest=preset.retrieved_tokens,
                # The published code keeps long-term memory on the host.
                kept_on=torch.device("cpu") if self.keep else None,
            )
        return self._content

    def memory(self, model: Any, streams: int = 1) -> Memory:
        """A memory of the content for a decoder from ``wrapped``."""
        return self.content.memory(model.mplus_engine, streams, self.seed)

    def without_retrieval(self, backend: str) -> tuple[Any, Memory]:
        """A decoder that retrieves nothing, and a memory with as long a prefix, all of it short-term."""
        rows = self.preset.prefix_rows - 1
        model = self.wrapped(backend, retrieved_tokens=0, long_term_tokens=0, short_term_tokens=rows)
        content = fill(model.mplus_engine, rows, 0, self.seed)
        return model, content.memory(model.mplus_engine, 1, self.seed)

    def prefix(self, short_term: int | None = None) -> list[Tensor]:
        """Per layer ``[P, d]``: begin row, the oldest long-term rows (as many as are retrieved), short-term rows.

        ``short_term``: the begin row and so many of the newest short-term rows instead.
        """
        content, begin = self.content, self._first.mplus.begin
        prefixes = []
        for layer, rows in enumerate(content.short_term):
            parts = [content.oldest[layer], rows] if short_term is None else [rows[len(rows) - short_term :]]
            prefixes.append(torch.cat([begin[layer].detach(), *parts]))
        return prefixes

    def floor(self, room: int, rows: list[Tensor] | None = None, streams: int = 1) -> Floor:
        """The floor over ``rows`` of every layer, or over ``prefix()``."""
        keys, values = prefix_keys_values(self.weights, rows if rows is not None else self.prefix(), streams)
        return Floor(self.weights, keys, values, room)

    def prefixed_cache(self) -> PrefixedCache:
        """``prefix()`` as a cache of transformers."""
        return PrefixedCache(*prefix_keys_values(self.weights, self.prefix()))

    def published(self) -> PublishedRead:
        """The published way to read the content."""
        content, retriever = self.content, self._first.mplus.retriever
        return PublishedRead(
            weights=self.weights,
            project=retriever.project_queries,
            begin=[row.detach() for row in self._first.mplus.begin],
            short_term=list(content.short_term),
            long_term=content.long_term,
            keys=content.keys,
            births=torch.arange(len(content.long_term[0])),
            retrieved_tokens=self.preset.retrieved_tokens,
        )

    def prompts(self, length: int, count: int, streams: int = 1) -> Tensor:
        """``[count, streams, length]`` random ids."""
        generator = torch.Generator().manual_seed(self.seed + length)
        ids = torch.randint(self.preset.vocab_size, (count, streams, length), generator=generator)
        return ids.to(self.device)

    @property
    def retriever(self) -> Any:
        """That of all decoders, but for the score."""
        return self._first.mplus.retriever

    def in_float64(self) -> PublishedRead:
        """The published way in float64: what all others approximate."""
        read = self.published()
        retriever = copy.deepcopy(self._first.mplus.retriever).double()
        return PublishedRead(
            weights=doubled(self.weights),
            project=retriever.project_queries,
            begin=_double(read.begin),
            short_term=_double(read.short_term),
            long_term=_double(read.long_term),
            keys=_double(read.keys),
            births=read.births,
            retrieved_tokens=read.retrieved_tokens,
        )


def doubled(weights: DecoderWeights) -> DecoderWeights:
    """The same weights in float64."""

    def convert(holder: Any) -> Any:
        values = {name: getattr(holder, name) for name in attrs.fields_dict(type(holder))}
        changed = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
        return evolve(holder, **changed)

    whole = convert(weights)
    return evolve(whole, layers=tuple(map(convert, weights.layers)))  # type: ignore[no-any-return]


def _double(parts: Any) -> list[Tensor]:
    return [part.double() for part in parts]


@torch.no_grad()
def _spread(retriever: Any, seed: int) -> None:
    """Random projectors whose products differ clearly, so that rounding does not decide which rows are best."""
    generator = torch.Generator().manual_seed(seed + 7)
    for name, weight in retriever.named_parameters():
        size = weight.shape[1] ** -0.5
        if name.endswith(".2.weight"):  # behind a SiLU, whose output has a mean square of about 0.36
            size *= (SPREAD / weight.shape[0] ** 0.5) ** 0.5 / 0.6
        weight.copy_(size * torch.randn(weight.shape, generator=generator))
