"""Checkpoints: the whole state of a training on disk, replaced together or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import attrs
import torch
from attrs import define

from mplus.config import JsonValue
from mplus.errors import CheckpointError
from mplus.stores.disk.files import FileSystem
from mplus.training.parallel import barrier, gather_objects, rank, world_size
from mplus.training.recipe.files import differences
from mplus.training.state import Manifest, Own, Position, RandomState, Shared

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FORMAT = 2
MANIFEST = "checkpoint.json"
SHARED = "training.pt"
OWN = "process-{}.pt"
TEMPORARY = ".writing-"
NOT_COMPARED = ("checkpoints", "metrics")
"""Tables of a recipe that may change between a checkpoint and going on from it."""


@define(frozen=True, kw_only=True)
class RunIdentity:
    """Recipe, model and processes of a run: what must be the same when it goes on from a checkpoint.

    Attributes:
        recipe: plain data, as JSON reads it back.
        base: digest of the decoder's own weights at the start; None for a decoder with new ones.
        shapes: of everything that is trained.
        processes: how many trained together.
    """

    recipe: dict[str, JsonValue]
    base: str | None
    shapes: dict[str, list[int]]
    processes: int

    def check(self, saved: Manifest, where: Path) -> None:
        """Raise CheckpointError when a checkpoint was made with another recipe, model or number of processes."""
        then = {key: value for key, value in saved["recipe"].items() if key not in NOT_COMPARED}
        now = {key: value for key, value in self.recipe.items() if key not in NOT_COMPARED}
        found = differences(then, now)
        if found:
            raise CheckpointError(f"{where} is of another recipe: {_some(found)}")
        if saved["processes"] != self.processes:
            raise CheckpointError(
                f"{where} must go on in as many processes as it was written by: {saved['processes']} then, "
                f"{self.processes} now"
            )
        found = differences(saved["shapes"], self.shapes)
        if saved["base"] != self.base:
            found.insert(0, f"the decoder's own weights: digest {saved['base']} then, {self.base} now")
        if found:
            raise CheckpointError(f"{where} is of another model: {_some(found)}")


def _some(found: list[str]) -> str:
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


@define(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read: where from, its manifest, and what processes share and have of their own."""

    folder: Path
    manifest: Manifest
    shared: Shared
    own: Own


class CheckpointStore:
    """The checkpoints in one folder.

    Args:
        folder: made when the first is written.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        found = [path.parent for path in self.folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
        return sorted(found, key=lambda path: path.name)

    def save(self, name: str, facts: RunIdentity, position: Position, shared: Shared, own: Own) -> Path:
        """Write a checkpoint under ``name``; names of later ones must be greater. All processes must call it.

        Args:
            name: of its folder.
            facts: what it can be held to.
            position: plain data to read without loading it (step, stage, attempt).
            shared: tensors and plain data that are the same in all processes; written by the first.
            own: those of this process.

        Raises:
            CheckpointError: it could not be written, by whichever process; what was there before is as it was.
        """
        done = self.folder / name
        temporary = self.folder / gather_objects(f"{TEMPORARY}{secrets.token_hex(4)}")[0]
        with self._together(temporary):
            if rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                temporary.mkdir()
        with self._together(temporary):
            write(temporary / OWN.format(rank()), own)
            if rank() == 0:
                write(temporary / SHARED, shared)
                text = json.dumps({"format": FORMAT, **attrs.asdict(facts, recurse=False), **position}, indent=2) + "\n"
                write_bytes(temporary / MANIFEST, text.encode())
        with self._together(temporary):
            if rank() == 0:
                if done.exists():
                    shutil.rmtree(done)
                # All files are on disk before the folder has a name that counts, and the name is before others go.
                FileSystem().sync_folder(temporary)
                temporary.rename(done)
                FileSystem().sync_folder(self.folder)
                for old in self.all()[: -self.keep]:
                    shutil.rmtree(old)
        return done

    @contextmanager
    def _together(self, temporary: Path) -> Iterator[None]:
        """Do something in all processes; where one cannot, none goes on."""
        trouble = None
        try:
            yield
        except OSError as error:
            trouble = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        found = [one for one in gather_objects(trouble) if one is not None]
        if found:
            barrier()
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = self.all()
            raise CheckpointError(
                f"{self.folder} must be a folder that can be written, got {found[0]}: make room or choose another; "
                + (f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no checkpoint in it yet")
            )

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Checkpoint:
        """Read the newest checkpoint, and of what processes have of their own this one's.

        Raises:
            CheckpointError: there is none, or it is damaged, or was written by a newer version.
        """
        found = self.all()
        if not found:
            raise CheckpointError(f"{self.folder} must hold a checkpoint to go on from, it has none")
        folder = found[-1]
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(folder / MANIFEST, error) from error
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder} must have format {FORMAT}, got {manifest.get('format')!r}")
        own = folder / OWN.format(rank())
        if not own.exists() and manifest["processes"] != world_size():
            # ``RunIdentity.check`` will say what is wrong.
            return Checkpoint(folder, manifest, cast("Shared", {}), cast("Own", {}))
        return Checkpoint(folder, manifest, read(folder / SHARED), read(own))


def write(path: Path, content: Shared | Own) -> None:
    """Write tensors and plain data, and wait until they are on disk. Raises OSError."""
    with path.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(content, cast(Any, watched))
        except (OSError, RuntimeError) as error:
            if watched.trouble is not None:  # torch says "unexpected pos" where the file said why
                raise watched.trouble from error
            raise
        file.flush()
        os.fsync(file.fileno())


class _Watched(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.trouble: OSError | None = None

    def write(self, content: ReadableBuffer) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.trouble = error
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and wait until it is on disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Any:
    """Read a file that ``write`` wrote, its tensors on the CPU. Raises CheckpointError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """Return the error for a file that cannot be read."""
    first = str(error).partition("\n")[0]
    return CheckpointError(
        f"{path} must be a complete file of a checkpoint, got {first}: remove {path.parent} to go on from "
        "the one before"
    )


def as_json(data: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return plain data as JSON reads it back, with lists for tuples."""
    found: dict[str, JsonValue] = json.loads(json.dumps(data))
    return found


def random_state() -> RandomState:
    """Return the states of the generators that belong to the process: torch's and Python's."""
    found: RandomState = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: RandomState) -> None:
    """Undo what happened to these generators since ``random_state``."""
    torch.set_rng_state(state["torch"])
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
