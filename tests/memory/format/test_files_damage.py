"""Files that are not what was saved are refused by name, never read as something else; a save is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mplus
from mplus.errors import MemoryFileError, MemoryMismatchError, UnknownNameError
from mplus.memory.format import manifest as manifests
from mplus.memory.format.verify import verify
from tests.memory import tiny
from tests.memory.interruption import copies_on_the_way, interrupted_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.written("published", [140, 30]).save(folder)
    return folder


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    return tiny.content(tiny.written("published", [140, 30]))


def load(folder: Path, name: str = "published") -> mplus.Memory:
    return mplus.Memory.load(folder, tiny.variant(name))


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("rows-*.safetensors")
    return file


def check_refused_or_equal(folder: Path, original: dict[str, Any]) -> None:
    try:
        memory = load(folder)
    except MemoryFileError as error:
        assert str(folder) in str(error)  # noqa: PT017 - either outcome is right
        assert verify(folder) != []
    else:
        tiny.assert_content(memory, original)


@st.composite
def damages(draw: st.DrawFn, size: int, header: int) -> tuple[str, int, int]:
    place = draw(st.one_of(st.integers(0, size - 1), st.integers(0, header - 1)))
    return draw(st.sampled_from(["cut", "flip", "flip", "flip"])), place, draw(st.integers(1, 255))


@pytest.mark.parametrize("which", ["manifest", "rows"])
@given(data=st.data())
@settings(max_examples=max(150, settings().max_examples))
def test_any_damage_is_found(which: str, data: st.DataObject, saved: Path, original: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        damage(folder, which, data)
        check_refused_or_equal(folder, original)
        if which == "rows":
            assert verify(folder) != [], "the checksum of the file covers every byte"


def damage(folder: Path, which: str, data: st.DataObject) -> None:
    file = data_file(folder) if which == "rows" else folder / manifests.MANIFEST
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if which == "rows" else len(content)
    kind, place, mask = data.draw(damages(len(content), header))
    if kind == "cut":
        del content[place:]
    else:
        content[place] ^= mask
    file.write_bytes(content)


def test_each_fault_is_named(saved: Path, tmp_path: Path) -> None:
    """Where, what, the rule and the value."""

    def broken(change: Callable[[Path], None]) -> str:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        change(folder)
        with pytest.raises(MemoryFileError) as caught:
            load(folder)
        return str(caught.value)

    def flip_last_byte(folder: Path) -> None:
        content = bytearray(data_file(folder).read_bytes())
        content[-1] ^= 1
        data_file(folder).write_bytes(content)

    size = data_file(saved).stat().st_size
    assert "manifest.json is missing" in broken(lambda folder: (folder / "manifest.json").unlink())
    assert "readable file, got No such file" in broken(lambda folder: data_file(folder).unlink())
    assert f"must have {size} bytes, got {size - 1}: it is truncated" in broken(
        lambda f: os.truncate(data_file(f), size - 1)
    )
    message = broken(flip_last_byte)
    assert "tensor 'stream.1.generator' must have the SHA-256" in message
    assert data_file(saved).name in message
    assert "truncated, altered or foreign" in broken(lambda folder: os.truncate(folder / "manifest.json", 100))
    assert "is missing" in broken(shutil.rmtree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "was written by format version 4, this mplus reads up to 3: upgrade mplus"),
        ({"version": 0}, "must have a format version of at least 1, got 0"),
        ({"version": True}, "must have a format version of at least 1, got True"),
        ({"format": "pickle"}, "must have format 'mplus-memory', got format 'pickle': this is not a saved memory"),
        ({"format": None}, "this is not a saved memory"),
        ({"written_by": "somebody"}, "was altered after it was saved"),
        ({"digest": "0"}, "its digest must be 0, got"),
    ],
    ids=str,
)
def test_other_manifests(change: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda plain: plain.update(change), seal=False)
    with pytest.raises(MemoryFileError, match=message):
        load(tmp_path)
    assert message in verify(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{}", "{", "\xff", "[" * 100_000], ids=repr)
def test_foreign_manifests(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(MemoryFileError, match=str(tmp_path)):
        load(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> None:
    """Change a manifest by hand; ``seal`` makes its digest fit again."""
    file = folder / "manifest.json"
    plain = json.loads(file.read_text())
    change(plain)
    if seal:
        plain["digest"] = manifests._digest(plain)
    file.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("streams"),
        lambda plain: plain["streams"].clear(),
        lambda plain: plain["streams"][0]["rows"].update(stm=[12, 12]),
        lambda plain: plain["streams"][0]["rows"].update(stm=[12, 12, 11]),
        lambda plain: plain["streams"][0]["rows"].update(pending=[-1, 0, 0]),
        lambda plain: plain["streams"][0]["rows"].update(others=[1, 1, 1]),
        lambda plain: plain["streams"][0]["rows"].pop("pending"),
        lambda plain: plain["streams"][1].update(store=5),
        lambda plain: plain["streams"][1].update(sources=7),
        lambda plain: plain["streams"][1].update(sources=1),
        lambda plain: plain["streams"][1].update(next_source=1),
        lambda plain: plain["data"].update(file="../elsewhere.safetensors"),
        lambda plain: plain["data"]["tensors"].pop("stream.0.rows.stm.0.hidden"),
        lambda plain: plain["data"]["tensors"].pop("store.0.2.key"),
        lambda plain: plain["data"]["tensors"].pop("stream.0.generator"),
        lambda plain: plain["data"]["tensors"]["store.0.2.key"].update(dtype="complex64"),
        lambda plain: plain["data"]["tensors"]["store.0.2.key"].update(shape=[8, 36]),
    ],
)
def test_a_manifest_forged_by_hand_is_still_refused(
    change: Callable[[dict[str, Any]], None], saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, change)
    with pytest.raises(MemoryFileError, match=str(tmp_path)):
        load(tmp_path)
    assert verify(tmp_path) != []


def test_verify_looks_at_the_values(saved: Path, tmp_path: Path) -> None:
    memory = tiny.written("paper", [140])
    hidden = memory.states[0].stm[1].hidden.clone()
    hidden[3, 5] = torch.nan
    broken = memory.states[0].stm[1].replace(hidden=hidden, source=torch.full((12,), 9))
    object.__setattr__(memory.states[0], "stm", (memory.states[0].stm[0], broken, memory.states[0].stm[2]))
    object.__setattr__(memory.states[0], "clock", 50)
    memory.save(tmp_path)
    faults = verify(tmp_path)
    stm = "stream.0.rows.stm"
    assert any(f"{stm}.1 must have finite values in 'hidden', 1 of its 12 rows" in fault for fault in faults)
    assert any(f"{stm}.1 must have sources that the stream has, 12 of its 12 rows" in fault for fault in faults)
    assert any(f"{stm}.2 must have births below the clock, 50" in fault for fault in faults)


# ---------------------------------------------------------------------- whose memory it is


def differing(message: str) -> set[str]:
    """Names of the facts that a MemoryMismatchError lists."""
    return {part.split(" is ")[0] for part in message.split(", but ")[1].split("; ")}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"seed": 1}, {"base", "adapters", "additions"}),
        ({"short_term_tokens": 13}, {"short_term_tokens"}),
        ({"memory_tokens_per_chunk": 5}, {"memory_tokens_per_chunk"}),
        ({"variant": "published"}, {"variant", "retriever.score"}),
        ({"mechanism": "memoryllm"}, {"mechanism", "key_size", "retriever.score", "additions"}),
        ({"retriever": {"name": "linear", "width": 9}}, {"key_size", "additions"}),
        ({"retriever": {"name": "linear", "width": 8, "score": "sigmoid_mean"}}, {"retriever.score"}),
        ({"adapters": {"rank": 3}}, {"adapters"}),
        ({"adapters": None}, {"adapters"}),
        ({"dtype": torch.bfloat16}, {"dtype", "base", "adapters", "additions"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_memory_of_another_model(change: dict[str, Any], facts: set[str], tmp_path: Path) -> None:
    tiny.written("paper", [40]).save(tmp_path)
    with pytest.raises(MemoryMismatchError, match=str(tmp_path)) as caught:
        mplus.Memory.load(tmp_path, tiny.build(**change))
    named = differing(str(caught.value))
    # Random parameters are drawn one after the other, so that of another size changes those behind it.
    assert facts <= named <= facts | {"adapters", "additions"}
    for name, value in change.items():
        if name in {"short_term_tokens", "memory_tokens_per_chunk"}:
            assert f"{name} is {tiny.SIZES[name]} in the file and {value} in the model" in str(caught.value)


def test_memory_of_a_changed_adapter_and_of_another_dtype(tmp_path: Path) -> None:
    model = tiny.build()
    memory = model.new_memory()
    memory.write(tiny.ids(40))
    memory.save(tmp_path / "a")
    memory.to(dtype=torch.float16).save(tmp_path / "b")
    with pytest.raises(
        MemoryMismatchError, match="dtype is 'float16' in the file and 'float32' in the model"
    ) as caught:
        mplus.Memory.load(tmp_path / "b", model)
    assert differing(str(caught.value)) == {"dtype"}
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_B.read" in name)[0, 0] += 1e-3
    with pytest.raises(MemoryMismatchError) as caught:
        mplus.Memory.load(tmp_path / "a", model)
    assert differing(str(caught.value)) == {"adapters"}


def test_what_load_is_given(saved: Path) -> None:
    with pytest.raises(MemoryMismatchError, match=r"wrapped by mplus\.wrap, got Linear"):
        mplus.Memory.load(saved, torch.nn.Linear(1, 1))
    with pytest.raises(UnknownNameError, match="ram"):
        mplus.Memory.load(saved, tiny.variant("published"), store="rma")


# ---------------------------------------------------------------------- places that cannot be written


def test_places_that_hold_something_else(tmp_path: Path) -> None:
    memory = tiny.written("paper", [20])
    file, photos, foreign = tmp_path / "file", tmp_path / "photos", tmp_path / "foreign"
    file.write_text("mine")
    photos.mkdir()
    (photos / "cat.jpg").write_text("mine")
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a browser extension"}')
    for place, message in (
        (file, "must be a folder, or not exist yet, to save a memory in; it is a file"),
        (file / "below", "must be a folder that can be written, got Not a directory"),
        (photos, "must be empty or hold a saved memory, got a folder with 'cat.jpg'"),
        (foreign, "got a folder with 'manifest.json'"),
    ):
        with pytest.raises(MemoryFileError, match=message) as caught:
            memory.save(place)
        assert str(place) in str(caught.value)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["file", "foreign", "foreign/manifest.json", "photos", "photos/cat.jpg"]
    assert file.read_text() == (photos / "cat.jpg").read_text() == "mine"


@pytest.mark.parametrize("operation", ["os.fsync", "os.replace", "os.open", "pathlib.Path.mkdir"])
def test_what_the_system_refuses(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, function = operation.rpartition(".")
    allowed = getattr(pathlib.Path if module == "pathlib.Path" else os, function)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if function == "open" and not args[1] & os.O_CREAT:  # reading is still possible
            return allowed(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old, new = tiny.written("paper", [40]), tiny.written("paper", [60])
    folder = tmp_path / "new" / "folder"
    if operation != "pathlib.Path.mkdir":
        folder = tmp_path
        old.save(folder)
    before = sorted(folder.iterdir()) if folder.exists() else []
    with monkeypatch.context() as patch:
        patch.setattr(operation, refuse)
        with pytest.raises(
            MemoryFileError, match=r"can be written, got No space left on device.*: choose another path"
        ):
            new.save(folder)
    assert (sorted(folder.iterdir()) if folder.exists() else []) == before
    if before:
        tiny.assert_same(load(folder, "paper"), old)
    new.save(folder)
    tiny.assert_same(load(folder, "paper"), new)


# ---------------------------------------------------------------------- whole or not there


def test_a_crash_at_any_moment_leaves_the_old_or_the_new_memory(tmp_path: Path) -> None:
    """The folder as it was at every step of a save on top of an older one, loaded as after a crash there."""
    old, new = tiny.written("paper", [60]), tiny.written("paper", [140])
    folder = tmp_path / "memory"
    old.save(folder)
    states = copies_on_the_way(lambda: new.save(folder), folder, tmp_path / "copies")
    found = [difference_to(load(state, "paper"), old, new) for state in states]
    assert {"old", "new"} == set(found)
    assert found == sorted(found, reverse=True), "first the old one, then the new one"
    for state in states:
        new.save(state)
        assert len(list(state.iterdir())) == 2, "what the crash left is cleared away"
        tiny.assert_same(load(state, "paper"), new)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.nightly  # where a signal strikes differs from run to run, also inside other packages
def test_an_interrupt_at_any_moment_leaves_the_old_or_the_new_memory(tmp_path: Path) -> None:
    old, new = tiny.written("paper", [20]), tiny.written("paper", [30])
    found = set()

    def prepare() -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        old.save(tmp_path)

    for _ in interrupted_by_signals(prepare, lambda: new.save(tmp_path), 60):
        found.add(difference_to(load(tmp_path, "paper"), old, new))
        new.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        tiny.assert_same(load(tmp_path, "paper"), new)
    assert found, "some signals struck in time"


def difference_to(memory: mplus.Memory, old: mplus.Memory, new: mplus.Memory) -> str:
    content = tiny.content(memory)
    same = {name: not tiny.difference(content, tiny.content(one)) for name, one in (("old", old), ("new", new))}
    (which,) = [name for name, equal in same.items() if equal]
    return which


def test_saves_and_loads_at_the_same_time(tmp_path: Path) -> None:
    memories = [tiny.written("paper", [40], seed) for seed in (1, 2)]
    contents = [tiny.content(memory) for memory in memories]
    memories[0].save(tmp_path)
    errors: list[BaseException] = []

    def often(work: Callable[[], None]) -> None:
        try:
            for _ in range(12):
                work()
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    def read() -> None:
        content = tiny.content(load(tmp_path, "paper"))
        assert any(not tiny.difference(content, one) for one in contents)

    work = [*(lambda memory=memory: memory.save(tmp_path) for memory in memories), read, read]
    threads = [threading.Thread(target=often, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(tmp_path.iterdir())) == 2
