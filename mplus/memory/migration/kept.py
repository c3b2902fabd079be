"""KeptMemory: what can be made anew of a memory on disk, read without the decoder it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import define

from mplus.config import Component, JsonValue
from mplus.errors import InputError
from mplus.memory.directory.checkpoint_manifest import LiveManifest
from mplus.memory.directory.open import read_present
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import layout_from
from mplus.memory.format.folder import hold, lock
from mplus.memory.format.load import as_written, check_names, read_state
from mplus.memory.format.manifest import LIVE_FORMAT, Manifest, is_memory, mechanism_of, read_manifest
from mplus.memory.format.rules import check_values
from mplus.memory.format.tensors import TensorReader
from mplus.memory.state import StreamState
from mplus.rows import NO_SOURCE


@define(frozen=True, eq=False)
class KeptMemory:
    """A memory on disk without its long-term rows.

    Attributes:
        path: of its folder.
        states: of its streams.
        fingerprint: facts about its decoder.
        mechanism: by name.
        eviction: its policy.
        bytes_budget: in bytes, or None.
        lives: whether it lives in its directory (``Memory.open``); else it was saved.
    """

    path: Path
    states: Sequence[StreamState]
    fingerprint: dict[str, JsonValue]
    mechanism: str
    eviction: Component
    bytes_budget: int | None
    lives: bool

    @property
    def keeps_text(self) -> bool:
        """True if the ids of all that was written are kept beside the rows."""
        return all(state.texts is not None for state in self.states)

    def check_text(self) -> None:
        """Raise InputError, which names the sources, where there is something that no text is kept of."""
        for row, state in enumerate(self.states):
            if state.texts is not None or state.kept_chunks() is not None or "entries" in state.row_lists():
                continue
            names = [repr(source.name) for source in state.sources if source.is_written]
            foreign = any(
                bool((rows.source == NO_SOURCE).any()) for parts in state.row_lists().values() for rows in parts
            )
            if names or foreign:
                raise InputError(
                    f"{self.path} keeps no text of what was written to batch row {row} "
                    f"({', '.join(names) or 'rows that it began with'}), so that nothing can be made anew of it: "
                    f"memories of the mechanism {self.mechanism!r} keep text with new_memory(keep_text=True)"
                )


def read_kept(path: str | Path) -> KeptMemory:
    """Read a memory on disk; one that lives there may be written meanwhile. Raises MemoryFileError: it is damaged."""
    folder = Path(path)
    if is_memory(folder, LIVE_FORMAT):
        with hold(folder) as held:
            found, content, _ = read_present(held)
        return _kept(folder, found, content.states, lives=True)
    here = hold(folder)
    held_lock = lock(here, shared=True)
    try:
        manifest = read_manifest(here)
        layout = layout_from(manifest.layout)
        with TensorReader(here, manifest.data) as opened, as_written(f"{folder}"):
            file = in_present_form(opened, manifest.earlier)
            check_names(file, manifest)
            states = [read_state(file, row, entry, layout) for row, entry in enumerate(manifest.streams)]
            for state in states:
                check_values(state)
    finally:
        held_lock.release()
        here.close()
    return _kept(folder, manifest, states, lives=False)


def _kept(folder: Path, manifest: Manifest | LiveManifest, states: Sequence[StreamState], *, lives: bool) -> KeptMemory:
    return KeptMemory(
        folder,
        states,
        manifest.fingerprint,
        mechanism_of(manifest),
        Component.of(manifest.eviction),
        manifest.bytes_budget,
        lives,
    )
