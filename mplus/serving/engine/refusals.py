"""What a client is told of an error: status, type and code, in words that name no path of the server."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path

from mplus.errors import (
    ArgumentError,
    ConfigError,
    InputError,
    LiveMemoryError,
    MemoryFileError,
    MemoryFullError,
    MemoryMismatchError,
    NotSupported,
)
from mplus.serving.errors import ServingError

LOG = logging.getLogger("mplus.serving")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Numbers of system errors that say: there is no place to write to."""
FAILED = {errno.EIO, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
"""Those that say: the system refuses files, be they damaged or not."""


def refusal(error: BaseException, root: Path | None = None) -> ServingError:
    """Return what a client is told of ``error``.

    Args:
        error: of a request; one that mplus does not raise on purpose is logged with its traceback.
        root: the folder of all memories, whose paths are left out of the message.
    """
    if isinstance(error, ServingError):
        return error
    message = _without_paths(str(error), root)
    if disk_is_full(error):
        return disk_full()
    if _system_error(error) in FAILED:
        LOG.error("the system refuses files of a memory", exc_info=error)
        return ServingError(
            "the server's disk does not do what it should, so nothing was changed: tell who runs it",
            507, "server_error", code="disk_failed",
        )  # fmt: skip
    if isinstance(error, MemoryFullError):
        quota = "pinned" in message  # else it is RAM or the disk of the server
        status, kind = (413, "quota_exceeded") if quota else (507, "insufficient_storage")
        return ServingError(message, status, "invalid_request_error" if quota else "server_error", code=kind)
    if isinstance(error, MemoryMismatchError):
        return ServingError(message, 409, "conflict_error", code="memory_mismatch")
    if isinstance(error, MemoryFileError):
        return ServingError(
            f"the files of this memory are damaged: {message}", 409, "conflict_error", code="memory_damaged"
        )
    if isinstance(error, LiveMemoryError):
        return ServingError(
            "this memory cannot be opened now, since another process has it: try again",
            503, "server_error", code="memory_busy", retry_after=1,
        )  # fmt: skip
    if isinstance(error, InputError) and "write_id" in message:
        return ServingError(
            "this Idempotency-Key was given to another text, or to one of another source: every text needs its own",
            409, "conflict_error", code="idempotency_key_reused",
        )  # fmt: skip
    if isinstance(error, InputError | ConfigError | NotSupported | ArgumentError):
        return ServingError(message, 400, "invalid_request_error")
    LOG.error("a request failed", exc_info=error)
    return ServingError("the server failed on this request, and served all others", 500, "server_error")


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error says that there is no place to write to."""
    return _system_error(error) in FULL


def disk_refuses(error: BaseException | None) -> bool:
    """Return whether an error says that the disk cannot be written to, for whatever reason."""
    return _system_error(error) in FULL | FAILED


def disk_full() -> ServingError:
    """Return the error that says: the disk is full or read-only."""
    return ServingError(
        "the server's disk cannot be written to, so nothing was written: try later, or tell who runs it",
        507, "server_error", code="insufficient_storage",
    )  # fmt: skip


def _system_error(error: BaseException | None) -> int | None:
    """Return the number of the system error that an error comes from; None: it comes from none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _without_paths(message: str, root: Path | None) -> str:
    if root is None:
        return message
    # The folder of a memory, and files in it: what stands behind the path, such as a colon, stays.
    paths = "|".join(re.escape(str(one)) for one in sorted({root, root.absolute()}, key=lambda one: -len(str(one))))
    return re.sub(rf"(?:{paths})(?:/[^\s:,'\"]*[^\s:,.'\"])?", "the memory", message)
