"""Evaluation of a memory: retention over age, retriever health, abstention, harm to the decoder, value of context."""

from __future__ import annotations

import importlib
from types import ModuleType

from mplus.errors import MissingDependencyError
from mplus.registry import EXTRAS


def require_extra(module: str, purpose: str) -> ModuleType:
    """Import ``module``, a package of an extra or a part of one.

    Raises:
        MissingDependencyError: it is not installed; the message names ``purpose`` and the extra.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingDependencyError(
            f"{purpose} needs the package {package!r}, which is not installed: pip install 'mplus[{EXTRAS[package]}]'",
            name=package,
        ) from error
