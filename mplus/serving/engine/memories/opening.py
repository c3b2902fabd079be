"""Open a memory of a server, and say which version of it that is."""

from __future__ import annotations

from pathlib import Path

from mplus.errors import MemoryFileError
from mplus.memory.directory.offline import read_info
from mplus.memory.memory import Memory
from mplus.serving.config import ServeConfig
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.memories.versions import version_of
from mplus.serving.engine.refusals import disk_refuses


def opened_memory(path: Path, decoder: ServedDecoder, config: ServeConfig) -> tuple[Memory, int]:
    """Return the memory in a directory, and its version, which every change of it raises.

    The version counts records and checkpoints by what the files say, text that only waits included: where it is opened
    again, a memory has a version at least as high as any that was told of it, and the same only with the same content.

    Where it is locked, this does not wait: the pool asks again. On a disk that cannot be written, a memory is opened
    to be read only. Raises as ``Memory.open``.
    """
    try:
        memory = Memory.open(
            path,
            decoder.model,
            tokenizer=decoder.tokenizer,
            bytes_budget=config.limits.memory_bytes,
        )
    except MemoryFileError as error:
        if not disk_refuses(error):
            raise
        found = read_info(path)
        memory = Memory.open(path, decoder.model, tokenizer=decoder.tokenizer, read_only=True)
        return memory, version_of(found.manifest.number, found.records)
    directory = memory.directory
    if directory is None or directory.manifest is None or directory.journal is None:
        return memory, 0
    return memory, version_of(directory.manifest.number, directory.journal.records)


def copied_memory(path: Path, file: Path, decoder: ServedDecoder, config: ServeConfig) -> Memory:
    """Return the new memory, open, that an exported file makes at a path. Raises as ``Memory.from_export``."""
    return Memory.from_export(
        path, file, decoder.model, tokenizer=decoder.tokenizer, bytes_budget=config.limits.memory_bytes
    )
