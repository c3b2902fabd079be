"""``Memory.open``: the way to a memory that lives in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mplus.memory.persistence import Keeping
from mplus.stores.disk.folder import FILE_MODE

if TYPE_CHECKING:
    import torch

    from mplus.memory.directory.durable_memory import LiveMemory
    from mplus.stores.disk.filesystem import FileSystem

JOURNAL_BYTES = 2**28


class Opens(Keeping):
    """The part of ``Memory`` that opens directories."""

    @staticmethod
    def open(
        path: str | Path,
        model: Any,
        *,
        batch_size: int | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        store: Any = None,
        eviction: Any = None,
        bytes_budget: int | str | None = None,
        memory_rows: Literal["projected", "hidden", "both"] | None = None,
        keep_text: bool = False,
        device: torch.device | str = "cpu",
        read_only: bool = False,
        journal_bytes: int = JOURNAL_BYTES,
        file_mode: int = FILE_MODE,
        files: FileSystem | None = None,
    ) -> LiveMemory:
        """Open the memory that lives in the directory ``path``, or make a new one there.

        Its long-term rows are kept in mapped files, on the CPU.

        Args:
            path: made with its parents where it does not exist.
            model: the wrapped decoder; of a memory that exists, the one it was made for, as for ``load``.
            batch_size: of a new memory (default 1); of one that exists it must be right, if given.
            tokenizer: lets ``write`` take text.
            seed, memory_rows, keep_text: of a new memory, as for ``new_memory``.
            store: default: the config's. Its innermost one gives way to mapped files (``mmap``). What a store makes of
                rows (``quantized``) stays as it was when the directory was made; what changes no row (``tiered``) is
                as given at each opening.
            device: where short-term rows are, and where long-term rows are read. Another one than the CPU needs a
                store "tiered" (which was not run on a GPU).
            eviction, bytes_budget: of a new memory, or others than the memory had.
            read_only: read what is there, beside whoever writes; writing is refused. What is written meanwhile does
                not show.
            journal_bytes: a new checkpoint is written when the journal is longer than this; what stands in the
                journal is read when the memory is opened, and takes up memory until then.
            file_mode: permission bits of files that are written, as for ``save``.
            files: what is done to files (for tests).

        Raises:
            MemoryFileError: ``path`` cannot be read or written, is truncated, altered or foreign, or of a newer format.
            MemoryMismatchError: as ``load``, or made with another batch size.
            LiveMemoryError: it is open for writing already; says by which process.
            NotSupported: the store reads rows on the CPU only.
            ConfigError: an option breaks its rule, or the budget is too small.
        """
        from mplus.memory.directory.open import open_memory

        return open_memory(
            path,
            model,
            batch_size=batch_size,
            tokenizer=tokenizer,
            seed=seed,
            store=store,
            eviction=eviction,
            bytes_budget=bytes_budget,
            memory_rows=memory_rows,
            keep_text=keep_text,
            device=device,
            read_only=read_only,
            journal_bytes=journal_bytes,
            file_mode=file_mode,
            files=files,
        )
