"""A memory as one stream: what goes out comes in, bit for bit; whatever else comes is refused, with nothing taken."""

from __future__ import annotations

import errno
import io
import subprocess
import tarfile
import threading
from typing import Any

import pytest
import torch

from mplus.errors import InputError, LiveMemoryError, MemoryFileError, MemoryFullError, MemoryMismatchError, MPlusError
from mplus.memory import Memory
from mplus.memory.archive.tar import BLOCK, member_head, padding
from mplus.memory.format.verify import verify
from tests.conftest import NIGHTLY
from tests.memory import tiny
from tests.memory.disks.disks import Failing, open_memory
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

MODEL = PlainModel()


def written(memory: Memory, chunks: int = 9) -> Memory:
    for number in range(chunks):
        memory.write([chunk(number), chunk(number + 20)], source=f"{number % 3}")
    return memory


@pytest.fixture(scope="module")
def stream() -> bytes:
    return exported(written(MODEL.new_memory(batch_size=2)))


def exported(memory: Memory) -> bytes:
    out = io.BytesIO()
    assert memory.export(out) == len(out.getvalue())
    return out.getvalue()


def members(stream: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers()}


def packed(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(member_head(name, len(data)) + data + padding(len(data)) for name, data in parts) + bytes(2 * BLOCK)


class Trickling(io.BytesIO):
    """Gives a few bytes at a time, and cannot be searched, as a socket."""

    def read(self, size: int = -1, /) -> bytes:
        return super().read(min(size, 1000))

    def seek(self, *_: Any) -> int:
        raise OSError(errno.ESPIPE, "no")


@pytest.mark.parametrize("config", CONFIGS)
def test_what_goes_out_comes_in(tmp_path, config):
    model = PlainModel(**CONFIGS[config])
    with written(Memory.open(tmp_path / "one", model, batch_size=2)) as memory:
        memory.checkpoint()
        written(memory, 2)  # rows in files, and behind them in memory
        assert memory.export(tmp_path / "anna.mplus") == (tmp_path / "anna.mplus").stat().st_size
        before, stream = content(memory), exported(memory)
        assert (tmp_path / "anna.mplus").read_bytes() == stream == exported(memory), "the same memory, the same bytes"
    with Memory.open(tmp_path / "two", model, batch_size=2) as other:
        assert other.is_empty
        other.import_(tmp_path / "anna.mplus")
        assert difference(content(other), before) == []
        assert difference(content(reopened(tmp_path / "two", model)), before) == [], "on disk when it returns"
        assert not other.is_empty
        assert exported(other) == stream
        other.write([chunk(70), None], source="new")
        assert_same(reopened(tmp_path / "two", model), other)
    names = {file.name for file in (tmp_path / "two").iterdir()}
    assert names == {*other.directory.manifest.files, "manifest.json", "lock"}, "nothing else is left there"
    assert verify(tmp_path / "two") == []
    in_memory = model.new_memory(batch_size=2)
    in_memory.import_(Trickling(stream))
    assert difference(content(in_memory), before) == []


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_a_decoder_reads_what_came_in_as_what_went_out(tmp_path, name):
    model = tiny.variant(name)
    memory = model.new_memory(keep_text=True)
    memory.write(tiny.ids(100), source="a", write_id="once")
    memory.write(tiny.ids(3, 1), source="short")
    with Memory.open(tmp_path, model) as other:
        other.import_(io.BytesIO(exported(memory)))
        assert_same(other, memory)
        assert other.sources() == memory.sources()
        assert other.streams.states[0].tail == memory.streams.states[0].tail or other.sources()[-1].tail_tokens
        other.write(tiny.ids(100), source="a", write_id="once")
        assert_same(other, memory)
        with torch.no_grad():
            assert torch.equal(*(model(tiny.prompts(1), memory=one).logits for one in (memory, other)))
        for one in (memory, other):
            one.write(tiny.ids(40, 7), source="later")
        assert_same(other, memory)


def test_unpacked_by_tar_it_is_a_saved_memory(tmp_path, stream):
    (tmp_path / "anna.mplus").write_bytes(stream)
    subprocess.run(["tar", "xf", "anna.mplus"], cwd=tmp_path, check=True)
    (tmp_path / "anna.mplus").unlink()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    assert verify(tmp_path) == []
    assert exported(Memory.load(tmp_path, MODEL)) == stream


def refused(
    stream: bytes, error: type[Exception] | tuple[type[Exception], ...], match: str | None = None, **options: Any
) -> None:
    """A new memory that is to take ``stream`` stays as it was."""
    memory = MODEL.new_memory(batch_size=2)
    before = content(memory)
    with pytest.raises(error, match=match):
        memory.import_(io.BytesIO(stream), **options)
    assert difference(content(memory), before) == []
    assert memory.version == 0


def test_garbage_and_parts_are_refused(stream):
    for garbage in (b"", b"\0" * 4096, b"x" * 4096, b"\x1f\x8b" + b"x" * 4096, stream[:100]):
        refused(garbage, MemoryFileError, "must be a memory that Memory.export wrote")
    for size in (BLOCK, BLOCK + 7, len(stream) // 2, len(stream) - 2 * BLOCK, len(stream) - 1):
        refused(stream[:size], MemoryFileError, "cut off|in a tar")
    refused(stream + b"\0", MemoryFileError, "nothing behind the last file")
    refused(stream + stream, MemoryFileError, "nothing behind the last file")


def test_a_flipped_byte_is_refused_wherever_it_is(stream):
    places = [*range(0, len(stream), 997), *range(0, BLOCK, 31), *range(len(stream) - 3 * BLOCK, len(stream), 61)]
    for place in places:
        altered = bytearray(stream)
        altered[place] ^= 1 << place % 8
        refused(bytes(altered), MemoryFileError)


def test_other_members_are_refused(stream):
    parts = list(members(stream).items())
    assert packed(*parts) == stream
    (rows, data), manifest, sums = parts
    size = len(data)
    for name in ("../" + rows, "/" + rows, "a/" + rows, rows + "/..", "other", "..", "manifest.json"):
        refused(packed((name, data), manifest, sums), MemoryFileError, "there must be a file like|as it was written")
    refused(packed((rows, data), sums, manifest), MemoryFileError, "there must be a file like 'manifest")
    refused(packed((rows, data), manifest, manifest, sums), MemoryFileError, "there must be a file like 'SHA256SUMS'")
    refused(packed((rows, data[:-1] + b"x"), manifest, sums), MemoryFileError, "must have the digests")
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        b"L",
        b"x",
        b"S",
    ):
        info = tarfile.TarInfo(rows)
        info.type, info.linkname, info.size = kind, "/etc/passwd", size
        refused(info.tobuf(tarfile.GNU_FORMAT) + stream[BLOCK:], MemoryFileError, "must be plain files, got")


def test_bombs_are_refused_before_anything_is_read(stream):
    rows = next(iter(members(stream)))
    refused(member_head(rows, 2**60), MemoryFullError, "bytes free")
    refused(member_head(rows, 2**40), MemoryFullError, "at most max_bytes, .* nothing was taken", max_bytes=2**20)
    refused(stream, MemoryFullError, "at most max_bytes", max_bytes=len(stream) - 1)
    refused(stream, MemoryFullError, "at most max_bytes", max_bytes=0)
    memory = MODEL.new_memory(batch_size=2)
    memory.import_(io.BytesIO(stream), max_bytes=len(stream))
    data = members(stream)[rows]
    refused(
        packed((rows, data))[: -2 * BLOCK] + member_head("manifest.json", 2**26), MemoryFileError, "must have at most"
    )


def test_another_memory_is_refused(stream):
    for model in (PlainModel(mechanism={"name": "mplus", "merge_every": 3}), tiny.variant("paper")):
        refused(exported(model.new_memory(batch_size=2)), MemoryMismatchError, "the stream must be loaded by the model")
    refused(exported(MODEL.new_memory()), MemoryMismatchError, "must have the batch size of the memory, 2, got 1")


def test_a_memory_with_content_is_not_overwritten(tmp_path, stream):
    with written(open_memory(tmp_path, MODEL, batch_size=2), 2) as memory:
        before = content(memory)
        with pytest.raises(InputError, match="into an empty one, and this one has content"):
            memory.import_(io.BytesIO(stream))
        assert difference(content(memory), before) == []
        memory.reset()
        memory.import_(io.BytesIO(stream))
        with pytest.raises(LiveMemoryError, match="read_only=True"):
            reopened(tmp_path, MODEL).import_(io.BytesIO(stream))


def test_wrong_arguments(tmp_path, stream):
    memory = MODEL.new_memory(batch_size=2)
    for file in (None, 3, [stream]):
        with pytest.raises(InputError, match="file must be a path or a binary file"):
            memory.import_(file)
        with pytest.raises(InputError, match="file must be a path or a binary file"):
            memory.export(file)
    with pytest.raises(InputError, match="open it with 'rb'"):
        memory.import_(io.StringIO("text"))
    for limit in (-1, 1.5, True, "1GB"):
        with pytest.raises(InputError, match="max_bytes must be"):
            memory.import_(io.BytesIO(stream), max_bytes=limit)
    with pytest.raises(MemoryFileError, match="must be a readable file"):
        memory.import_(tmp_path / "nowhere")
    with pytest.raises(MemoryFileError):
        memory.export(tmp_path / "nowhere" / "anna.mplus")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MemoryFileError):
        memory.export(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "no temporary file is left"


def test_whatever_fails_leaves_it_empty_or_whole(tmp_path, stream):
    files = Failing()
    memory = open_memory(tmp_path / "0", MODEL, batch_size=2, files=files)
    before = content(memory)
    files.fail(10**9, lasting=False, late=False)
    memory.import_(io.BytesIO(stream))
    after, calls = content(memory), files.calls
    memory.close()
    for place, at in enumerate(range(1, calls + 1, 1 if NIGHTLY else 2)):
        path, files = tmp_path / str(at), Failing()
        memory = open_memory(path, MODEL, batch_size=2, files=files)
        files.fail(at, lasting=place % 2 == 0, late=place % 3 == 0)
        raised = True
        try:
            memory.import_(io.BytesIO(stream))
            raised = False
        except MPlusError:
            pass
        assert files.failed
        held, on_disk = content(memory), content(reopened(path))
        assert difference(held, before) == [] or difference(held, after) == []
        assert raised or difference(held, after) == []
        if memory.directory.failed is None:
            assert difference(on_disk, held) == []
        files.heal()
        memory.directory.close()
        with Memory.open(path, MODEL) as again:
            assert difference(content(again), before) == [] or difference(content(again), after) == []
            if again.is_empty:
                again.import_(io.BytesIO(stream))
            assert difference(content(again), after) == []
        names = {file.name for file in path.iterdir()}
        assert names == {*again.directory.manifest.files, "manifest.json", "lock"}


def test_an_export_is_a_snapshot_beside_a_writer(tmp_path):
    with written(Memory.open(tmp_path, MODEL, batch_size=2)) as memory:
        memory.checkpoint()
        before = exported(memory)
        out, reached, go_on = io.BytesIO(), threading.Event(), threading.Event()

        class Slow:
            def write(self, data: bytes) -> int:
                reached.set()
                assert go_on.wait(60)
                return out.write(data)

        thread = threading.Thread(target=memory.export, args=[Slow()])
        thread.start()
        assert reached.wait(60)
        memory.write([chunk(50), chunk(51)], source="meanwhile")
        memory.forget("1")
        memory.checkpoint()
        go_on.set()
        thread.join()
        assert out.getvalue() == before != exported(memory)
