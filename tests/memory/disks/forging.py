"""Files that were altered by somebody who made every checksum right again, and all that is done with such files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, define, field
from safetensors.torch import load_file

from mplus.cli import memory as cli
from mplus.errors import MPlusError
from mplus.memory import Memory
from mplus.memory.archive.tar import END, SUMS, member_head, padding, sums_of
from mplus.memory.directory.journal import Journal, records
from mplus.memory.format.manifest import LIVE_FORMAT, _digest, is_memory
from mplus.memory.format.offline import forget_saved
from mplus.memory.format.repair import repair
from mplus.memory.format.structure import unstructured
from mplus.memory.format.tensors import write_tensors
from mplus.memory.format.verify import verify
from mplus.stores.disk.block_file import BlockFile, FileEntry, write_blocks
from mplus.stores.disk.files import FileSystem, Folder
from mplus.stores.disk.safetensors_io import Part, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

Tensors = dict[str, "Tensor"]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest as plain data."""
    plain: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return plain


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` alter the manifest in place."""
    plain = manifest_of(folder)
    change(plain)
    plain["digest"] = _digest(plain)
    (folder / "manifest.json").write_text(json.dumps(plain), encoding="utf-8")


def data_of(folder: Path) -> Tensors:
    """The tensors of a saved memory."""
    return load_file(folder / manifest_of(folder)["data"]["file"])


def forge_data(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Let ``change`` alter the tensors of a saved memory in place."""
    before, tensors = manifest_of(folder)["data"]["file"], data_of(folder)
    change(tensors)
    with (folder / "new").open("wb") as file:
        digest, entries = write_tensors(file, [Part.whole(name, tensor) for name, tensor in tensors.items()])
        size = file.tell()
    (folder / before).unlink()
    name = f"rows-{digest[:32]}.safetensors"
    (folder / "new").rename(folder / name)
    described = {
        "file": name, "bytes": size, "sha256": digest,
        "tensors": {name: unstructured(entry) for name, entry in entries.items()},
    }  # fmt: skip
    forge_manifest(folder, lambda plain: plain.update(data=described))


def blocks_of(folder: Path, entry: dict[str, Any]) -> Tensors:
    """The tensors of a block file that a manifest names."""
    file = BlockFile(folder / entry["file"], FileEntry(**entry))
    return {name: file.unchecked(name).clone() for name in file.spans}


def forge_blocks(
    folder: Path, which: Callable[[dict[str, Any]], dict[str, Any]], change: Callable[[Tensors], object]
) -> None:
    """Let ``change`` alter the tensors of the block file that ``which`` finds in a manifest, in place."""
    entry = which(manifest_of(folder))
    tensors = blocks_of(folder, entry)
    change(tensors)
    (folder / entry["file"]).unlink()
    parts = [Part.whole(name, tensor) for name, tensor in tensors.items()]
    written = write_blocks(FileSystem(), folder / entry["file"], parts, sync=False)
    forge_manifest(folder, lambda plain: which(plain).update(asdict(written)))


def forge_state(folder: Path, change: Callable[[Tensors], object]) -> None:
    """``forge_blocks`` of the state file of a directory."""
    forge_blocks(folder, lambda plain: plain["state"], change)


def forge_rows(folder: Path, change: Callable[[Tensors], object], stream: int = 0, place: int = 0) -> None:
    """``forge_blocks`` of a file of long-term rows."""
    forge_blocks(folder, lambda plain: plain["stores"][stream]["files"][place], change)


def journal_of(folder: Path) -> list[bytes]:
    """The payloads in the journal of a directory."""
    return [bytes(payload) for payload, _ in records(folder / manifest_of(folder)["journal"])]


def forge_payloads(folder: Path, change: Callable[[list[bytes]], object]) -> None:
    """Let ``change`` alter the payloads of the journal in place."""
    payloads = journal_of(folder)
    change(payloads)
    path = folder / manifest_of(folder)["journal"]
    path.unlink()
    held = Folder.open(folder)
    journal = Journal.create(FileSystem(), held / path.name)
    for payload in payloads:
        journal.append([payload])
    journal.close()
    held.close()


def forge_record(folder: Path, number: int, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Let ``change`` alter the tensors and the facts of one record of the journal in place."""

    def altered(payloads: list[bytes]) -> None:
        tensors, metadata = unpack(payloads[number])
        facts = json.loads(metadata["change"])
        change(tensors, facts)
        payloads[number] = b"".join(bytes(piece) for piece in pack(tensors, {"change": json.dumps(facts)}))

    forge_payloads(folder, altered)


def fingerprint_of(folder: Path) -> dict[str, str]:
    """A digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------- what is done with a folder


@define
class Outcome:
    """What came of everything that can be done with a folder.

    Attributes:
        raw: errors that are none of mplus' own, by what was done.
        refused: mplus' own, likewise.
        faults: what ``verify`` says.
    """

    raw: dict[str, BaseException] = field(factory=dict)
    refused: dict[str, MPlusError] = field(factory=dict)
    faults: list[str] = field(factory=list)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do something that may fail."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return work()
        except MPlusError as error:
            self.refused[name] = error
        except Exception as error:  # noqa: BLE001 - what the tests look for
            self.raw[name] = error
        return None


def do_everything(folder: Path, model: Any, scratch: Path) -> Outcome:
    """Verify, open, read, change, import, repair, show and forget; the folder must stay as it is but for the last."""
    found, before = Outcome(), fingerprint_of(folder)
    live = is_memory(folder, LIVE_FORMAT)
    found.faults = found.step("verify", lambda: verify(folder)) or []
    memory = found.step(
        "open", lambda: Memory.open(folder, model, read_only=True) if live else Memory.load(folder, model)
    )
    if memory is not None:
        found.step("read", lambda: read(memory))
    if memory is None or "read" not in found.refused:
        own = shutil.copytree(folder, scratch / "own")
        memory = found.step("open to write", lambda: Memory.open(own, model)) if live else memory
        if memory is not None:
            found.step("change", lambda: change(memory))
            found.step("keep", memory.close if live else lambda: memory.save(scratch / "saved"))
    if not live:
        found.step("import", lambda: imported(folder, model))
    for what in (cli.show, cli.sources):
        found.step(what.__name__, lambda what=what: what(folder, as_json=True))
    if found.step("repair", lambda: repair(folder, scratch / "repaired")) is not None:
        found.step("verify repaired", lambda: check_sound(scratch / "repaired"))
        again = found.step("load repaired", lambda: Memory.load(scratch / "repaired", model))
        if again is not None:
            found.step("read repaired", lambda: read(again))
    assert without_lock(fingerprint_of(folder)) == without_lock(before), "files were changed"
    found.step("forget", lambda: forget_saved(folder, "a"))
    return found


def imported(folder: Path, model: Any) -> None:
    """Import what is saved in a folder, packed as an export is, with digests of the files as they are."""
    data = next(path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors")
    files = [(path.name, path.read_bytes()) for path in (data, folder / "manifest.json")]
    files.append((SUMS, sums_of({name: hashlib.sha256(content).hexdigest() for name, content in files})))
    stream = b"".join(member_head(name, len(content)) + content + padding(len(content)) for name, content in files)
    memory = model.new_memory(batch_size=2)
    try:
        memory.import_(io.BytesIO(stream + END))
    except MPlusError:
        assert memory.is_empty
        assert memory.version == 0
        raise
    read(memory)
    change(memory)


def check_sound(folder: Path) -> None:
    """What was repaired has no faults."""
    faults = verify(folder)
    if faults:
        raise AssertionError(faults)


def without_lock(names: dict[str, str]) -> dict[str, str]:
    """Locks may be made."""
    return {name: digest for name, digest in names.items() if name != "lock"}


def read(memory: Memory) -> None:
    """All that a memory holds, and what a read retrieves of it."""
    engine = memory.engine
    hidden, mask = torch.ones(1, 3, engine.layout.hidden_size), torch.ones(1, 3, dtype=torch.bool)
    for row, view in enumerate(memory.snapshot()):
        memory.sources(row), memory.forgotten(row), repr(memory)
        for layer in range(view.store.layout.layers):
            engine.mechanism.retrieve(layer, hidden, mask, [view])
            view.store.gather(layer, view.store.ids(layer))


def change(memory: Memory) -> None:
    """Write under a known name, a new one and none, and forget."""
    text = torch.arange(8)
    for source in ("a", "new", None):
        memory.write([text] * memory.batch_size, source=source)
    memory.forget("new")
    memory.forget("b")
    memory.forget("a", mode="rebuild")
    read(memory)
