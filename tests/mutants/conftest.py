"""These tests interpret kernels, and altered copies of them."""

from __future__ import annotations

from tests.helpers.interpreting import interpreter

__all__ = ["interpreter"]
