"""A decoder that computes nothing: every row it makes says which one it is. Rules of memory show in plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

from mplus.config import MPlusConfig
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.build import build_mechanism
from mplus.mechanisms.decoder import DecoderShape
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.update import Update
from mplus.stores.base import StoreLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.memory import Memory, StreamState
    from mplus.memory.state import StreamView

WIDTH = 4
LAYERS = 3
SHAPE = DecoderShape(
    layers=LAYERS,
    depth=LAYERS,
    width=WIDTH,
    embedding_width=WIDTH,
    heads=1,
    key_heads=1,
    head_size=WIDTH,
    value_size=WIDTH,
    max_positions=None,
    vocab_size=100,
    hybrid=False,
    positions="rotary",
    dtype=torch.float32,
    device=torch.device("cpu"),
    begin=torch.zeros(LAYERS, 1, WIDTH),
    begin_inputs=torch.zeros(LAYERS, 1, WIDTH),
)


@define(eq=False)
class CountingEngine:
    """An ``Engine`` whose rows are ``[number, layer, first id, 0]``; numbers start anew with every ``seed``."""

    config: MPlusConfig
    seed: int = 0
    mechanism: Any = field(init=False)
    made: list[float] = field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mechanism = build_mechanism(self.config, SHAPE)

    @property
    def layout(self) -> StoreLayout:
        return StoreLayout(
            layers=LAYERS, hidden_size=WIDTH, key_size=self.mechanism.key_size, expiry=self.mechanism.expiry
        )

    decoder = tokenizer = None
    writes_text = False
    vocab_size = 100
    dtype = torch.float32
    device = torch.device("cpu")

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        rows = {self.mechanism.plan_write(state, ids.shape[1]).rows for state in states}
        assert len(rows) == 1, "streams in one pass make equally many rows"
        (count,) = rows
        block = torch.zeros(LAYERS, len(states), count, WIDTH)
        for stream, text in enumerate(ids):
            numbers = [len(self.made) + i for i in range(count)]
            self.made.extend(numbers)
            block[:, stream, :, 0] = torch.tensor(numbers, dtype=torch.float32)
            block[:, stream, :, 2] = float(text[0])
        block[..., 1] = torch.arange(LAYERS)[:, None, None]
        return list(block)

    def write(
        self,
        views: Sequence[StreamView],
        ids: Tensor,
        tokenizer: Any = None,
        sources: Sequence[int | None] = (),
        short: bool = False,
    ) -> Update:
        return Update(tuple(self.encode([view.state for view in views], ids)))

    def search(self, view: StreamView, text: str, k: int, tokenizer: Any) -> Any:
        return self.mechanism.search(None, view, text, k, tokenizer)

    def check_options(self, **given: Any) -> None:
        """All of them mean something."""

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        retriever = self.mechanism.retriever
        return None if retriever is None else retriever.project_keys(layer, hidden).detach()

    def new_state(self, layout: StoreLayout) -> StreamState:
        return self.mechanism.new_state(layout)

    def weights(self, adapters: Sequence[str] | None = None) -> WeightsState:
        return WeightsState()

    def fingerprint(self, saved: Any = None) -> dict[str, Any]:
        return {"mechanism": self.config.mechanism.plain()}


class CountedModel:
    """As much of a wrapped decoder as memories need."""

    def __init__(self, engine: CountingEngine) -> None:
        self.mplus_engine = engine

    def new_memory(self, batch_size: int = 1, **options: Any) -> Memory:
        return MemoryModel.new_memory(self, batch_size, **options)


def counting_config(**config: Any) -> MPlusConfig:
    """Small chunks and keys."""
    sizes = {"chunk_tokens": 8, "min_chunk_tokens": 1, "retriever": {"name": "linear", "width": 2}}
    return MPlusConfig.from_dict({**sizes, **config})


def counting_memory(batch_size: int = 1, seed: int = 0, keep_text: bool = False, **config: Any) -> Memory:
    """A memory of a ``CountingEngine``."""
    engine = CountingEngine(counting_config(**config))
    return CountedModel(engine).new_memory(batch_size, seed=seed, keep_text=keep_text)


def numbers(rows: Any) -> list[int]:
    """Which rows these are."""
    return [int(number) for number in rows.hidden[:, 0]]


def tiers(memory: Memory, layer: int, row: int = 0) -> dict[str, list[int]]:
    """Which rows are where in one layer of a stream."""
    state, store = memory.states[row], memory.stores[row]
    return {
        "stm": numbers(state.stm[layer]),
        "pending": numbers(state.pending[layer]),
        "ltm": numbers(store.gather(layer, store.ids(layer))),
    }
