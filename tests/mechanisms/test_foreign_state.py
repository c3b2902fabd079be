"""A memory whose streams hold other rows and tensors than those of M+ has the same life: nothing outside knows them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.config import MPlusConfig
from mplus.errors import MemoryMismatchError, NotSupported
from mplus.mechanisms import MECHANISMS
from mplus.memory import Memory
from mplus.memory.format.entries import state_class
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.memory.state import PlainState
from tests.mechanisms.gists import KEPT, GistMechanism, GistState
from tests.memory.counting import LAYERS, WIDTH, CountedModel, CountingEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from mplus.memory import StreamState

NAMES = ("first", "second", "first", "third", "second")


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    MECHANISMS.register("gists", GistMechanism)
    yield
    if "gists" in MECHANISMS.names():
        MECHANISMS.unregister("gists")


class GistEngine(CountingEngine):
    """A decoder whose rows are drawn from the clock and the text."""

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        block = torch.empty(LAYERS, len(states), ids.shape[1], WIDTH)
        for stream, (state, text) in enumerate(zip(states, ids, strict=True)):
            generator = torch.Generator().manual_seed(state.clock * 1000 + int(text.sum()))
            block[:, stream] = torch.randn(LAYERS, ids.shape[1], WIDTH, generator=generator)
        return list(block)


def model() -> CountedModel:
    sizes = {"chunk_tokens": 8, "min_chunk_tokens": 1, "memory_tokens_per_chunk": 1, "short_term_tokens": KEPT}
    return CountedModel(GistEngine(MPlusConfig.from_dict({**sizes, "mechanism": "gists", "long_term_tokens": 20})))


def write(memory: Memory, start: int = 0) -> Memory:
    for turn, name in enumerate(NAMES[start:], start):
        memory.write([torch.arange(8) + turn + row for row in range(memory.batch_size)], name)
    return memory


def written(**options: Any) -> Memory:
    return write(model().new_memory(2, **options))


def content(memory: Memory) -> list[Any]:
    """All that the streams hold, as plain numbers; names of sources in the place of their numbers."""
    found = []
    for state, store in zip(memory.states, memory.stores, strict=True):
        assert isinstance(state, GistState)
        lists = [*state.gists, *(store.gather(layer, store.ids(layer)) for layer in range(LAYERS))]
        rows = [{name: column.tolist() for name, column in part.columns().items()} for part in lists]
        tensors = {name: tensor.tolist() for name, tensor in state.tensors().items()}
        found.append((rows, tensors, state.clock, [source.name for source in state.sources]))
    return found


def held(memory: Memory, name: str) -> dict[str, float]:
    return next(source.held for source in memory.sources(1) if source.name == name)


def test_its_rows_are_listed_under_its_own_names() -> None:
    memory = written()
    assert held(memory, "second") == {"gist": 1, "long-term": 1}
    assert "[3 gist, 2 long-term]" in repr(memory)
    assert [len(rows) for rows in memory.states[0].row_lists()["gists"]] == [KEPT] * LAYERS


def test_copies_go_on_by_themselves() -> None:
    memory, whole = write(model().new_memory(2)), content(written())
    assert content(memory.fork()) == content(memory.select([0, 1])) == whole
    half = memory.to(dtype=torch.float64)
    assert half.states[0].row_lists()["gists"][0].hidden.dtype == torch.float64
    write(memory.fork())
    assert content(memory) == whole


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    memory = written()
    memory.save(tmp_path / "saved")
    loaded = Memory.load(tmp_path / "saved", model())
    assert content(loaded) == content(memory)
    assert content(write(loaded)) == content(write(memory))
    assert verify(tmp_path / "saved") == []
    assert saved_sources(tmp_path / "saved")[1] == Memory.load(tmp_path / "saved", model()).sources(1)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_directory_keeps_it_through_a_crash(checkpoint: bool, tmp_path: Path) -> None:
    with Memory.open(tmp_path / "live", model(), batch_size=2) as memory:
        write(memory)
        if checkpoint:
            memory.checkpoint()
        shutil.copytree(tmp_path / "live", tmp_path / "killed")  # what a process that is killed now leaves
        expected = content(memory)
    (tmp_path / "killed" / "lock").unlink(missing_ok=True)
    for folder in ("live", "killed"):
        with Memory.open(tmp_path / folder, model()) as memory:
            assert content(memory) == expected == content(written())
    assert verify(tmp_path / "live") == []


@pytest.mark.parametrize("how", ["memory", "directory", "saved", "directory on disk"])
def test_what_it_holds_of_a_source_is_forgotten(how: str, tmp_path: Path) -> None:
    """The last chunk was of this source, so that a tensor of the mechanism holds something of it."""
    memory = written() if how in ("memory", "saved") else None
    if memory is None:
        with Memory.open(tmp_path / "m", model(), batch_size=2) as memory:
            write(memory)
            if how == "directory":
                memory.forget("second")
        if how == "directory on disk":
            forget_saved(tmp_path / "m", "second")
        memory = Memory.open(tmp_path / "m", model(), read_only=True)
    elif how == "saved":
        memory.save(tmp_path / "m")
        report = forget_saved(tmp_path / "m", "second")
        assert report.held == {"gist": (2,) * LAYERS, "long-term": (2,) * LAYERS}
        memory = Memory.load(tmp_path / "m", model())
    else:
        memory.forget("second")
    for rows, tensors, _, names in content(memory):
        assert tensors == {"last": [], "last_source": -1}
        assert names == ["first", "third"]
        assert all(1 not in part["source"] for part in rows)


def test_rebuilding_forgets_it_too() -> None:
    memory = written(keep_text=True)
    memory.forget("second", mode="rebuild")
    other = model().new_memory(2, keep_text=True)
    for turn, name in enumerate(NAMES):
        if name != "second":
            other.write([torch.arange(8) + turn + row for row in range(2)], name)
    assert [part[1] for part in content(memory)] == [part[1] for part in content(other)]
    assert [source.name for source in memory.sources()] == ["first", "third"]


def test_what_is_sound_is_saved(tmp_path: Path) -> None:
    memory = written()
    memory.save(tmp_path / "saved")
    assert repair(tmp_path / "saved", tmp_path / "repaired") == []
    assert content(Memory.load(tmp_path / "repaired", model())) == content(memory)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    state = written().states[0]
    tensors = state.tensors()
    del tensors["last"]
    with pytest.raises(MemoryMismatchError, match="last"):
        GistState.from_parts(written().stores[0].layout, state.row_lists(), tensors)
    with pytest.raises(MemoryMismatchError, match=r"the lists of rows gists for 3 layers, got \{\}"):
        GistState.from_parts(written().stores[0].layout, {}, state.tensors())


class TestNotInstalled:
    """What works with a memory on disk whose mechanism is not there, and what says so."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        written().save(tmp_path / "saved")
        MECHANISMS.unregister("gists")
        return tmp_path / "saved"

    def test_it_is_listed_and_verified(self, saved: Path) -> None:
        assert state_class("gists") is PlainState
        second = next(source for source in saved_sources(saved)[0] if source.name == "second")
        assert second.held == {"gists": 1, "long-term": 1}
        assert verify(saved) == []

    def test_forgetting_is_refused_where_only_it_knows_what_tensors_hold(self, saved: Path) -> None:
        with pytest.raises(NotSupported, match="last, last_source hold of a source: install its package"):
            forget_saved(saved, "second")
        assert "second" in [source.name for source in saved_sources(saved)[0]]

    def test_loading_names_the_entry_point(self, saved: Path) -> None:
        plain = CountedModel(CountingEngine(MPlusConfig.from_dict({"mechanism": "memoryllm", "chunk_tokens": 8})))
        with pytest.raises(
            MemoryMismatchError, match=r"'gists' is not installed.*entry-point group 'mplus\.mechanisms'"
        ):
            Memory.load(saved, plain)
