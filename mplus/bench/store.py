"""``mplus bench store``: a chunk's rows appended, evicted and merged, in a small layer and in a large one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.bench.correctness import FAILED, CheckResult
from mplus.bench.presets import Preset
from mplus.bench.record import MachineRates, Record, Section, arm_entry, make_record
from mplus.config import Component, MPlusConfig, options_of
from mplus.eviction import EVICTION
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.memory.writing.update import Keys, WriteContext
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from mplus.timing import Arm, in_rounds, ratio

ROWS = (10_000, 100_000, 1_000_000)
"""Rows of a layer."""
TINY_ROWS = (256, 1_024)
FILLED = 16_384
"""Rows appended at a time while a store is filled."""
KINDS = ("append", "evict", "merge")


def measure(
    preset: Preset,
    device: torch.device,
    threads: Sequence[int],
    repeats: int,
    store: str = "ram",
    sizes: Sequence[int] | None = None,
) -> Record:
    """Return the record of ``mplus bench store``.

    Args:
        preset: gives the width of rows, the rows of a chunk, and the rows of short-term memory they come from.
        device: where the rows are.
        threads: of torch, one section each.
        repeats: rounds.
        store: its name.
        sizes: rows of the layer; None: ``ROWS``.
    """
    sizes = sorted(sizes or (TINY_ROWS if preset.name == "tiny" else ROWS))
    result = check(preset, device, store)
    results = {f"{kind}/{rows}": result for kind in KINDS for rows in sizes}

    def section(rates: MachineRates) -> Section:
        arms = [arm for rows in sizes for arm in FullLayer(preset, device, store, rows).arms()]
        # Appending and evicting take turns, so that a layer stays at its capacity, whichever comes first in a round.
        times = in_rounds(arms, repeats, device, warm=3)
        found = {
            f"{kind}_at_{sizes[-1]}_over_{sizes[0]}": ratio(times, f"{kind}/{sizes[-1]}", f"{kind}/{sizes[0]}")
            for kind in KINDS
        }
        return {"arms": {name: arm_entry(result, times[name]) for name in results}, "ratios": found}

    facts = {"rows_per_chunk": preset.memory_tokens_per_chunk, "row_bytes": layout_of(preset, device).row_bytes}
    return make_record("store", preset, device, threads, section, results, repeats=repeats, store=store, **facts)


def layout_of(preset: Preset, device: torch.device) -> StoreLayout:
    """Return the layout of one layer's rows: keys and values, retriever keys and an expiry."""
    return StoreLayout(
        layers=1,
        hidden_size=preset.hidden_size,
        key_size=preset.retriever_width,
        expiry=True,
        dtype=preset.torch_dtype,
        device=device,
        projected_size=2 * preset.key_heads * preset.head_dim,
        keeps_hidden=False,
    )


class FullLayer:
    """A layer at its capacity, to which a chunk's rows are added and from which as many leave.

    The rows have the random ages at which short-term memory lets them go.

    Attributes:
        capacity: rows in the layer.
        flowing: the store that is appended to and evicted from.
        merging: a store of the same rows, into which pending rows are merged and where as many expire.
    """

    def __init__(self, preset: Preset, device: torch.device, store: str, rows: int) -> None:
        self.capacity = rows
        self._preset, self._layout = preset, layout_of(preset, device)
        self._generator, self._written = torch.Generator().manual_seed(rows), 0
        chunk = preset.memory_tokens_per_chunk
        config = MPlusConfig(
            mechanism={"name": "mplus", "merge_every": 1, "lifetime": rows / chunk},
            long_term_tokens=rows,
            memory_tokens_per_chunk=chunk,
            short_term_tokens=preset.short_term_tokens,
            retrieved_tokens=min(preset.retrieved_tokens, rows // 2),
        )
        options = options_of(MPlusMechanism, config.mechanism.options)
        self._mechanism = MPlusMechanism(config, MemoryAdditions(torch.zeros(1, 1, 1), None), options)
        self.flowing = STORES.build(Component.of(store), self._layout)
        content = self._rows(min(FILLED, rows))
        for start in range(0, rows, FILLED):
            part = self._aged(content.select(slice(0, min(FILLED, rows - start))))
            places = torch.arange(start, start + len(part), dtype=torch.float64, device=device)
            self.flowing.append(0, part.replace(expiry=places / chunk + 1))  # a chunk's rows per merge
        self._next = content.select(slice(0, chunk))
        self.merging = self.flowing.fork()
        keys: Keys = lambda layer, hidden: None  # noqa: E731
        policy = EVICTION.build(config.eviction)
        self._context = WriteContext(self.merging, policy, torch.randperm, keys, capacity=rows)
        self._state = self._mechanism.new_state(self._layout)
        self._incoming = self._next

    def arms(self) -> list[Arm]:
        """Return an arm for each kind of change."""
        return [
            Arm(f"append/{self.capacity}", self.append, self.prepare),
            Arm(f"evict/{self.capacity}", self.evict),
            Arm(f"merge/{self.capacity}", self.merge, self.prepare),
        ]

    def prepare(self, turn: int) -> None:
        """Make the rows of the next chunk."""
        self._incoming = self._aged(self._next)

    def append(self, turn: int) -> None:
        """Append a chunk's rows."""
        self.flowing.append(0, self._incoming.replace(expiry=self._incoming.birth.double()))

    def evict(self, turn: int) -> None:
        """Evict as many rows, the oldest."""
        policy = self._context.eviction
        self.flowing.remove(0, policy.select(self.flowing, 0, self._preset.memory_tokens_per_chunk))

    def merge(self, turn: int) -> None:
        """Merge a chunk's pending rows; others expire, and what is beyond the capacity is evicted."""
        state = self._mechanism.waiting(self._state, [self._incoming.replace(expiry=None)])
        self._state, _ = self._mechanism.merge(state, self._context)

    def _rows(self, count: int) -> MemoryRows:
        """Draw rows without ages."""
        layout = self._layout

        def normal(width: int) -> Tensor:
            return torch.randn(count, width, generator=self._generator).to(layout.device, layout.dtype)

        nought = torch.zeros(count, dtype=torch.int64, device=layout.device)
        return MemoryRows(None, nought, nought, normal(layout.key_size), None, normal(layout.projected_size))

    def _aged(self, rows: MemoryRows) -> MemoryRows:
        """Give rows the births of those that leave short-term memory after a random stay (MemoryLLM section 3.1.2)."""
        stay = torch.empty(len(rows)).exponential_(1 / self._preset.short_term_tokens, generator=self._generator)
        births = torch.arange(self._written, self._written + len(rows)) - stay.long()
        self._written += len(rows)
        return rows.replace(birth=births.to(self._layout.device))


def check(preset: Preset, device: torch.device, store: str) -> CheckResult:
    """Check that the oldest rows leave a small layer, against a plain sort."""
    result = CheckResult()
    layer = FullLayer(evolve(preset, memory_tokens_per_chunk=16, short_term_tokens=32), device, store, 100)
    for turn in range(20):
        layer.prepare(turn)
        layer.append(turn)
        births = layer.flowing.gather(0, layer.flowing.ids(0)).birth.tolist()
        layer.evict(turn)
        left = layer.flowing.gather(0, layer.flowing.ids(0)).birth.tolist()
        layer.merge(turn)
        if sorted(left) != sorted(births)[16:] or layer.merging.count(0) > 100:
            result.status, result.reason = FAILED, f"after {turn + 1} chunks other rows are left than the youngest"
            break
    return result
