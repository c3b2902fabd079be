"""The rules of an attention request, checked before any kernel sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mplus.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mplus.backends.base import AttentionRequest, Segment


def check_request(request: AttentionRequest) -> None:
    """Check shapes, heads, devices and kinds of numbers.

    Kernels trust their arguments: some read out of bounds or end the process where these rules are broken.

    Raises:
        InputError: naming the argument, its rule and its value.
    """
    _check_text(request)
    for index, segment in enumerate(request.segments):
        _check_segment(f"segments[{index}]", segment, request)
    _check_options(request)
    device = request.queries.device
    for name, part in tensors_of(request).items():
        if part.device != device:
            raise InputError(f"{name} must be on the device of the queries ({device}), got {part.device}")
    for index, segment in enumerate(request.segments):
        if segment.bias is not None and not torch.compiler.is_compiling():  # a look at numbers would break the graph
            valid = segment.valid
            real = segment.bias if valid is None else segment.bias.masked_fill(~valid[:, None], 0)
            check_finite(f"segments[{index}].bias", real)


def mixed_dtypes(request: AttentionRequest, taker: str, *, biases: bool = False) -> list[str]:
    """Return reasons against keys and values of another dtype than the queries.

    Args:
        request: what is to be computed.
        taker: what takes one dtype only, for the message.
        biases: whether ``Segment.bias`` must have that dtype, too.
    """
    parts = {"keys": request.keys, "values": request.values}
    for index, segment in enumerate(request.segments):
        parts[f"segments[{index}].keys"] = segment.keys
        parts[f"segments[{index}].values"] = segment.values
        if biases and segment.bias is not None:
            parts[f"segments[{index}].bias"] = segment.bias
    wanted = request.queries.dtype
    return [
        f"{name} are {part.dtype} and queries {wanted}: {taker} takes one dtype"
        for name, part in parts.items()
        if part.dtype != wanted
    ]


def learned_biases(request: AttentionRequest, taker: str) -> list[str]:
    """Return reasons against each ``Segment.bias`` that requires a gradient, which ``taker`` does not give."""
    if not torch.is_grad_enabled():
        return []
    return [
        f"segments[{index}].bias requires a gradient, which {taker} does not give"
        for index, segment in enumerate(request.segments)
        if segment.bias is not None and segment.bias.requires_grad
    ]


def check_finite(name: str, *parts: Tensor) -> None:
    """Raise InputError when numbers that every query will see are NaN or infinite."""
    for part in parts:
        # A sum is NaN or infinite where any number is; one of large finite numbers can be infinite too.
        wide = torch.promote_types(part.dtype, torch.float32)
        if part.numel() and not bool(torch.isfinite(part.sum(dtype=wide))):
            # Only now number by number: finite ones may have an infinite sum.
            wrong = int((~torch.isfinite(part)).sum())
            if not wrong:
                continue
            raise InputError(f"{name} must be finite, got NaN or Inf in {wrong} of {part.numel()} numbers")


def _check_text(request: AttentionRequest) -> None:
    queries, keys, values = request.queries, request.keys, request.values
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.dim() != 4:
            raise InputError(f"{name} must be [batch, heads, tokens, width], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be floating point, got {tensor.dtype}")
    batch, heads, length, width = queries.shape
    key_heads, text = keys.shape[1], keys.shape[2]
    if length < 1:
        raise InputError(f"queries must have at least one token, got {list(queries.shape)}")
    if text < length:
        raise InputError(f"keys must have at least as many text tokens as queries ({length}), got {text}")
    if key_heads < 1 or heads % key_heads:
        raise InputError(f"queries must have a multiple of the {key_heads} heads of the keys, got {heads}")
    if tuple(keys.shape) != (batch, key_heads, text, width) or width < 1:
        raise InputError(f"keys must be {[batch, key_heads, text, width]}, got {list(keys.shape)}")
    if tuple(values.shape[:3]) != (batch, key_heads, text):
        raise InputError(f"values must be {[batch, key_heads, text]} and a width, got {list(values.shape)}")


def _check_segment(name: str, segment: Segment, request: AttentionRequest) -> None:
    batch, _, _, width = request.queries.shape
    key_heads = request.keys.shape[1]
    keys, values = segment.keys, segment.values
    if keys.dim() != 4 or keys.shape[0] not in (1, batch) or tuple(keys.shape[1::2]) != (key_heads, width):
        raise InputError(f"{name}.keys must be [1 or {batch}, {key_heads}, rows, {width}], got {list(keys.shape)}")
    expected = [*keys.shape[:3], request.values.shape[3]]
    if list(values.shape) != expected:
        raise InputError(f"{name}.values must be {expected}, got {list(values.shape)}")
    if not keys.is_floating_point() or not values.is_floating_point():
        raise InputError(f"{name} must be floating point, got {keys.dtype} and {values.dtype}")
    lengths = segment.lengths
    if lengths is not None and (tuple(lengths.shape) != (batch,) or lengths.dtype != torch.int64):
        raise InputError(f"{name}.lengths must be [{batch}] int64, got {list(lengths.shape)} {lengths.dtype}")
    if segment.bias is not None:
        _check_bias(f"{name}.bias", segment.bias, segment, batch)


def _check_bias(name: str, bias: Tensor, segment: Segment, batch: int) -> None:
    key_heads, rows = segment.keys.shape[1:3]
    sizes = ((1, batch), (1, key_heads), (rows,))
    if bias.dim() != 3 or any(size not in allowed for size, allowed in zip(bias.shape, sizes, strict=True)):
        raise InputError(f"{name} must be [1 or {batch}, 1 or {key_heads}, {rows}], got {list(bias.shape)}")
    if not bias.is_floating_point():
        raise InputError(f"{name} must be floating point, got {bias.dtype}")


def _check_options(request: AttentionRequest) -> None:
    batch, heads, length, _ = request.queries.shape
    text = request.keys.shape[2]
    mask, padding, sinks = request.mask, request.padding, request.sinks
    if mask is not None:
        wanted = (batch, heads, length, text)
        shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if mask.dim() > 4 or any(size not in (1, full) for size, full in zip(shape, wanted, strict=True)):
            raise InputError(f"mask must broadcast to {list(wanted)}, got {list(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"mask must be bool or floating point, got {mask.dtype}")
    if padding is not None and (tuple(padding.shape) != (batch,) or padding.dtype != torch.int64):
        raise InputError(f"padding must be [{batch}] int64, got {list(padding.shape)} {padding.dtype}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise InputError(f"sinks must be [{heads}], one per head of the queries, got {list(sinks.shape)}")
    if request.window is not None and request.window < 1:
        raise InputError(f"window must be at least 1, got {request.window}")
    if request.softcap is not None and not request.softcap > 0:
        raise InputError(f"softcap must be above 0, got {request.softcap}")
    if not 0 <= request.dropout < 1:
        raise InputError(f"dropout must be at least 0 and below 1, got {request.dropout}")


def tensors_of(request: AttentionRequest) -> dict[str, Tensor]:
    """Return every tensor of a request by name, such as ``segments[0].keys``."""
    named = {
        "queries": request.queries,
        "keys": request.keys,
        "values": request.values,
        "mask": request.mask,
        "padding": request.padding,
        "sinks": request.sinks,
    }
    for index, segment in enumerate(request.segments):
        named[f"segments[{index}].keys"] = segment.keys
        named[f"segments[{index}].values"] = segment.values
        named[f"segments[{index}].lengths"] = segment.lengths
        named[f"segments[{index}].bias"] = segment.bias
    return {name: tensor for name, tensor in named.items() if tensor is not None}
