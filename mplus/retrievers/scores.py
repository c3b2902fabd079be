"""Scores of memory rows for a text, from queries and keys: plain, differentiable, in float32 or better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mplus.backends.triton.score import reasons_against_scoring, sigmoid_means
from mplus.errors import InputError

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``score(queries, mask, keys)``, as ``mean_dot``."""

MAX_PRODUCTS = 2**18
"""Largest number of query-key products held at a time on a CPU: 1 MiB in float32, which stays in its cache."""
MAX_PRODUCTS_ON_A_DEVICE = 2**24
"""The same elsewhere, where every piece costs the start of a few kernels."""
WIDE = 128
"""Width of keys from which on a product by one vector is slow on a CPU: 8 GB/s on an AMD EPYC, where a sum reads 33."""


def mean_dot(queries: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """Compute ``(mean_i q_i) . k``: one query vector for the text, so that an index of inner products can serve it.

    Args:
        queries: ``[B, T, r]``, or ``[B, R, T, r]`` for R texts against the same rows; or without B.
        mask: ``[B, T]`` or ``[B, R, T]`` bool, True at text and False at padding, whatever that holds.
        keys: ``[B, m, r]``.

    Returns:
        ``[B, m]`` or ``[B, R, m]`` in float32, or float64 where an argument is. 0 for a text without any token.

    Raises:
        InputError: the shapes do not fit together, or the mask is not bool.
    """
    _check(queries, mask, keys)
    with torch.autocast(queries.device.type, enabled=False):  # it would take the products back to half precision
        queries, keys = _precise(queries, mask, keys)
        return _products(_mean(queries, mask)[..., None, :], keys).squeeze(-2)


def sigmoid_mean(queries: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """Compute ``mean_i sigmoid(q_i . k)``, from 0 to 1 (M+ section 3.2). Arguments and result as for ``mean_dot``."""
    _check(queries, mask, keys)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = _precise(queries, mask, keys)
        return _mean(_products(queries, keys).sigmoid().masked_fill(~mask[..., None], 0.0), mask)


SCORES: Mapping[str, Score] = {"mean_dot": mean_dot, "sigmoid_mean": sigmoid_mean}


def score_rows(name: str, texts: Sequence[Tensor], keys: Tensor) -> Tensor:
    """Score every row for each of several texts, a piece of the rows at a time, without autograd.

    Where queries and keys are on one NVIDIA GPU and triton is installed, a kernel computes "sigmoid_mean" in one go,
    with that device's approximation of the sigmoid.

    Args:
        name: of the score.
        texts: queries of each text, ``[T, r]`` with T of at least 1.
        keys: ``[m, r]`` on any device and in any dtype; moved to the queries and upcast in pieces.

    Returns:
        ``[texts, m]`` float32 on the device of the queries.
    """
    return row_scorer(name, texts)(keys)


@torch.no_grad()
def row_scorer(name: str, texts: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``score_rows`` for some texts as a function of keys, which does once what does not depend on these."""
    device = texts[0].device
    with _without_autocast(device):
        groups = [text.float() for text in texts]
        if name == "mean_dot":  # one query vector each: all texts in one product
            groups = [torch.stack([text.mean(0) for text in groups])]
        shares = [group.new_full(group.shape[:1], 1 / group.shape[0]) for group in groups]
    piece = piece_rows(max(group.shape[0] for group in groups), device)

    @torch.no_grad()
    def score(keys: Tensor) -> Tensor:
        if name == "sigmoid_mean" and not any(reasons_against_scoring(text, keys) for text in texts):
            return torch.cat([sigmoid_means(text[None], None, keys) for text in texts])
        with _without_autocast(device):
            if keys.shape[0] <= piece:
                return _scored(name, groups, shares, keys.to(device, torch.float32))
            found = [_scored(name, groups, shares, part.to(device, torch.float32)) for part in keys.split(piece)]
            return torch.cat(found, -1)

    return score


def _scored(name: str, groups: Sequence[Tensor], shares: Sequence[Tensor], keys: Tensor) -> Tensor:
    """Score float32 ``keys`` for all texts: ``[texts, m]``."""
    if name != "mean_dot":
        likes = ((keys @ group.T).sigmoid_() for group in groups)
        found = [torch.mv(own, share) for own, share in zip(likes, shares, strict=True)]
        return found[0][None] if len(found) == 1 else torch.stack(found)
    (queries,) = groups
    return _times_one(keys, queries[0])[None] if len(queries) == 1 else (keys @ queries.T).T


def _times_one(keys: Tensor, vector: Tensor) -> Tensor:
    """Multiply float32 ``keys`` ``[m, r]`` by one vector ``[r]``, to ``[m]``."""
    if keys.device.type != "cpu" or keys.shape[1] < WIDE or keys.stride(0) == 1:
        return torch.mv(keys, vector)
    # The product by two vectors reads wide rows from memory twice as fast as the product by one, so it is taken twice.
    return torch.mm(keys, torch.stack([vector, vector]).T)[:, 0].contiguous()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which would take products to half precision; made only where there is one."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


@torch.no_grad()
def score_into(out: Tensor, name: str, text: Tensor, keys: Sequence[Tensor]) -> None:
    """Write to ``out`` ``[m]`` float32 what ``score_rows`` gives for one text ``[T, r]`` and some rows.

    Args:
        out: on the device of the text.
        name: of the score.
        text: its queries.
        keys: of the rows, ``[m_i, r]``, one part behind the other.
    """
    parts = out.split([part.shape[0] for part in keys])
    if name != "mean_dot":
        for own, part in zip(parts, keys, strict=True):
            own.copy_(score_rows(name, [text], part)[0])
        return
    with torch.autocast(text.device.type, enabled=False):
        mean = text.float().mean(0)
        for own, part in zip(parts, keys, strict=True):
            own.copy_(_times_one(part.to(device=text.device, dtype=torch.float32), mean))


def piece_rows(products: int, device: torch.device) -> int:
    """Return how many rows to score at a time where each of them makes so many ``products``."""
    return max(1, (MAX_PRODUCTS if device.type == "cpu" else MAX_PRODUCTS_ON_A_DEVICE) // products)


def _check(queries: Tensor, mask: Tensor, keys: Tensor) -> None:
    lead = keys.shape[:-2]
    fits = keys.ndim >= 2 and queries.ndim >= keys.ndim and queries.shape[: len(lead)] == lead
    if not fits or queries.shape[-1] != keys.shape[-1] or mask.shape != queries.shape[:-1]:
        raise InputError(
            "queries must be [B, T, r] or [B, R, T, r] with a mask of the same shape without r, and keys [B, m, r]; "
            f"got queries {list(queries.shape)}, a mask {list(mask.shape)} and keys {list(keys.shape)}"
        )
    if mask.dtype != torch.bool:
        raise InputError(f"the mask of the queries must be bool, got {mask.dtype}")


def _precise(queries: Tensor, mask: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32 or better, zeros at padding, so that nothing there takes part in a gradient either."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    return queries.to(dtype).masked_fill(~mask[..., None], 0.0), keys.to(dtype)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``[..., T, n]`` over the tokens of ``mask``; ``values`` are 0 elsewhere."""
    return values.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply ``[B, (R,) T, r]`` and ``[B, m, r]`` to ``[B, (R,) T, m]``; keys are not copied for each of R texts."""
    lead, rest = keys.shape[:-2], queries.shape[keys.ndim - 2 : -1]
    flat = queries.reshape(*lead, rest.numel(), queries.shape[-1])
    return (flat @ keys.mT).reshape(*lead, *rest, keys.shape[-2])
