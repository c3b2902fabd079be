"""The errors mplus raises on purpose.

Every message names what was wrong, the rule it broke and the value that broke it, and says what to do.
Each class also derives from the built-in a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any


class MPlusError(Exception):
    """Base class of every error raised by mplus."""


class ConfigError(MPlusError, ValueError):
    """A configuration field, or an option of an implementation, breaks its rule."""


class UnknownNameError(MPlusError, LookupError):
    """No implementation is registered under the name asked for."""


class DuplicateNameError(MPlusError, ValueError):
    """Two implementations claim one name."""


class PluginError(MPlusError, ImportError):
    """A third-party implementation was asked for and could not be loaded."""


class DownloadError(MPlusError, OSError):
    """A file could not be downloaded, or came damaged; what came of it is kept where the next try can go on."""


class MissingDependencyError(MPlusError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class MechanismError(MPlusError, ValueError):
    """A mechanism, retriever or eviction policy returned what its protocol does not allow; nothing was written."""


class NotSupported(MPlusError, ValueError):
    """A decoder, or a way of calling it, cannot carry a memory; the message says why.

    Attributes:
        details: where ``mplus.wrap`` tried several techniques, every finding against each of them.
    """

    details: tuple[str, ...] = ()


class ArgumentError(MPlusError, TypeError):
    """A call was given an argument that looks like one of ours, misspelt; the message says which."""


class InputError(MPlusError, ValueError):
    """Text, ids or masks handed to mplus break a rule; no memory was changed."""


class NonFiniteError(MPlusError, ArithmeticError):
    """The decoder produced NaN or Inf while writing or in training; memory or weights were left as they were."""


class MemoryMismatchError(MPlusError, ValueError):
    """A memory does not belong to this model, adapter, configuration, batch or cache."""


class MemoryFileError(MPlusError, ValueError):
    """A saved memory is truncated, altered, foreign or of a newer format."""


class WriteTogetherError(MPlusError, ExceptionGroup[Exception]):
    """Some memories of ``write_together`` failed; all others were written to the end.

    Attributes:
        reports: for each memory, in order, what was written; of one that failed, before it did.
        errors: what failed, by place of the memory in the list.
    """

    reports: list[Any]
    errors: dict[int, Exception]

    @classmethod
    def of(cls, reports: list[Any], errors: dict[int, Exception]) -> WriteTogetherError:
        """One error for all that failed."""
        first = [f"[{place}] {type(error).__name__}: {error}" for place, error in list(errors.items())[:3]]
        more = ["..."] if len(errors) > len(first) else []
        whole = cls(
            f"{len(errors)} of {len(reports)} memories failed, and the others were written (see errors and reports, by "
            f"place in the list): {'; '.join(first + more)}",
            list(errors.values()),
        )
        whole.reports, whole.errors = reports, errors
        return whole

    def derive(self, excs: Sequence[Exception]) -> ExceptionGroup[Exception]:  # type: ignore[override]
        """Return a group of some of the errors, without reports, for ``except*``."""
        return ExceptionGroup(self.message, excs)


class ReadTogetherError(MPlusError, ExceptionGroup[Exception]):
    """Some of the memories that were to be read together cannot be read; nothing was read.

    Attributes:
        errors: why, by place of the memory in the list.
    """

    errors: dict[int, Exception]

    @classmethod
    def of(cls, errors: dict[int, Exception], memories: int) -> ReadTogetherError:
        """One error for all that cannot be read, of so many ``memories``."""
        first = [f"[{place}] {type(error).__name__}: {error}" for place, error in list(errors.items())[:3]]
        more = ["..."] if len(errors) > len(first) else []
        whole = cls(
            f"{len(errors)} of {memories} memories cannot be read, so nothing was read: leave them out (see errors, by "
            f"place in the list): {'; '.join(first + more)}",
            list(errors.values()),
        )
        whole.errors = errors
        return whole

    def derive(self, excs: Sequence[Exception]) -> ExceptionGroup[Exception]:  # type: ignore[override]
        """Return a group of some of the errors, for ``except*``."""
        return ExceptionGroup(self.message, excs)


class MemoryFullError(MPlusError, RuntimeError):
    """A memory has no room for what was to be written: pinned sources take it all, or RAM or the disk would run out."""


class MemoryPickleError(MPlusError, pickle.PicklingError, TypeError):
    """A memory was to be pickled; the message says how to keep it, or hand it to another process, instead."""


class LiveMemoryError(MPlusError, RuntimeError):
    """A memory in a directory cannot be changed now: open elsewhere, for reading only, closed, or its disk failed."""


class CheckpointError(MPlusError, ValueError):
    """A checkpoint, published or of a training, or a run's folder lacks something, does not fit, or cannot be kept."""


class HostMemoryError(MPlusError, MemoryError):
    """Activations take more host memory than ``host_bytes`` allows; the message says how much is needed."""


class TrainingError(MPlusError, RuntimeError):
    """A stage of a training did not reach what its recipe asks for."""


class MemorySizeWarning(UserWarning):
    """Sizes that were asked for need more positions than the decoder knows."""
