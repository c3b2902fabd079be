"""A memory and plain lists side by side, through any sequence of what can be done to it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mplus
from mplus.eviction.base import EvictionPolicy
from mplus.stores.base import StoreView
from tests.helpers.modes import on_every_change
from tests.memory.counting import LAYERS, WIDTH, CountedModel, CountingEngine, counting_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.memory import Memory, StreamState
    from mplus.rows import MemoryRows

Held = list[Counter[int]]
"""By layer, the numbers of the rows that must be there."""

CONFIGS: dict[str, dict[str, Any]] = {
    "grows": {"long_term_tokens": None},
    "fifo": {"long_term_tokens": 7, "drop_per_layer": False},
    "reservoir": {"long_term_tokens": 7, "eviction": "reservoir"},
    "lru": {"long_term_tokens": 7, "eviction": "lru"},
    "ttl": {"long_term_tokens": 9, "eviction": {"name": "ttl", "lifetime": 3.0}},
    "waits": {"long_term_tokens": 9, "mechanism": {"name": "mplus", "merge_every": 3}},
    "published": {
        "long_term_tokens": None,
        "variant": "published",
        "mechanism": {"name": "mplus", "merge_every": 2, "lifetime": 3.0},
    },
    "short": {"long_term_tokens": 0},
}
SIZES: dict[str, Any] = {"memory_tokens_per_chunk": 2, "short_term_tokens": 5, "retrieved_tokens": 3}
SMALL_FILES = {"name": "mmap", "bytes_in_memory": 300}
SMALL_TIERS = {"name": "tiered", "device_bytes": 500, "host_bytes": 1500, "inner": SMALL_FILES}
STORES: dict[str, Any] = {
    "ram": "ram",
    "slabs": {"name": "ram", "slab_rows": 4, "growth": 1.3},
    "mmap": SMALL_FILES,
    "int8": "quantized",
    "fp8": {"name": "quantized", "format": "fp8", "inner": SMALL_FILES},
    "tiers": SMALL_TIERS,
    "int8 in tiers": {"name": "quantized", "inner": SMALL_TIERS},
}


class LegibleEngine(CountingEngine):
    """Rows say in digits of at most 4 bits which layer they are of and which number they have: 8 bits hold them."""

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        number = torch.stack(super().encode(states, ids))[..., 0].long()
        layer = torch.arange(LAYERS)[:, None, None].expand_as(number)
        digits = [layer + 4 * (number >> 12), number >> 8 & 15, number >> 4 & 15, number & 15]
        assert len(self.made) < 4 * 4096
        return list(torch.stack(digits, -1).float())


def numbers(rows: MemoryRows, layer: int) -> list[int]:
    """Which rows these are. Raises AssertionError unless all are of this layer."""
    digits = rows.need_hidden().long()
    assert digits.shape[1] == WIDTH
    assert bool((rows.need_hidden() == digits).all())
    assert bool((digits[:, 0] & 3 == layer).all()), "rows of another layer"
    powers = torch.tensor([1024, 256, 16, 1])
    found: list[int] = (torch.cat([digits[:, :1] & ~3, digits[:, 1:]], 1) * powers).sum(1).tolist()
    return found


def places(memory: Memory, layer: int) -> list[MemoryRows]:
    """Rows of a layer in STM, pending and LTM."""
    state, store = memory.states[0], memory.stores[0]
    return [state.stm[layer], state.pending[layer], store.gather(layer, store.ids(layer))]


def held(memory: Memory) -> Held:
    """What is there."""
    return [Counter(n for rows in places(memory, layer) for n in numbers(rows, layer)) for layer in range(LAYERS)]


class Watched(EvictionPolicy):
    """A policy, and a list of ``(layer, number)`` of all rows that it let go; it can be made to fail.

    Attributes:
        fails_in: the layer in which choosing raises RuntimeError; None: in none.
    """

    def __init__(self, policy: EvictionPolicy, removed: list[tuple[int, int]], fails_in: int | None = None) -> None:
        super().__init__(policy.options)
        self.policy, self.removed, self.fails_in = policy, removed, fails_in
        self.name, self.needs_access_log = policy.name, policy.needs_access_log  # type: ignore[misc]

    @property
    def lifetime(self) -> float | None:
        return self.policy.lifetime

    def with_access_log(self, access_log: Any) -> EvictionPolicy:
        return Watched(self.policy.with_access_log(access_log), self.removed, self.fails_in)

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        return self.noted(store, layer, self.policy.select(store, layer, excess))

    def expire(self, store: StoreView, layer: int, elapsed: float, spare: int) -> tuple[float, Tensor]:
        after, ids = self.policy.expire(store, layer, elapsed, spare)
        return after, self.noted(store, layer, ids)

    def noted(self, store: StoreView, layer: int, ids: Tensor) -> Tensor:
        if layer == self.fails_in:
            raise RuntimeError("made to fail")
        self.removed += [(layer, number) for number in numbers(store.gather(layer, ids), layer)]
        return ids


class Rows(RuleBasedStateMachine):
    """Writes, reads, forgets, copies and saves of one memory; every row has a number, and no number comes twice.

    Attributes:
        kinds: names of the configs and stores to choose from.
        steps: how many steps all machines of a subclass made.
    """

    kinds: ClassVar[Sequence[tuple[str, str]]] = [(config, store) for config in CONFIGS for store in STORES]
    steps: ClassVar[list[int]] = [0]
    memory: Memory

    def new_memory(self, store: str, seed: int) -> Memory:
        """The memory that everything is done to."""
        return self.model.new_memory(seed=seed, keep_text=True, store=STORES[store])

    @initialize(data=st.data(), seed=st.integers(0, 9))
    def begin(self, data: st.DataObject, seed: int) -> None:
        """A new memory that keeps its texts."""
        config, store = data.draw(st.sampled_from(self.kinds))
        self.config = {**SIZES, **CONFIGS[config]}
        self.model = CountedModel(LegibleEngine(counting_config(**self.config)))
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        self.removed: list[tuple[int, int]] = []
        self.memory = self.watched(self.new_memory(store, seed))
        self.expected: Held = [Counter() for _ in range(LAYERS)]
        self.sources: dict[int, str | None] = {}
        self.births: dict[int, int] = {}
        self.copies: list[tuple[Memory, Held]] = []
        for name in ("a", "b", "a"):
            self.write(20, name)

    def watched(self, memory: Any) -> Any:
        """The same memory, what its policy lets go noted."""
        memory.streams.eviction = Watched(memory.streams.eviction, self.removed)
        return memory

    @rule(tokens=st.integers(1, 30), name=st.sampled_from(["a", "b", None]))
    def write(self, tokens: int, name: str | None) -> None:
        """Each chunk adds rows with new numbers; what the policy let go is gone, and nothing else."""
        made = len(self.model.mplus_engine.made)
        self.removed.clear()
        report = self.memory.write([7] * tokens, source=name)
        lost = report.dropped_rows[0] if self.config["long_term_tokens"] == 0 else report.evicted_rows[0]
        self.wrote(Counter(range(made, len(self.model.mplus_engine.made))), name, lost)

    def wrote(self, new: Counter[int], name: str | None, lost: int) -> None:
        """Note what a write added; ``lost``: rows per layer that it says are gone, at most."""
        self.sources.update(dict.fromkeys(new, name))
        for layer, now in enumerate(held(self.memory)):
            everything = self.expected[layer] + new
            self.expected[layer] = everything - Counter(n for at, n in self.removed if at == layer)
            if self.config["long_term_tokens"] == 0 or self.config.get("variant") == "published":
                # No policy of the memory's own decides: what is gone is known by its number only.
                assert now <= everything, "rows come from nowhere, or twice"
                assert (everything - now).total() <= lost, "more rows are gone than the report says"
                self.expected[layer] = now

    @rule(tokens=st.integers(1, 30), layer=st.integers(0, LAYERS - 1), name=st.sampled_from(["a", "c"]))
    def write_with_a_policy_that_fails(self, tokens: int, layer: int, name: str) -> None:
        """Chunks before the one whose rows nobody can make room for are there; of it, and after it, nothing is."""
        self.flush()  # else the first chunk has what waits in it, and there may be one more
        policy = self.memory.streams.eviction
        assert isinstance(policy, Watched)
        chunks = [7] * tokens
        while chunks:  # chunk by chunk, so that it is known what each of them let go
            chunk, chunks = chunks[:8], chunks[8:]
            made = len(self.model.mplus_engine.made)
            self.removed.clear()
            policy.fails_in = layer
            try:
                report = self.memory.write(chunk, source=name)
            except RuntimeError:
                return
            finally:
                policy.fails_in = None
            lost = report.dropped_rows[0] if self.config["long_term_tokens"] == 0 else report.evicted_rows[0]
            self.wrote(Counter(range(made, len(self.model.mplus_engine.made))), name, lost)

    def flush(self) -> None:
        """Write what waits, each source's text as a chunk of its own."""
        state, made = self.memory.states[0], len(self.model.mplus_engine.made)
        waiting = [state.sources[one.source].name for one in state.tail]
        self.removed.clear()
        report = self.memory.flush()
        new = range(made, len(self.model.mplus_engine.made))
        rows = len(new) // max(len(waiting), 1)  # as many of each
        lost = report.dropped_rows[0] if self.config["long_term_tokens"] == 0 else report.evicted_rows[0]
        self.wrote(Counter(new), None, lost)
        self.sources.update({number: waiting[(number - made) // rows] for number in new})

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 9))
    def read(self, layer: int, seed: int) -> None:
        """Retrieval finds rows that are in long-term memory or wait for it, and as many as it says."""
        mechanism, view = self.model.mplus_engine.mechanism, self.memory.snapshot()[0]
        hidden = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
        [found] = mechanism.retrieve(layer, hidden, torch.ones(1, 3, dtype=torch.bool), [view])
        count = 0 if found is None else len(found.rows)
        assert count == mechanism.retrieved_rows(view, layer)
        if found is not None:
            _, pending, stored = places(self.memory, layer)
            assert set(numbers(found.rows, layer)) <= {*numbers(pending, layer), *numbers(stored, layer)}

    @precondition(lambda self: self.memory.sources())
    @rule(which=st.integers(0, 2))
    def forget(self, which: int) -> None:
        """Just the rows of one source go, and the report counts them."""
        name = self.named(which)
        report = self.memory.forget(name)
        for layer, before in enumerate(self.expected):
            mine = Counter(n for n in before if self.sources[n] == name)
            self.expected[layer] = before - mine
            tiers = tuple(report.held.values())
            assert sum(tier[layer] for tier in tiers) == mine.total()

    @precondition(lambda self: self.memory.sources())
    @rule(which=st.integers(0, 2))
    def rebuild(self, which: int) -> None:
        """All rows are new ones, of the other sources only."""
        name = self.named(which)
        made = len(self.model.mplus_engine.made)
        others = [source for source in self.memory.sources() if source.name != name]
        self.memory.forget(name, mode="rebuild")
        self.expected = held(self.memory)
        state = self.memory.states[0]
        for layer, expected in enumerate(self.expected):
            assert all(number >= made for number in expected)
            for rows in places(self.memory, layer):
                named = [state.sources[number].name for number in rows.source.tolist()]
                self.sources.update(zip(numbers(rows, layer), named, strict=True))
                assert name not in named
        # In another order where a source was forgotten and written again.
        left = {source.name: (source.tokens, source.chunks) for source in self.memory.sources()}
        assert left == {source.name: (source.tokens, source.chunks) for source in others}

    def named(self, which: int) -> str | None:
        """One of the sources there are."""
        names = [source.name for source in self.memory.sources()]
        return names[which % len(names)]

    def keep(self, copy: Memory) -> None:
        """From now on ``copy``, of the memory as it is, must stay as it is."""
        self.copies = [*self.copies[-1:], (copy, [Counter(rows) for rows in self.expected])]

    @rule(leave=st.booleans())
    def fork(self, leave: bool) -> None:
        """A fork holds the same; what happens to one of the two does not show in the other."""
        other: Memory = self.memory.fork()
        if leave and self.memory.directory is None:
            self.memory, other = other, self.memory
        self.keep(other)
        third = other.fork()
        third.write([7] * 8, source="elsewhere")
        third.forget("elsewhere")

    @rule(leave=st.booleans())
    def save_and_load(self, leave: bool) -> None:
        """What is read back is what was saved."""
        with tempfile.TemporaryDirectory() as folder:
            self.memory.save(Path(folder) / "saved")
            loaded = self.watched(mplus.Memory.load(Path(folder) / "saved", self.model))
        assert held(loaded) == self.expected
        if leave and self.memory.directory is None:
            self.memory = loaded
        else:
            self.keep(loaded)

    @rule()
    def a_mistake(self) -> None:
        """What is refused changes nothing."""
        with pytest.raises(mplus.errors.InputError):
            self.memory.write([7, 7, 10**6])
        with pytest.raises(mplus.errors.InputError):
            self.memory.forget("nobody")

    @precondition(lambda self: self.memory.states[0].clock > 60)
    @rule()
    def reset(self) -> None:
        """Nothing is left."""
        self.memory.reset()
        self.expected = [Counter() for _ in range(LAYERS)]

    @invariant()
    def every_row_is_there_once(self) -> None:
        """STM, pending and LTM together are the list, in this memory and in its copies."""
        if not hasattr(self, "memory"):
            return
        self.steps[0] += 1
        for copy, expected in self.copies:
            assert held(copy) == expected
        assert held(self.memory) == self.expected
        state, capacity = self.memory.states[0], self.memory.capacity
        for layer, expected_rows in enumerate(self.expected):
            assert max(expected_rows.values(), default=1) == 1
            for rows in places(self.memory, layer):
                own = numbers(rows, layer)
                assert [state.sources[number].name for number in rows.source.tolist()] == [self.sources[n] for n in own]
            if self.memory.engine.mechanism.options.ages == "birth":
                births = [(n, b) for rows in places(self.memory, layer) for n, b in self.born(rows, layer)]
                assert all(self.births.setdefault(number, birth) == birth for number, birth in births)
            if capacity is not None:
                assert self.memory.stores[0].count(layer) <= capacity

    @staticmethod
    def born(rows: MemoryRows, layer: int) -> list[tuple[int, int]]:
        """Numbers and births."""
        return list(zip(numbers(rows, layer), rows.birth.tolist(), strict=True))

    def teardown(self) -> None:
        """Remove the files."""
        if hasattr(self, "scratch"):
            self.memory, self.copies = None, []  # type: ignore[assignment]
            self.scratch.cleanup()


def follow(machine: type[Rows], kinds: Sequence[tuple[str, str]], *, nightly: int) -> int:
    """Let machines make a few steps for each of ``kinds``, and at night so many of any kind; how many they made."""

    class Counted(machine):  # type: ignore[misc, valid-type]
        steps: ClassVar[list[int]] = [0]

    for kind in kinds:
        Counted.kinds = [kind]
        run_state_machine_as_test(Counted, settings=settings(max_examples=4, stateful_step_count=10))
    Counted.kinds = machine.kinds
    while Counted.steps[0] < on_every_change(0, nightly=nightly):
        run_state_machine_as_test(Counted, settings=settings(max_examples=50, stateful_step_count=50))
    return Counted.steps[0]
