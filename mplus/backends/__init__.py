"""Attention backends by name, and the names one needs to write another.

A backend derives from ``AttentionBackend`` and gets requests that ``check_request`` has passed.
``joined_keys_values``, ``joined_visibility`` and ``joined_bias`` put memory and text side by side.
``mplus.testing.backends.BackendConformance`` tries a backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult, Segment
    from mplus.backends.checks import check_request, learned_biases, mixed_dtypes
    from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionRequest",
    "AttentionResult",
    "Segment",
    "check_request",
    "joined_bias",
    "joined_keys_values",
    "joined_visibility",
    "learned_biases",
    "mixed_dtypes",
]

BACKENDS: Registry[AttentionBackend] = Registry(
    "backend",
    group="mplus.backends",
    base="mplus.backends.base:AttentionBackend",
    builtin={
        "flex": "mplus.backends.flex:FlexBackend",
        "merge": "mplus.backends.merge:MergeBackend",
        "reference": "mplus.backends.reference:ReferenceBackend",
        "sdpa": "mplus.backends.sdpa:SdpaBackend",
        "triton": "mplus.backends.triton.backend:TritonBackend",
    },
    reserved={"auto"},  # a config says "auto" to let mplus choose
)

__getattr__, __dir__ = lazy_exports(
    "mplus.backends",
    {
        "mplus.backends.base": ("AttentionBackend", "AttentionRequest", "AttentionResult", "Segment"),
        "mplus.backends.checks": ("check_request", "learned_biases", "mixed_dtypes"),
        "mplus.backends.joined": ("joined_bias", "joined_keys_values", "joined_visibility"),
    },
)
