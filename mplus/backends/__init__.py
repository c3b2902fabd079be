"""Attention over memory and text together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.backends.base import AttentionBackend

__all__ = ["BACKENDS"]

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
