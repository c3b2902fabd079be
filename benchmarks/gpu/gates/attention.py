"""Gates of the attention backends: every kind of request and dtype, gradients, repeats, a layer's real size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from benchmarks.gpu.gates.requests import (
    FEW,
    LEARNING,
    SHAPES,
    exact_attention,
    on,
    plain_attention,
    widened,
)
from benchmarks.gpu.session import Session
from mplus.backends.base import AttentionBackend, AttentionRequest, Segment
from mplus.backends.flex import FlexBackend
from mplus.backends.reference import ReferenceBackend
from mplus.backends.sdpa import SdpaBackend
from mplus.backends.triton.backend import TritonBackend
from mplus.bench.correctness import random_request
from mplus.bench.presets import PRESETS
from mplus.errors import NotSupported
from mplus.testing.requests import gradients_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPEATS = 20
LARGE = ((1, 12_801, 17), (512, 12_801, 512))
"""Queries, memory rows and text keys of a layer of llama3-8b that reads a prompt, and a token behind it."""


def triton_float32(session: Session) -> None:
    """Open the gates of our own kernel in float32, where nothing may be rounded to TF32."""
    _triton(session, torch.float32)


def triton_bfloat16(session: Session) -> None:
    """Open the gates of our own kernel in bfloat16, and compare it in the sizes of a large decoder."""
    backend = _triton(session, torch.bfloat16)
    for case in () if session.tiny else LARGE:
        check_large(session, backend, case)


def triton_float16(session: Session) -> None:
    """Open the gates of our own kernel in float16, and look for what it reads outside of its inputs."""
    backend = _triton(session, torch.float16)
    with session.gate("triton/among NaN") as gate:
        request = SHAPES["memory" if session.tiny else "many queries"].build(torch.float16)
        attend(backend, on(surrounded(request, torch.device("cpu")), session.device))  # compiled before it is compared
        found = attend(backend, surrounded(request, session.device))
        gate.close(found, plain_attention(request), exact_attention(request))


def _triton(session: Session, dtype: torch.dtype) -> TritonBackend:
    backend = TritonBackend(interpret=session.interpret)
    check(session, backend, dtypes=(dtype,))
    if not session.tiny:
        check_repeats(session, backend, dtype)
    return backend


def flex(session: Session) -> None:
    """Open the gates of FlexAttention, which is compiled for each kind of request: fewer of them."""
    backend = FlexBackend()
    names = FEW if session.tiny else ("memory", "many queries", "fillers", "softcap")
    check(session, backend, names, learning=("memory",), dtypes=(torch.bfloat16,))
    for case in () if session.tiny else LARGE[1:]:
        check_large(session, backend, case)


def sdpa_and_reference(session: Session) -> None:
    """Open the gates of PyTorch's fused attention, and of attention written out."""
    for backend in (SdpaBackend(), ReferenceBackend()):
        check(session, backend)
        if not session.tiny:
            check_repeats(session, backend, torch.bfloat16)
            for case in LARGE:
                check_large(session, backend, case)


def check(
    session: Session,
    backend: AttentionBackend,
    names: Sequence[str] | None = None,
    learning: Sequence[str] = LEARNING,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Open all gates of one backend.

    Args:
        session: of the part.
        backend: that is tried.
        names: of ``SHAPES``; None: all.
        learning: of ``SHAPES``, for gradients.
        dtypes: of requests.
    """
    for name in names or (FEW if session.few else SHAPES):
        for dtype in dtypes:
            check_output(session, backend, name, dtype)
    for name in learning[: 1 if session.few else None]:
        for dtype in dtypes[:1] if session.tiny else dtypes:
            check_gradients(session, backend, name, dtype)


def check_output(session: Session, backend: AttentionBackend, name: str, dtype: torch.dtype) -> None:
    """Compare the output for one of ``SHAPES`` with float64."""
    with session.gate(f"{backend.name}/{name}/{short(dtype)}") as gate:
        request = SHAPES[name].build(dtype)
        moved = on(request, session.device)
        plain, exact = plain_attention(request), exact_attention(request)
        gate.close(attend(backend, moved), plain, exact, plain_attention(moved))


def check_gradients(session: Session, backend: AttentionBackend, name: str, dtype: torch.dtype) -> None:
    """Compare the gradients towards queries, keys and values of text and memory with those in float64."""
    with session.gate(f"{backend.name}/gradient/{name}/{short(dtype)}") as gate:
        request = SHAPES[name].build(dtype)
        if request.segments and request.segments[0].bias is not None and backend.name == "flex":
            raise NotSupported("FlexAttention gives a bias no gradient")
        moved = on(request, session.device)
        refuse(backend, evolve(moved, queries=moved.queries.clone().requires_grad_()))
        exact = gradients_of(widened(request), exact_attention)
        plain, beside = gradients_of(request, plain_attention), gradients_of(moved, plain_attention)
        found = gradients_of(moved, lambda one: backend.attend(one).output)
        for leaf, gradient in found.items():
            gate.close(gradient, plain[leaf], exact[leaf], beside[leaf])


def check_repeats(session: Session, backend: AttentionBackend, dtype: torch.dtype) -> None:
    """Attend again and again to the same: a race between threads shows as other bits."""
    with session.gate(f"{backend.name}/repeats/{short(dtype)}") as gate:
        request = on(SHAPES["one query"].build(dtype), session.device)
        first = attend(backend, request)
        for _ in range(REPEATS):
            gate.same(attend(backend, request), first, "a repeat")


@torch.no_grad()
def check_large(session: Session, backend: AttentionBackend, case: tuple[int, int, int]) -> None:
    """Compare one layer of llama3-8b with float64 on the same device."""
    with session.gate(f"{backend.name}/llama3-8b/{case[0]} queries") as gate:
        request = random_request(PRESETS["llama3-8b"], session.device, case, 0)
        found, plain, exact = attend(backend, request), plain_attention(request), exact_attention(request)
        gate.close(found, plain.cpu(), exact.cpu())


def attend(backend: AttentionBackend, request: AttentionRequest) -> Tensor:
    """Run a request. Raises NotSupported, with the backend's reasons, where it refuses."""
    refuse(backend, request)
    return backend.attend(request).output


def refuse(backend: AttentionBackend, request: AttentionRequest) -> None:
    """Raise NotSupported where a backend has reasons against a request."""
    reasons = backend.unsupported_reasons(request)
    if reasons:
        raise NotSupported("; ".join(reasons))


def surrounded(request: AttentionRequest, device: torch.device) -> AttentionRequest:
    """Return the request with queries, keys and values inside larger buffers of NaN: what is read there shows."""

    def inside(tensor: Tensor) -> Tensor:
        larger = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=device)
        view = larger[tuple(slice(1, -2) for _ in tensor.shape)]
        view.copy_(tensor)
        return view

    return evolve(
        request,
        queries=inside(request.queries),
        keys=inside(request.keys),
        values=inside(request.values),
        segments=tuple(Segment(inside(one.keys), inside(one.values)) for one in request.segments),
    )


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")
