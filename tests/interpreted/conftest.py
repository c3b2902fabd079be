"""These tests interpret kernels."""

from __future__ import annotations

from tests.helpers.interpreting import interpreter

__all__ = ["interpreter"]
