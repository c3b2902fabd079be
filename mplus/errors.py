"""The errors mplus raises on purpose.

Every message names what was wrong, the rule it broke and the value that broke it, and says what to do.
Each class also derives from the built-in a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import pickle


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


class MissingDependencyError(MPlusError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class NotSupported(MPlusError, ValueError):
    """A decoder, or a way of calling it, cannot carry a memory; the message gives every reason."""


class InputError(MPlusError, ValueError):
    """Text, ids or masks handed to mplus break a rule; no memory was changed."""


class NonFiniteError(MPlusError, ArithmeticError):
    """The decoder produced NaN or Inf while writing or in training; memory or weights were left as they were."""


class MemoryMismatchError(MPlusError, ValueError):
    """A memory does not belong to this model, adapter, configuration, batch or cache."""


class MemoryFileError(MPlusError, ValueError):
    """A saved memory is truncated, altered, foreign or of a newer format."""


class MemoryPickleError(MPlusError, pickle.PicklingError, TypeError):
    """A memory was to be pickled; the message says how to keep it, or hand it to another process, instead."""


class LiveMemoryError(MPlusError, RuntimeError):
    """A memory in a directory cannot be changed now: open elsewhere, for reading only, closed, or its disk failed."""


class CheckpointError(MPlusError, ValueError):
    """A checkpoint, published or of a training, or a run's folder lacks something, does not fit, or cannot be kept."""


class TrainingError(MPlusError, RuntimeError):
    """A stage of a training did not reach what its recipe asks for."""
