"""The orders in which ``auto`` asks the backends on GPUs where they were measured; elsewhere there is one for all.

``measured.json`` beside this file has an entry for each compute capability that ``python -m benchmarks.gpu`` has run
on: for each of ``KINDS`` the backends that computed the right thing there, the fastest first, and the kernels that did
not. It is empty until then.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mplus.backends.base import AttentionRequest

KINDS = ("step", "prompt", "gradient")
"""One query for each sequence, several, and those of which gradients are wanted."""
FILE = Path(__file__).with_name("measured.json")


@functools.cache
def entries() -> Mapping[str, Mapping[str, Any]]:
    """Return the entries by compute capability, such as "9.0"."""
    found: Mapping[str, Mapping[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@functools.cache
def entry_of(index: int | None) -> Mapping[str, Any]:
    """Return the entry for a GPU of this process; {} where none was measured that is like it."""
    if torch.version.hip is not None:
        return {}
    return entries().get(".".join(map(str, torch.cuda.get_device_capability(index))), {})


def measured_order(request: AttentionRequest) -> tuple[str, ...]:
    """Return the backends to ask for a request on a GPU, the fastest first; () where none were measured.

    Also () while a graph is compiled, which this table is no part of.
    """
    if request.queries.device.type != "cuda" or torch.compiler.is_compiling():
        return ()
    entry = entry_of(request.queries.device.index)
    return tuple(entry.get(kind_of(request), ())) if entry else ()


def kind_of(request: AttentionRequest) -> str:
    """Return which of ``KINDS`` a request is."""
    tensors = [request.queries, request.keys, request.values]
    tensors += [part for segment in request.segments for part in (segment.keys, segment.values)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradient"
    return "step" if request.queries.shape[2] == 1 else "prompt"


def reasons_measured(device: torch.device, kernel: str) -> list[str]:
    """Return why a kernel, "score" or "gather", is not to be used on a device: it was wrong on one like it."""
    if device.type != "cuda":
        return []
    reason = entry_of(device.index).get("refused", {}).get(kernel)
    return [] if reason is None else [f"the kernel {kernel!r} computed something wrong on such a GPU: {reason}"]
