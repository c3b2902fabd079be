"""Files that are not what was written: an error that names them, never a crash, never a wrong success."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import MemoryFileError, MPlusError
from mplus.memory import Memory
from mplus.memory.directory.checkpoint_manifest import VERSION
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from tests.conftest import NIGHTLY
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import content, difference, raw

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel(mechanism={"name": "mplus", "merge_every": 2}, long_term_tokens=32)
MUTANTS = 20_000 if NIGHTLY else 500


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A directory with two files of rows, some of them removed, and three records; and what it held after each."""
    folder = tmp_path_factory.mktemp("made") / "memory"
    memory = Memory.open(folder, MODEL)
    for number in range(12):
        memory.write(chunk(number), source="ab"[number % 2])
        if number in {8, 11}:
            memory.checkpoint()
    held = [content(memory)]
    for number in range(3):
        memory.write(chunk(number), source="c")
        held.append(content(memory))
    memory.directory.close()  # as if it had been killed
    return folder, held


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Other bytes than ``data``."""
    place = draw.randrange(len(data))
    if draw.random() < 0.4:  # headers and heads
        place = draw.randrange(min(len(data), 600))
    kind = draw.choice(["flip", "flip", "byte", "cut", "zeros", "insert", "lose", "double", "noise"])
    length = draw.choice([1, 8, 512, draw.randint(1, 2000)])
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind == "byte":
        return data[:place] + draw.randbytes(1) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "zeros":
        return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
    if kind == "insert":
        return data[:place] + draw.randbytes(length) + data[place:]
    if kind == "lose":
        return data[:place] + data[place + length :]
    if kind == "double":
        return data[:place] + data[place : place + length] + data[place:]
    return data[:place] + draw.randbytes(len(data[place : place + length])) + data[place + length :]


def test_mutants(made, tmp_path, record_property):
    folder, held = made[0], made[1]
    path = shutil.copytree(folder, tmp_path / "memory")
    files = sorted(file for file in path.iterdir() if file.name != "lock")
    assert len(files) == 5
    draw = random.Random(1)
    refused = 0
    for mutant in range(MUTANTS):
        file = files[mutant % len(files)]
        original = file.read_bytes()
        changed = mutated(original, draw)
        file.write_bytes(changed)
        try:
            found = content(reopened(path, MODEL))
        except MPlusError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
            if mutant % 10 == 0:
                assert verify(path) != []
        else:
            ends = held if file.name.startswith("journal") else held[-1:]  # its end may be missing, as after a crash
            assert any(difference(found, end) == [] for end in ends)
        file.write_bytes(original)
    record_property("mutants", MUTANTS)
    assert refused > MUTANTS * 0.6
    assert difference(content(reopened(path, MODEL)), held[-1]) == []
    assert verify(path) == []


def test_files_in_each_others_place(made, tmp_path):
    folder, held = made
    path = shutil.copytree(folder, tmp_path / "memory")
    files = sorted(file for file in path.iterdir() if file.name != "lock")
    for one in files:
        for other in files:
            if one is other:
                continue
            kept = one.read_bytes()
            shutil.copyfile(other, one)
            with pytest.raises(MemoryFileError, match=str(path)):
                content(reopened(path, MODEL))
            assert verify(path) != []
            one.write_bytes(kept)
    assert difference(content(reopened(path, MODEL)), held[-1]) == []


def flipped(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 8
    file.write_bytes(data)


def test_verify_reports_all_faults(made, tmp_path):
    path = shutil.copytree(made[0], tmp_path / "memory")
    rows = sorted(path.glob("rows-*"))
    (state,), (journal,) = path.glob("state-*"), path.glob("journal-*")
    for file in rows:
        flipped(file, file.stat().st_size // 2)
    flipped(state, state.stat().st_size // 2)
    flipped(journal, 1000)
    found = verify(path)
    for file in (*rows, state, journal):
        assert any(file.name in fault for fault in found), (file.name, found)


def test_a_damaged_record_in_the_middle_is_an_error_and_the_last_too(made, tmp_path):
    from mplus.memory.directory.journal import records

    (journal,) = made[0].glob("journal-*")
    ends = [end for _, end in records(journal)]
    assert len(ends) == 3
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for place in (begin + 3, begin + 30, (begin + end) // 2):
            path = shutil.copytree(made[0], tmp_path / f"{place}")
            flipped(path / journal.name, place)
            with pytest.raises(MemoryFileError, match=f"record {number} must be what was written"):
                reopened(path, MODEL)


def test_a_newer_version_is_named(made, tmp_path):
    path = shutil.copytree(made[0], tmp_path / "memory")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"version": {VERSION},', f'"version": {VERSION + 1},', 1))
    with pytest.raises(MemoryFileError, match=f"version {VERSION + 1}, this mplus reads up to {VERSION}: upgrade"):
        reopened(path, MODEL)


def of(memory: Memory) -> dict[tuple[str, int], set[bytes]]:
    """All rows by tier and layer."""
    found: dict[tuple[str, int], set[bytes]] = {}
    state, store = memory.states[0], memory.stores[0]
    for layer in range(store.layout.layers):
        tiers = {
            "stm": state.stm[layer],
            "pending": state.pending[layer],
            "ltm": store.gather(layer, store.ids(layer)),
        }
        for tier, rows in tiers.items():
            found[tier, layer] = {bytes(raw(row)) for row in rows.need_hidden()}
    return found


@pytest.mark.parametrize("live", [True, False])
def test_repair_saves_what_is_sound(made, tmp_path, live):
    path = shutil.copytree(made[0], tmp_path / "memory")
    whole = reopened(path, MODEL)
    everything = of(whole)
    if not live:
        path = tmp_path / "saved"
        whole.save(path)
    assert repair(path, tmp_path / "same") == []
    assert difference(content(Memory.load(tmp_path / "same", MODEL)), made[1][-1]) == []
    draw = random.Random(2)
    saved = lost_rows = 0
    files = sorted(file for file in path.iterdir() if file.suffix in {".safetensors", ".bin"})
    for turn in range(200 if NIGHTLY else 24):
        file = files[turn % len(files)]
        original = file.read_bytes()
        flipped(file, draw.randrange(len(original)))
        out = tmp_path / str(turn)
        try:
            lost = repair(path, out)
        except MemoryFileError as error:
            assert file.name in str(error)  # noqa: PT017 - either outcome is right
        else:
            saved += 1
            kept = of(Memory.load(out, MODEL))
            if lost == []:  # the damage is in a row that was removed
                assert kept == everything
                assert verify(path) != []
            if not file.name.startswith("journal"):
                for place, rows in kept.items():
                    assert rows <= everything[place], "nothing but what was there"
            lost_rows += sum(len(everything[place] - rows) for place, rows in kept.items())
        file.write_bytes(original)
    assert saved > 10
    assert lost_rows > 0
    with pytest.raises(MemoryFileError, match="must be empty or not exist yet"):
        repair(path, tmp_path / "same")
