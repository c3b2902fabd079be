"""RunFolder: all that is needed to repeat a training, and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.errors import CheckpointError
from mplus.training.checkpoint import write_bytes
from mplus.training.parallel import world_size

RECIPE, RESOLVED, RUN, METRICS = "recipe.toml", "recipe.json", "run.json", "metrics.jsonl"
TENSORBOARD, CHECKPOINTS, MODEL, TOKENIZER = "tensorboard", "checkpoints", "model", "tokenizer"


class RunFolder:
    """The folder of one run.

    ``recipe.toml``: the recipe as it was given. ``recipe.json``: with every change and default. ``run.json``: versions,
    commit, device, command, seeds, restarts. ``metrics.jsonl``, ``tensorboard/``. ``checkpoints/``. ``tokenizer/`` and
    ``model/``: what came of it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made: list[Path] = []

    def create(self, text: str | None, resolved: Mapping[str, JsonValue]) -> None:
        """Begin a run. Raises CheckpointError when there is something in the folder, or it cannot be written."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CheckpointError(
                f"{self.path} must be an empty folder or not exist yet: go on with what is there by resume, or choose "
                "another folder"
            )
        with self.writing():
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if text is not None:
                    write_bytes(self.path / RECIPE, text.encode())
                self.write_json(RESOLVED, resolved)
            except BaseException:
                self.discard()
                raise

    def discard(self) -> None:
        """Remove the files of a run, and the folders that ``create`` made, where nothing else is in them."""
        for name in (RECIPE, RESOLVED, RUN, METRICS):
            with suppress(OSError):  # it is not there
                (self.path / name).unlink()
        for name in (TENSORBOARD, CHECKPOINTS, TOKENIZER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in self._made:
            with suppress(OSError):  # something else is in it
                path.rmdir()

    def load_recipe(self) -> dict[str, JsonValue]:
        """Return the recipe of a run that was begun. Raises CheckpointError when there is none."""
        try:
            found: dict[str, JsonValue] = json.loads((self.path / RESOLVED).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} must be the folder of a run, with {RESOLVED}: {error}") from error
        return found

    def update_run_info(
        self, *, seeds: Sequence[int], resumed_at: int | None = None, begun: bool = False, **facts: JsonValue
    ) -> dict[str, JsonValue]:
        """Write ``run.json``: ``begun`` adds a start of the program, ``facts`` are about the whole run."""
        path = self.path / RUN
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"starts": []}
        if begun:
            found["starts"].append(
                run_info(command=sys.argv, processes=world_size(), resumed_at=resumed_at, folder=str(Path.cwd()))
            )
        found.update(seeds=list(seeds), restarts=len(seeds) - 1, **facts)
        with self.writing():
            self.write_json(RUN, found)
        return dict(found)

    def write_json(self, name: str, content: JsonValue) -> None:
        """Write a file of JSON, in place of the one before it. Raises OSError."""
        temporary = self.path / f".{name}.tmp"
        try:
            write_bytes(temporary, (json.dumps(content, indent=2) + "\n").encode())
            os.replace(temporary, self.path / name)  # noqa: PTH105 - a reader finds the old file or the new one
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the operating system refuses into CheckpointError."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path} must be a folder that can be written, got {error.strerror or error}: make room or choose "
                "another"
            ) from error
