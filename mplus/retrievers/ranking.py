"""Ranking by score, also of more rows than fit at once: score descending, ties by lowest position, NaN last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mplus.errors import InputError
from mplus.stores.base import Chunk

BLOCK = 2**16
"""Scores held at a time by ``best_rows``, all texts together; more where many rows are wanted."""
_LOW = 0xFFFFFFFF


def top_places(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find positions ``[min(k, m)]`` of the best of ``scores`` ``[m]`` float32, and the scores there; NaN as -inf.

    Raises:
        InputError: scores of another dtype.
    """
    positions = torch.arange(scores.shape[-1], device=scores.device)
    places, best = unranked(top(ranks_of(scores, positions), k, last=True))
    return places, best


def best_rows(
    chunks: Sequence[Chunk], texts: int, k: int, score: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Find the ``min(k, rows)`` best rows for each of several texts, a block of rows at a time.

    Args:
        chunks: of a store, with the column "key".
        texts: how many.
        k: largest number of rows for each.
        score: makes ``[texts, m]`` float32 of keys ``[m, r]``.

    Returns:
        For each text ids ``[n]`` int64 and scores ``[n]``: score descending, ties by lowest id.
    """
    best: Tensor | None = None
    blocks: list[Tensor] = []
    start = 0
    for ids, keys, live in _blocks(chunks, max(BLOCK // texts, 4 * k, 1)):
        scores = score(keys).to(ids.device)
        scores = scores if live is None else scores[:, live]
        positions = torch.arange(start, start + scores.shape[-1], device=ids.device)
        if best is None:
            best = ranks_of(scores, positions)
        else:
            best = top(best, k)
            promising = _promising(scores, best, k)
            if promising is not None:
                scores, positions = scores[:, promising], positions[promising]
            best = torch.cat([best, ranks_of(scores, positions)], -1)
        blocks.append(ids if live is None else ids[live])
        start += len(blocks[-1])
    if best is None:
        return [(torch.empty(0, dtype=torch.int64), torch.empty(0))] * texts
    places, scores = unranked(top(best, k, last=True))
    return [(_ids_at(blocks, own), there) for own, there in zip(places, scores, strict=True)]


def _promising(scores: Tensor, best: Tensor, k: int) -> Tensor | None:
    """Find the scores that can still be among the ``k`` best of the only text; None: any can, or texts are several.

    Ranking takes several times as long as comparing, and behind the first blocks few rows are left.
    """
    if best.shape != (1, k) or k == 0:
        return None
    _, lowest = unranked(best.min())
    # Of equal scores the earlier one counts. Nothing compares with NaN, which is lowest.
    return (scores[0] > lowest).nonzero().squeeze(1) if bool(lowest > -torch.inf) else None


def _blocks(chunks: Sequence[Chunk], rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield ids, keys, and the places among them where rows are (None: all), of up to ``rows`` places at a time."""
    for chunk in chunks:
        for low in range(0, len(chunk.ids), rows):
            own = slice(low, low + rows)
            live = None if chunk.live is None else chunk.live[own].nonzero().squeeze(1)
            yield chunk.ids[own], chunk.columns["key"][own], live


def ranks_of(scores: Tensor, positions: Tensor) -> Tensor:
    """Turn each score into a whole number, int64 of the same shape, that falls from better to worse.

    ``torch.topk`` leaves the choice among equal scores open; these numbers are all different. The upper half is the
    score, the lower half its position.
    """
    if scores.dtype != torch.float32:
        raise InputError(f"scores must be torch.float32, got {scores.dtype}")
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0  # -0.0 is equal to 0.0
    return _ascending(scores.view(torch.int32)).long().bitwise_left_shift_(32).add_(_LOW - positions)


def _ascending(bits: Tensor) -> Tensor:
    """Turn bits of float32 into int32 that order as the numbers do, and back: those of negative numbers fall."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def unranked(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``_ranks``: return positions and scores."""
    return _LOW - (ranks & _LOW), _ascending((ranks >> 32).int()).view(torch.float32)


def top(ranks: Tensor, k: int, last: bool = False) -> Tensor:
    """Return the ``k`` best, if there are so many; in order the ``last`` time."""
    return ranks.topk(min(k, ranks.shape[-1]), sorted=last).values


def _ids_at(blocks: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return ids of the rows at ``places`` ``[n]``, which count on from block to block."""
    if len(blocks) == 1:
        return blocks[0].index_select(0, places)
    ids, start = torch.empty_like(places), 0
    for block in blocks:
        here = ((places >= start) & (places < start + len(block))).nonzero().squeeze(1)
        ids[here] = block[places[here] - start]
        start += len(block)
    return ids
