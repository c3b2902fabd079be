"""A memory in a directory goes on as one in memory would; who may open it, and when it refuses to be changed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
import torch

import mplus
from mplus.errors import ConfigError, InputError, LiveMemoryError, MemoryFileError, MemoryMismatchError
from mplus.memory import Memory
from mplus.stores.disk.compaction import files_of
from tests.conftest import NIGHTLY
from tests.memory import tiny
from tests.memory.disks.disks import Failing, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel()


def written(path: Path, chunks: int = 9, **options) -> Memory:
    memory = open_memory(path, MODEL, **options)
    for number in range(chunks):
        memory.write(chunk(number), source="ab"[number % 2])
    return memory


def policy(memory: Memory) -> tuple[object, ...]:
    eviction = memory.streams.eviction
    return eviction.name, eviction.options


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_goes_on_as_one_in_memory(tmp_path, name):
    model = tiny.variant(name)
    ordinary = model.new_memory(batch_size=2, seed=3)
    with Memory.open(tmp_path, model, batch_size=2, seed=3, journal_bytes=60_000) as memory:
        for number in range(6):
            for one in (memory, ordinary):
                one.write([tiny.ids(40, number), tiny.ids(20, 100 + number)], source=f"{number % 3}")
        assert_same(memory, ordinary)
        assert_same(Memory.open(tmp_path, model, read_only=True), ordinary)
        prompts = tiny.prompts(2)
        with torch.no_grad():
            logits = [model(prompts, memory=one).logits for one in (memory, ordinary)]
        assert torch.equal(*logits)
        for one in (memory, ordinary):
            one.forget("1")
        assert_same(Memory.open(tmp_path, model, read_only=True), ordinary)
    with Memory.open(tmp_path, model) as memory:
        for one in (memory, ordinary):
            one.write([tiny.ids(40, 77), None], source="new")
        assert_same(memory, ordinary)
    assert_same(Memory.open(tmp_path, model, read_only=True), ordinary)


def test_forgetting_takes_rows_off_the_disk(tmp_path):
    memory = written(tmp_path)
    memory.checkpoint()
    memory.write(chunk(30), source="b")
    store = memory.stores[0]
    rows = store.gather(0, store.ids(0))
    secret = [bytes(tiny.raw(row)) for row, source in zip(rows.hidden, rows.source, strict=True) if source == 1]
    secret += [bytes(tiny.raw(row)) for row in memory.states[0].stm[0].hidden[memory.states[0].stm[0].source == 1]]

    def on_disk() -> int:
        whole = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        return sum(row in whole for row in secret)

    assert on_disk() == len(secret) > 8
    memory.forget("b")
    assert on_disk() == 0
    assert len(rows.hidden) > len(memory.stores[0].ids(0)) > 0


def test_forks_selections_saves_and_moves_are_ordinary(tmp_path):
    memory = written(tmp_path / "live")
    held = content(memory)
    for copy in (memory.fork(), memory.select([0]), memory.to(dtype=torch.float32)):
        assert type(copy) is Memory
        assert difference(content(copy), held) == []
        copy.write(chunk(5))
        copy.forget("a")
    memory.save(tmp_path / "saved")
    assert difference(content(Memory.load(tmp_path / "saved", MODEL)), held) == []
    assert difference(content(Memory.load(tmp_path / "saved", MODEL, store="mmap")), held) == []
    assert difference(content(memory), held) == []
    assert difference(content(reopened(tmp_path / "live", MODEL)), held) == []


def test_a_fork_outlives_the_files_it_shares(tmp_path):
    memory = written(tmp_path)
    memory.checkpoint()
    fork = memory.fork()
    held = content(fork)
    memory.reset()
    memory.close()
    assert not list(tmp_path.glob("rows-*"))
    assert difference(content(fork), held) == []


def test_journals_become_checkpoints_and_few_files(tmp_path):
    memory = written(tmp_path, 40, journal_bytes=20_000)
    assert memory.directory.manifest.number >= 10
    assert memory.directory.journal_bytes <= 20_000
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {*memory.directory.manifest.files, "manifest.json", "lock"}
    assert len(files_of(memory.stores[0].layers)) <= 3
    assert_same(reopened(tmp_path, MODEL), memory)


def test_one_writer_and_any_number_of_readers(tmp_path):
    memory = written(tmp_path)
    with pytest.raises(LiveMemoryError, match=f"is by process {os.getpid()}: close it there"):
        Memory.open(tmp_path, MODEL)
    reader = reopened(tmp_path, MODEL)
    held = content(reader)
    with pytest.raises(LiveMemoryError, match="read_only=True: open it for writing"):
        reader.write(chunk(1))
    with pytest.raises(LiveMemoryError, match="read_only=True"):
        reader.forget("a")
    memory.write(chunk(20))
    memory.checkpoint()
    assert difference(content(reader), held) == [], "what it sees does not change"
    memory.close()
    memory.close()
    with pytest.raises(LiveMemoryError, match="was closed: open it again"):
        memory.write(chunk(1))
    assert_same(memory, reopened(tmp_path, MODEL))
    del reader
    Memory.open(tmp_path, MODEL).close()


def test_a_memory_that_is_let_go_releases_the_lock(tmp_path):
    memory = written(tmp_path)
    held = content(memory)
    del memory
    with Memory.open(tmp_path, MODEL) as again:
        assert difference(content(again), held) == []


def test_the_lock_dies_with_its_process(tmp_path):
    code = (
        "import os, sys; from mplus.memory.directory.lock import acquire\n"
        "from mplus.stores.disk.files import FileSystem; from mplus.stores.disk.files import Folder\n"
        "held = acquire(FileSystem(), Folder.open(sys.argv[1])); print(os.getpid(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid = process.stdout.readline().strip()
        with pytest.raises(LiveMemoryError, match=f"by process {pid}"):
            Memory.open(tmp_path, MODEL)
        process.kill()
    Memory.open(tmp_path, MODEL).close()


def test_another_decoder_or_batch_size_is_refused(tmp_path):
    written(tmp_path).close()
    other = PlainModel(mechanism={"name": "mplus", "merge_every": 3})
    with pytest.raises(MemoryMismatchError, match="mechanism is 'mplus' in the file and"):
        Memory.open(tmp_path, other)
    with pytest.raises(MemoryMismatchError, match="its own batch_size, 1, or without one, got 2"):
        Memory.open(tmp_path, MODEL, batch_size=2)
    with pytest.raises(MemoryMismatchError, match="needs a decoder wrapped"):
        Memory.open(tmp_path, object())
    with pytest.raises(ConfigError, match="journal_bytes must be"):
        Memory.open(tmp_path, MODEL, journal_bytes=0)
    Memory.open(tmp_path, MODEL).close()


def test_other_folders_are_refused_and_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(MemoryFileError, match=r"must be empty or hold a memory that lives there.*'todo.txt'"):
        Memory.open(tmp_path / "notes", MODEL)
    with pytest.raises(MemoryFileError, match="it is a file"):
        Memory.open(tmp_path / "notes" / "todo.txt", MODEL)
    MODEL.new_memory().save(tmp_path / "saved")
    with pytest.raises(MemoryFileError, match=r"but a saved one: Memory\.load reads it"):
        Memory.open(tmp_path / "saved", MODEL)
    with pytest.raises(MemoryFileError, match=r"manifest\.json is missing"):
        reopened(tmp_path / "nowhere", MODEL)
    assert not (tmp_path / "nowhere").exists()
    written(tmp_path / "live").close()
    with pytest.raises(MemoryFileError, match=r"Memory\.open opens it"):
        Memory.load(tmp_path / "live", MODEL)
    with pytest.raises(MemoryFileError, match="must be empty or hold a saved memory"):
        MODEL.new_memory().save(tmp_path / "live")
    assert {file.name for file in (tmp_path / "notes").iterdir()} == {"todo.txt"}
    assert not (tmp_path / "saved" / "lock").exists()


def test_a_journal_that_cannot_become_a_checkpoint_goes_on_growing_and_says_so(tmp_path):
    files = Failing()
    memory = written(tmp_path, 2, journal_bytes=1, files=files)
    assert memory.directory.journal_bytes == 0
    files.fail(3, lasting=True, late=False)  # the record is written and synced, and then nothing more
    with pytest.warns(UserWarning, match="goes on growing, since no checkpoint could be written"):
        memory.write(chunk(4))
    assert files.failed
    assert memory.directory.journal_bytes > 0
    files.heal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.write(chunk(20))
    assert_same(reopened(tmp_path, MODEL), memory)


@pytest.mark.parametrize("where", ["mplus/memory/directory", "mplus/memory/transaction"])
def test_an_interrupt_before_any_line_leaves_memory_and_directory_agreed(tmp_path, where):
    memory = written(tmp_path, journal_bytes=10**9)
    interrupts = 0
    changes = [lambda: memory.write(chunk(3), source="b"), lambda: memory.forget("b"), memory.checkpoint]
    for change in changes:
        prepare = lambda: memory.write(chunk(7), source="b")  # noqa: E731
        for place in interrupted_everywhere(prepare, change, where, most=75 if NIGHTLY else 20):
            interrupts += 1
            assert memory.directory.failed is None, place
            assert difference(content(reopened(tmp_path, MODEL)), content(memory)) == [], place
    assert interrupts > 40


def test_mistakes_cost_nothing(tmp_path):
    memory = written(tmp_path)
    held = content(memory)
    with pytest.raises(InputError):
        memory.write(torch.tensor([1, 2, 10**6, 4]))
    with pytest.raises(InputError):
        memory.forget("nobody")
    assert difference(content(memory), held) == []
    assert_same(reopened(tmp_path, MODEL), memory)


def test_one_in_memory_only_is_closed_by_doing_nothing_and_has_no_checkpoint():
    with MODEL.new_memory() as memory:
        assert memory.directory is None
        with pytest.raises(LiveMemoryError, match=r"Memory.open.* in memory only: use memory.save"):
            memory.checkpoint()
    memory.write(chunk(1))
    assert memory.version == 1


def test_it_is_offered_at_the_top_and_says_what_it_takes():
    assert mplus.Memory is Memory
    described = inspect.getdoc(Memory.open)
    assert all(name in described.partition("Raises:")[0] for name in inspect.signature(Memory.open).parameters)
    with pytest.raises(TypeError, match="batchsize"):
        Memory.open("nowhere", MODEL, batchsize=2)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_text": True},
        {"eviction": {"name": "ttl", "lifetime": 3.0}},
        {"eviction": "reservoir"},
        {"eviction": "lru"},
        {"bytes_budget": 40_000},
    ],
    ids=["texts", "ttl", "reservoir", "lru", "budget"],
)
@pytest.mark.parametrize("closed", [True, False])
def test_everything_a_memory_can_be_made_with_lasts(tmp_path, options, closed):
    model = tiny.variant("paper")
    ordinary = model.new_memory(batch_size=2, store="mmap", **options)  # a budget holds as many rows there
    memory = Memory.open(tmp_path, model, batch_size=2, **options)
    for number in range(7):
        for one in (memory, ordinary):
            one.write([tiny.ids(40, number), tiny.ids(20, 100 + number)], source=f"{number % 3}")
    assert_same(memory, ordinary)
    if closed:
        memory.close()
    else:
        memory.directory.close()  # as if it had been killed
    memory = Memory.open(tmp_path, model)
    assert memory.streams.budget == ordinary.streams.budget
    assert policy(memory) == policy(ordinary)
    assert memory.streams.keeps_text == ordinary.streams.keeps_text
    for one in (memory, ordinary):
        if one.streams.keeps_text:
            one.forget("1", mode="rebuild")
        one.write([tiny.ids(40, 50), tiny.ids(40, 51)], source="new")
    assert_same(memory, ordinary)
    assert_same(Memory.open(tmp_path, model, read_only=True), ordinary)
    memory.close()
    assert {file.name for file in tmp_path.iterdir()} == {*memory.directory.manifest.files, "manifest.json", "lock"}
    assert_same(Memory.open(tmp_path, model, read_only=True), ordinary)


def test_when_rows_were_retrieved_lasts_from_checkpoint_to_checkpoint(tmp_path):
    model = tiny.variant("paper")
    with Memory.open(tmp_path, model, eviction="lru") as memory:
        for number in range(5):
            memory.write(tiny.ids(40, number))
        with torch.no_grad():
            model(tiny.prompts(1), memory=memory)
        ids = memory.stores[0].ids(0)
        times = memory.snapshot()[0].access_log.times(0, ids)
        assert len(times.unique()) > 1
        memory.checkpoint()
    again = Memory.open(tmp_path, model)
    assert torch.equal(again.snapshot()[0].access_log.times(0, ids), times)


def test_a_policy_that_needs_other_rows_is_refused(tmp_path):
    Memory.open(tmp_path, MODEL).close()
    with pytest.raises(MemoryMismatchError, match="holds rows without a lifetime, and the policy 'ttl'"):
        Memory.open(tmp_path, MODEL, eviction="ttl")
