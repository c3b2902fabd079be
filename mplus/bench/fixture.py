"""The fixture of a measurement: a decoder with random weights, wrapped in several ways, and a memory of random rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import attrs
import torch
from attrs import define, evolve, field
from torch import Tensor

import mplus
from mplus.bench.baselines import BareLayers, PublishedRead, prefix_keys_values
from mplus.bench.presets import Preset
from mplus.config import JsonValue, MPlusConfig
from mplus.evaluation.retriever_swap import own_retriever
from mplus.eviction import EVICTION
from mplus.hf.decoders.bench_models import DecoderWeights, LayerWeights, PrefixedCache, random_llama, twin, weights_of
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.memory.memory import Memory
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.retrievers.base import Retriever
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores import STORES
from mplus.stores.base import MemoryStore, StoreLayout

PUBLISHED_SCORE = "sigmoid_mean"
T = TypeVar("T", DecoderWeights, LayerWeights)
SPREAD = 2.0
"""Standard deviation of the products of queries and keys."""
BLOCK = 16_384
"""Rows made, and keys projected, at a time."""


@define(eq=False)
class BenchmarkFixture:
    """A decoder, a memory of random rows and prompts, from which all variants of a measurement are built.

    The variants share weights and rows, so that they do the same work and memory is taken once.

    Example:
        >>> fixture = BenchmarkFixture(preset("tiny"), torch.device("cpu"))
        >>> model = fixture.wrapped("sdpa")
        >>> model(fixture.prompts(4, 1)[0], memory=fixture.memory(model)).logits.shape
        torch.Size([1, 4, 64])

    Attributes:
        preset: the sizes.
        device: where everything is.
        seed: of weights, rows and prompts.
        base: the decoder, as transformers has it; made when not given.
        filled: short-term rows in the memory; None: as many as there may be.
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
    _first: MemoryModel | None = field(init=False)
    _rows: RandomRows | None = None

    def __attrs_post_init__(self) -> None:
        if self.base is None:
            self.base = random_llama(self.preset.fields, self.preset.torch_dtype, self.device, self.seed)
        self.weights = weights_of(self.base)
        self._first = None
        self._first = self.wrapped("auto")
        _redraw(own_retriever(self.first), self.seed)

    @property
    def first(self) -> MemoryModel:
        """The wrapped decoder that begin rows and retriever of all others are those of."""
        return cast("MemoryModel", self._first)

    def wrapped(self, backend: str, score: str = PUBLISHED_SCORE, **changes: JsonValue) -> MemoryModel:
        """Wrap the decoder, with the begin rows and the retriever that every wrapped one has.

        Args:
            backend: of attention.
            score: of the retriever.
            changes: further fields of the ``MPlusConfig``.
        """
        retriever: dict[str, str | int] = {"name": "linear", "width": self.preset.retriever_width, "score": score}
        config = MPlusConfig.from_dict({**self.preset.memory, "retriever": retriever, "backend": backend, **changes})
        model: MemoryModel = mplus.wrap(twin(self.base), config, check=False)
        if self._first is not None:
            model.mplus.load_state_dict(self.first.mplus.state_dict(), strict=False)
        model.requires_grad_(False)
        return model

    @property
    def rows(self) -> RandomRows:
        """The memory's rows; made when first asked for."""
        if self._rows is None:
            preset = self.preset
            self._rows = random_rows(
                self.first.mplus_engine,
                preset.short_term_tokens if self.filled is None else self.filled,
                preset.long_term_rows,
                self.seed,
                oldest=preset.retrieved_tokens,
                # The published code keeps long-term memory on the host.
                kept_on=torch.device("cpu") if self.keep else None,
            )
        return self._rows

    @property
    def _begin(self) -> Sequence[Tensor]:
        return cast("Sequence[Tensor]", self.first.mplus.begin)

    def memory(self, model: MemoryModel, streams: int = 1) -> Memory:
        """Return a memory of the rows for a decoder from ``wrapped``."""
        return self.rows.memory(model.mplus_engine, streams, self.seed)

    def without_retrieval(self, backend: str) -> tuple[MemoryModel, Memory]:
        """Return a decoder that retrieves nothing, and a memory with as long a prefix, all of it short-term."""
        rows = self.preset.prefix_rows - 1
        model = self.wrapped(backend, retrieved_tokens=0, long_term_tokens=0, short_term_tokens=rows)
        return model, random_rows(model.mplus_engine, rows, 0, self.seed).memory(model.mplus_engine, 1, self.seed)

    def prefix(self, short_term: int | None = None) -> list[Tensor]:
        """Return the rows in front of the text in each layer, ``[P, d]``.

        Args:
            short_term: the begin row and so many of the newest short-term rows; None: the begin row, the oldest
                long-term rows (as many as are retrieved) and all short-term rows.
        """
        begin = self._begin
        prefixes = []
        for layer, recent in enumerate(self.rows.short_term):
            behind = [self.rows.oldest[layer], recent] if short_term is None else [recent[len(recent) - short_term :]]
            prefixes.append(torch.cat([begin[layer].detach(), *behind]))
        return prefixes

    def bare_layers(self, room: int, rows: list[Tensor] | None = None, streams: int = 1) -> BareLayers:
        """Return the bare layers over ``rows`` of every layer, or over ``prefix()``, with room for text tokens."""
        keys, values = prefix_keys_values(self.weights, rows if rows is not None else self.prefix(), streams)
        return BareLayers(self.weights, keys, values, room)

    def prefixed_cache(self) -> PrefixedCache:
        """Return ``prefix()`` as a cache of transformers."""
        return PrefixedCache(*prefix_keys_values(self.weights, self.prefix()))

    def published(self) -> PublishedRead:
        """Return the published read of the rows."""
        rows, retriever = self.rows, own_retriever(self.first)
        return PublishedRead(
            weights=self.weights,
            project=retriever.project_queries,
            begin=[row.detach() for row in self._begin],
            short_term=list(rows.short_term),
            long_term=rows.long_term,
            keys=rows.keys,
            births=torch.arange(len(rows.long_term[0])),
            retrieved_tokens=self.preset.retrieved_tokens,
        )

    def in_float64(self) -> PublishedRead:
        """Return the published read in float64: what all variants approximate."""
        read = self.published()
        retriever = copy.deepcopy(own_retriever(self.first)).double()

        def double(parts: Sequence[Tensor]) -> list[Tensor]:
            return [part.double() for part in parts]

        return evolve(
            read,
            weights=in_double(self.weights),
            project=retriever.project_queries,
            begin=double(read.begin),
            short_term=double(read.short_term),
            long_term=double(read.long_term),
            keys=double(read.keys),
        )

    def prompts(self, length: int, count: int, streams: int = 1) -> Tensor:
        """Draw ids ``[count, streams, length]``."""
        generator = torch.Generator().manual_seed(self.seed + length)
        ids = torch.randint(self.preset.vocab_size, (count, streams, length), generator=generator)
        return ids.to(self.device)


@torch.no_grad()
def _redraw(retriever: Retriever, seed: int) -> None:
    """Draw projectors whose products differ clearly, so that rounding does not decide which rows are best."""
    generator = torch.Generator().manual_seed(seed + 7)
    for name, weight in retriever.named_parameters():
        size = weight.shape[1] ** -0.5
        if name.endswith(".2.weight"):  # behind a SiLU, whose output has a mean square of about 0.36
            size *= (SPREAD / weight.shape[0] ** 0.5) ** 0.5 / 0.6
        weight.copy_(size * torch.randn(weight.shape, generator=generator))


def in_double(weights: DecoderWeights) -> DecoderWeights:
    """Return the same weights in float64."""

    def convert(holder: T) -> T:
        values = {name: getattr(holder, name) for name in attrs.fields_dict(type(holder))}
        double: dict[str, Any] = {name: one.double() for name, one in values.items() if isinstance(one, Tensor)}
        return evolve(holder, **double)

    double = convert(weights)
    return evolve(double, layers=tuple(map(convert, weights.layers)))


@define(frozen=True, eq=False)
class RandomRows:
    """Random rows of a stream, of which memories of several decoders with the same retriever are made.

    Attributes:
        state: the stream's.
        store: its long-term rows, which are older than all others.
        short_term: per layer ``[N, d]``, hidden states of the short-term rows.
        oldest: per layer ``[n, d]``, those of the oldest long-term rows, as many as were asked for.
        long_term: per layer ``[M, d]``, the long-term rows as plain tensors, where they were kept.
        keys: per layer ``[M, r]``, theirs.
    """

    state: StreamState
    store: MemoryStore
    short_term: tuple[Tensor, ...]
    oldest: tuple[Tensor, ...]
    long_term: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    _transposed: list[MemoryStore] = field(factory=list)

    def store_for(self, engine: DecoderEngine) -> MemoryStore:
        """Return the store, or, where a CPU reads keys in another order, one with the same rows in that order."""
        layout, made = engine.layout, self._transposed
        if layout.device.type != "cpu" or layout.transposed_keys == self.store.layout.transposed_keys:
            return self.store
        if not made:
            made.append(STORES.build(engine.config.store, layout))
            for layer in range(layout.layers):
                for ids in self.store.ids(layer).split(BLOCK):
                    made[0].append(layer, self.store.gather(layer, ids))
        return made[0]

    def memory(self, engine: DecoderEngine, streams: int = 1, seed: int = 0) -> Memory:
        """Return a memory of ``streams`` independent streams, each with all rows."""
        store = self.store_for(engine)
        return Memory(
            Streams(
                engine,
                [self.state] * streams,
                [store.fork() for _ in range(streams)],
                [torch.Generator().manual_seed(seed + row) for row in range(streams)],
                EVICTION.build(engine.config.eviction),
            )
        )


@torch.no_grad()
def random_rows(
    engine: DecoderEngine,
    short_term: int,
    long_term: int,
    seed: int,
    oldest: int = 0,
    kept_on: torch.device | None = None,
) -> RandomRows:
    """Draw rows of unit variance in every layer: a memory as large as wanted without writing thousands of chunks.

    Args:
        engine: of the decoder; its retriever makes the keys.
        short_term, long_term: rows per layer.
        seed: of the rows; a layer's do not depend on how many others there are.
        oldest: keep hidden states of so many of the oldest long-term rows.
        kept_on: keep the long-term rows and keys as tensors too, on this device.
    """
    layout, mechanism = engine.layout, cast("RowMechanism", engine.mechanism)
    store = STORES.build(engine.config.store, layout)
    recent_rows, hidden_kept, oldest_kept, rows_kept, keys_kept = [], [], [], [], []
    for layer in range(layout.layers):
        generator = torch.Generator(layout.device).manual_seed(seed * 1000 + layer)
        recent = _random_hidden(short_term, layout, generator)
        hidden_kept.append(recent)
        recent_rows.append(_as_rows(engine, layer, recent, long_term, with_key=not layout.keeps_hidden))
        hidden = _random_hidden(long_term, layout, generator)
        oldest_kept.append(hidden[:oldest].clone())
        keys = None
        if long_term:
            rows = _as_rows(engine, layer, hidden, 0, with_key=True)
            store.append(layer, rows)
            keys = rows.key
        if kept_on is not None:
            rows_kept.append(hidden.to(kept_on))
            keys_kept.append(hidden.new_empty(long_term, 0) if keys is None else keys.to(kept_on))
    state = evolve(mechanism.holding(layout, recent_rows, hidden_kept), clock=long_term + short_term)
    return RandomRows(state, store, tuple(hidden_kept), tuple(oldest_kept), tuple(rows_kept), tuple(keys_kept))


def _random_hidden(count: int, layout: StoreLayout, generator: torch.Generator) -> Tensor:
    """Draw ``[count, d]`` of unit variance, block by block, so that little is held in float32."""
    made = torch.empty(count, layout.hidden_size, dtype=layout.dtype, device=layout.device)
    for block in made.split(BLOCK):
        block.copy_(torch.randn(block.shape, generator=generator, device=layout.device))
    return made


def _as_rows(engine: DecoderEngine, layer: int, hidden: Tensor, birth: int, with_key: bool) -> MemoryRows:
    """Return hidden states as rows with the columns of the engine's layout, born from ``birth`` on."""
    layout, count = engine.layout, hidden.shape[0]
    births = torch.arange(birth, birth + count, dtype=torch.int64, device=layout.device)
    rows = MemoryRows(hidden if layout.keeps_hidden else None, births, torch.full_like(births, NO_SOURCE))
    if layout.projected_size:
        blocks = [engine.project(layer, block[None])[0] for block in hidden.split(BLOCK)]
        rows = rows.replace(projected=torch.cat(blocks))
    if with_key and layout.key_size:
        keys = [engine.keys(layer, block) for block in hidden.split(BLOCK)]
        rows = rows.replace(key=torch.cat([part for part in keys if part is not None]))
    return rows
