"""``MmapStore`` when nearly everything is in files, and what is particular to it."""

from __future__ import annotations

import gc

import attrs
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from mplus.errors import ConfigError, MemoryFileError, NotSupported
from mplus.stores.disk.block_file import BlockFile, write_blocks
from mplus.stores.disk.checksums import FIRST, PRESENT, WIDE, WeightedSums
from mplus.stores.disk.compaction import files_of
from mplus.stores.disk.files import FileSystem
from mplus.stores.disk.safetensors_io import Part
from mplus.stores.disk.segment_source import FileLayer
from mplus.stores.disk.segments import RowSegment, SegmentedRows
from mplus.stores.mmap import MmapStore
from mplus.testing.drawing import draw_rows
from mplus.testing.store_model import LAYOUT, StoreMachine
from mplus.testing.stores import StoreConformance
from mplus.testing.strategies import CONFORMANCE
from tests.conftest import NIGHTLY


class TestMostlyInFiles(StoreConformance):
    """The conformance suite with so little room in memory that rows move to files all the time."""

    implementation = MmapStore

    def make(self, layout):
        return MmapStore(layout, MmapStore.Options(bytes_in_memory=150))

    def test_follows_a_model_through_any_sequence_of_changes(self):
        suite = self

        class Machine(StoreMachine):
            def __init__(self) -> None:
                super().__init__(suite.make, suite.check_layer)

        examples = {} if NIGHTLY else {"max_examples": 5}
        run_state_machine_as_test(Machine, settings=settings(CONFORMANCE, stateful_step_count=40, **examples))


def test_rows_are_in_files_and_few_of_them(tmp_path):
    store = MmapStore(LAYOUT, MmapStore.Options(directory=str(tmp_path / "new" / "folder"), bytes_in_memory=1000))
    for number in range(200):
        store.append(number % 2, draw_rows(LAYOUT, 5, number))
    assert store.bytes_in_memory <= 1000
    assert 1 <= len(files_of(store.layers)) <= 9  # about log2 of how often rows were moved
    assert len(list((tmp_path / "new" / "folder").iterdir())) == len(files_of(store.layers))
    chunks = store.chunks(0, "key")
    assert torch.equal(torch.cat([chunk.columns["key"] for chunk in chunks]), store.keys(0))
    expected = torch.cat([draw_rows(LAYOUT, 5, number).key for number in range(0, 200, 2)])
    assert torch.equal(store.keys(0), expected)


def test_a_row_is_written_a_few_times_only(tmp_path, monkeypatch):
    written = []
    compact = MmapStore._spill.__globals__["compact"]

    def counting(*arguments, **options):
        layers, entry = compact(*arguments, **options)
        written.append(entry.bytes)
        return layers, entry

    monkeypatch.setitem(MmapStore._spill.__globals__, "compact", counting)
    layout = attrs.evolve(LAYOUT, hidden_size=256)
    store = MmapStore(layout, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=20_000))
    for number in range(256):
        store.append(0, draw_rows(layout, 16, number))
    assert sum(written) / (256 * 16 * layout.row_bytes) < 9


def test_files_go_with_the_last_who_looks_at_them(tmp_path):
    store = MmapStore(LAYOUT, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=100))
    ids = store.append(0, draw_rows(LAYOUT, 20, 1))
    view = store.snapshot()
    del store
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(view.gather(0, ids).hidden, draw_rows(LAYOUT, 20, 1).hidden)
    del view
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_room_is_given_back_when_most_of_a_file_was_removed(tmp_path):
    store = MmapStore(LAYOUT, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=4000))
    ids = torch.cat([store.append(0, draw_rows(LAYOUT, 50, number)) for number in range(20)])
    full = store.nbytes
    store.remove(0, ids[::2])
    store.remove(0, ids[1:900:2])
    for number in range(4):
        store.append(1, draw_rows(LAYOUT, 50, number))
    gc.collect()
    assert store.nbytes < full / 2
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < full


def altered(file, name, place):
    """Change a bit in a file that is mapped; the mapping shows it: the page was never written to."""
    with file.path.open("r+b") as opened:
        opened.seek(file._begin + file.span(name).begin + place)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 4]))


WIDE_ROWS = attrs.evolve(LAYOUT, hidden_size=WIDE // 4)
"""A row of ``hidden`` is a block."""


def test_a_block_is_checked_when_it_is_first_read_and_once(tmp_path, monkeypatch):
    store = MmapStore(WIDE_ROWS, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=1000))
    ids, rows = store.append(0, draw_rows(WIDE_ROWS, 10, 1)), draw_rows(WIDE_ROWS, 10, 1).hidden
    (file,) = files_of(store.layers)
    altered(file, "0.hidden", 6 * WIDE + 17)
    sound = torch.tensor([0, 5, 7, 9])
    assert torch.equal(store.gather(0, ids[sound]).hidden, rows[sound])
    with pytest.raises(MemoryFileError, match=r"rows-.*tensor '0.hidden' .* rows 6 to 6"):
        store.gather(0, ids)
    with pytest.raises(MemoryFileError, match=r"rows-.*tensor '0.hidden' .* rows 6 to 6"):
        store.gather(0, ids[6:7])
    with pytest.raises(MemoryFileError, match=r"0\.hidden"):
        store.locate(0, "hidden", ids[5:8])
    with pytest.raises(MemoryFileError, match=r"0\.hidden"):
        store.chunks(0, "hidden")
    assert list(file.damaged()) == [("0.hidden", 6 * WIDE, 7 * WIDE)]
    assert file.sound_rows("0.hidden").tolist() == [row != 6 for row in range(10)]
    checked, of = [], WeightedSums.of
    monkeypatch.setattr(WeightedSums, "of", lambda kind, data: checked.append(data.clone()) or of(kind, data))
    store.gather(0, ids[sound])
    assert checked == []
    store.gather(0, ids[:5])
    assert [data.tolist() for data in checked] == [rows[:5].view(torch.uint8).flatten().tolist()]
    store.gather(0, ids[:6])
    assert len(checked) == 1


@pytest.mark.parametrize(("width", "block", "spoiled"), [(257, 2056, range(8, 10)), (77, 2**16, range(212, 426))])
def test_rows_that_share_blocks_are_checked_with_these(tmp_path, monkeypatch, width, block, spoiled):
    """Two of 1,028 bytes in a block of whole words; narrow ones in a block of 64 KiB, which cuts through two."""
    monkeypatch.setattr("mplus.stores.disk.verified.AT_A_TIME", 4096)  # above that, only what is read is checked
    layout, count = attrs.evolve(LAYOUT, hidden_size=width), spoiled.stop + 1
    store = MmapStore(layout, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=1000))
    ids, rows = store.append(0, draw_rows(layout, count, 1)), draw_rows(layout, count, 1).hidden
    (file,) = files_of(store.layers)
    assert file.tensor("0.hidden").block_bytes == block
    place = spoiled.start * width * 4 + width * 4 // 2 + width * 2 + 4
    altered(file, "0.hidden", place)
    assert torch.equal(store.gather(0, ids[: spoiled.start]).hidden, rows[: spoiled.start])
    altered(file, "0.hidden", count * width * 4 - 1)  # in the last block, which is shorter
    with pytest.raises(MemoryFileError, match=rf"to {count - 1}: it was altered"):
        store.gather(0, ids[-1:])
    altered(file, "0.hidden", count * width * 4 - 1)
    assert torch.equal(store.gather(0, ids[-1:]).hidden, rows[-1:])
    for row in (spoiled.start, spoiled.stop - 1):
        with pytest.raises(MemoryFileError, match=rf"rows {spoiled.start} to {spoiled.stop - 1}"):
            store.gather(0, ids[[2, row]])
    altered(file, "0.hidden", place)
    assert torch.equal(store.gather(0, ids.flip(0)).hidden, rows.flip(0))
    altered(file, "0.hidden", place)  # nobody looks again
    store.gather(0, ids)
    assert [begin for _, begin, _ in file.damaged()] == [place // block * block]
    assert file.sound_rows("0.hidden").logical_not().nonzero().flatten().tolist() == list(spoiled)


@pytest.mark.parametrize("altered_file", [0, 1, 2])
def test_a_read_from_files_of_both_formats_and_from_memory(tmp_path, altered_file):
    """Each row is checked as its own file says; rows in memory not at all."""
    layout = attrs.evolve(LAYOUT, hidden_size=2048)  # a row is a block in both formats
    store, chunks = MmapStore(layout), [draw_rows(layout, 5, number) for number in range(4)]
    runs = []
    for number, scheme in enumerate((PRESENT, FIRST, PRESENT)):
        columns = {"id": torch.arange(5 * number, 5 * number + 5), **chunks[number].columns()}
        parts = [Part.whole(f"0.{name}", column) for name, column in columns.items()]
        path = tmp_path / f"{number}.safetensors"
        file = BlockFile(path, write_blocks(FileSystem(), path, parts, scheme=scheme))
        runs.append(RowSegment(FileLayer(file, 0), 0, 5, None, 5))
    store.layers, store.next_ids[0] = (SegmentedRows(layout, tuple(runs)), *store.layers[1:]), 15
    store.append(0, chunks[3])
    altered(files_of(store.layers)[altered_file], "0.hidden", 3 * 8192 + 9)
    whole, ids = torch.cat([chunk.hidden for chunk in chunks]), store.ids(0)
    with pytest.raises(MemoryFileError, match=rf"{altered_file}.safetensors.* rows 3 to 3"):
        store.gather(0, ids)
    altered(files_of(store.layers)[altered_file], "0.hidden", 3 * 8192 + 9)
    assert torch.equal(store.gather(0, ids[2:17]).hidden, whole[2:17])
    assert torch.equal(store.gather(0, ids.flip(0)).hidden, whole.flip(0))


@pytest.mark.parametrize("rows", [0, 1, 3, 700])
def test_block_files_are_safetensors_that_others_read(tmp_path, rows):
    from safetensors.torch import load_file

    store = MmapStore(LAYOUT, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=1))
    store.append(1, draw_rows(LAYOUT, rows + 1, 1))
    store.append(1, draw_rows(LAYOUT, rows, 2))
    tensors = load_file(files_of(store.layers)[0].path)
    assert torch.equal(tensors["1.key"][: rows + 1], draw_rows(LAYOUT, rows + 1, 1).key)


def test_wide_rows_start_where_pages_do(tmp_path):
    """So that a row of 4 KiB costs one page and not two; whatever else is in the file starts at its own item size."""
    layout = attrs.evolve(LAYOUT, hidden_size=1024, key_size=3)
    store = MmapStore(layout, MmapStore.Options(directory=str(tmp_path), bytes_in_memory=1))
    store.append(1, draw_rows(layout, 7, 1))
    (file,) = files_of(store.layers)
    assert file.unchecked("1.hidden").data_ptr() % 4096 == 0
    for name in file.spans:
        tensor = file.unchecked(name)
        assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_options_and_devices():
    with pytest.raises(ConfigError, match="bytes_in_memory must be a whole number of at least 1, got 0"):
        MmapStore.Options(bytes_in_memory=0)
    with pytest.raises(NotSupported, match="keeps rows on the CPU, got device meta"):
        MmapStore(attrs.evolve(LAYOUT, device=torch.device("meta")))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = MmapStore(LAYOUT, MmapStore.Options(directory=str(tmp_path / "file"), bytes_in_memory=1))
    with pytest.raises(ConfigError, match=r"directory must be a folder .*file"):
        store.append(0, draw_rows(LAYOUT, 3, 1))


def test_rows_are_located_where_they_lie():
    store = MmapStore(LAYOUT, MmapStore.Options(bytes_in_memory=2000))
    ids = torch.cat([store.append(0, draw_rows(LAYOUT, 5, number)) for number in range(30)])
    store.remove(0, ids[3:50:4])
    assert len(store.layers[0].segments) > 2
    wanted = store.ids(0)[torch.randperm(store.count(0), generator=torch.Generator().manual_seed(0))]
    column, places = store.locate(0, "hidden", wanted).contiguous()
    assert torch.equal(column[places], store.gather(0, wanted).hidden)
    with pytest.raises(KeyError, match=str(int(ids[3]))):
        store.locate(0, "hidden", ids[:5])
