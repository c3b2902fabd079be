"""Ranking by score, also of more rows than fit at once: score descending, ties by lowest position, NaN last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError
from mplus.stores.base import Chunk

BLOCK = 2**20
"""Scores held at a time by ``best_rows``, all texts together; more where many rows are wanted."""
FEW = 2**13
"""Rows that are all ranked: looking for those that need be takes longer."""
MANY = 8
"""Times as many scores as are wanted from which on a sample of them tells which to look at."""
SAMPLED = 16
"""Every so-manieth score is in the sample."""
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
    for pieces in _together(chunks, max(BLOCK // texts, 4 * k, 1)):
        ranks = _ranks_of_best(pieces, texts, k, start, score)
        best = ranks if best is None else top(torch.cat([best, ranks], -1), k)
        blocks += [piece.ids for piece in pieces]
        start += sum(piece.ids.shape[0] for piece in pieces)
    if best is None:
        return [(torch.empty(0, dtype=torch.int64), torch.empty(0))] * texts
    places, scores = unranked(top(best, k, last=True))
    return [(_ids_at(blocks, own), there) for own, there in zip(places, scores, strict=True)]


@define(frozen=True, eq=False)
class _Piece:
    """Places of a chunk: ``[m]`` ids, ``[m, r]`` keys, and ``[m]`` bool where there are rows; None: at all of them."""

    ids: Tensor
    keys: Tensor
    live: Tensor | None


def _together(chunks: Sequence[Chunk], places: int) -> Iterator[list[_Piece]]:
    """Yield pieces of chunks, as many together as have up to so many places."""
    pieces, left = list[_Piece](), places
    for chunk in chunks:
        low, count, keys = 0, chunk.ids.shape[0], chunk.columns["key"]
        while low < count:
            own = slice(low, low + left)
            whole = count <= left and not low
            piece = _Piece(chunk.ids, keys, chunk.live) if whole else _Piece(chunk.ids[own], keys[own], _at(chunk, own))
            pieces.append(piece)
            low, left = low + piece.ids.shape[0], left - piece.ids.shape[0]
            if not left:
                yield pieces
                pieces, left = [], places
    if pieces:
        yield pieces


def _at(chunk: Chunk, places: slice) -> Tensor | None:
    return None if chunk.live is None else chunk.live[places]


def _ranks_of_best(
    pieces: Sequence[_Piece], texts: int, k: int, start: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ranks ``[texts, n]``, those of the ``min(k, rows)`` best rows among them; ``start``: the first position.

    Of many rows most are told apart by a look for the k-th score, and only those that are not below it are ranked.
    """
    scores, live = _scores_of(pieces, texts, score)
    wanted = min(k, scores.shape[1])
    if scores.shape[1] <= FEW or not wanted:
        ranks = ranks_of(scores, torch.arange(start, start + scores.shape[1], device=scores.device))
        return ranks if live is None else ranks[:, live]
    # NaN counts as the worst: how a sort or topk places it is left open.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if live is not None:
        scores.masked_fill_(~live, -torch.inf)
    likely = _likely(scores, wanted) if scores.shape[1] >= MANY * wanted else []
    if likely and all(len(here) >= wanted for here in likely):
        pairs = zip(scores, likely, strict=True)
        return torch.stack([top(ranks_of(own[here], here + start), k) for own, here in pairs])
    values, places = scores.topk(wanted, sorted=False)
    lowest = values.amin(-1, keepdim=True)
    counts = (scores >= lowest).sum(-1).tolist()
    found = []
    for own, here, least, count in zip(scores, places, lowest.flatten().tolist(), counts, strict=True):
        if least == -math.inf and live is not None:  # removed rows score that, as rows may that are there
            here = live.nonzero().squeeze(1)  # noqa: PLW2901
        elif count > wanted:  # several rows have the k-th score, and topk has chosen among them as it likes
            here = (own >= least).nonzero().squeeze(1)  # noqa: PLW2901
        found.append(top(ranks_of(own[here], here + start), k))
    return torch.stack(found)


def _likely(scores: Tensor, wanted: int) -> list[Tensor]:
    """Return for each of ``scores`` ``[texts, m]`` the places of all that are as high as about the ``wanted`` best.

    How high these are is guessed from a sample: the places may be fewer, or by chance many, but no other score is as
    high. Scores of -inf, which removed rows have, are left out.
    """
    sample = scores[:, ::SAMPLED]
    # A quarter more than the share of the sample, and some: a threshold too low costs little, one too high a second
    # look.
    count = min(wanted // SAMPLED * 5 // 4 + SAMPLED, sample.shape[1])
    lowest = sample.topk(count, sorted=False).values.amin(-1, keepdim=True)
    return [own.nonzero().squeeze(1) for own in (scores >= lowest) & (scores > -torch.inf)]


def _scores_of(pieces: Sequence[_Piece], texts: int, score: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the scores ``[texts, m]`` of all pieces, and ``[m]`` bool, False at removed rows; None: there are none."""
    device = pieces[0].ids.device
    if len(pieces) == 1:
        return _checked(score(pieces[0].keys)).to(device), pieces[0].live
    counts = [piece.ids.shape[0] for piece in pieces]
    scores = torch.empty(texts, sum(counts), device=device)
    for piece, own in zip(pieces, scores.split(counts, -1), strict=True):
        own.copy_(_checked(score(piece.keys)))
    if all(piece.live is None for piece in pieces):
        return scores, None
    parts = [torch.ones_like(piece.ids, dtype=torch.bool) if piece.live is None else piece.live for piece in pieces]
    return scores, torch.cat(parts)


def ranks_of(scores: Tensor, positions: Tensor) -> Tensor:
    """Turn each score into a whole number, int64 of the same shape, that falls from better to worse.

    ``torch.topk`` leaves the choice among equal scores open; these numbers are all different. The upper half is the
    score, the lower half its position.
    """
    scores = (
        _checked(scores).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    )  # -0.0 is equal to 0.0
    return _ascending(scores.view(torch.int32)).long().bitwise_left_shift_(32).add_(_LOW - positions)


def _checked(scores: Tensor) -> Tensor:
    if scores.dtype != torch.float32:
        raise InputError(f"scores must be torch.float32, got {scores.dtype}")
    return scores


def _ascending(bits: Tensor) -> Tensor:
    """Turn bits of float32 into int32 that order as the numbers do, and back: those of negative numbers fall."""
    # ``>>`` makes 0 or all ones of the sign: the other bits of negative numbers are turned round, others stay.
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def unranked(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``_ranks``: return positions and scores."""
    return _LOW - (ranks & _LOW), _ascending((ranks >> 32).int()).view(torch.float32)


def top(ranks: Tensor, k: int, last: bool = False) -> Tensor:
    """Return the ``k`` best, if there are so many; in order the ``last`` time."""
    return ranks.topk(min(k, ranks.shape[-1]), sorted=last).values


def _ids_at(blocks: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return ids of the rows at ``places`` ``[n]``, which count on from block to block."""
    if sum(map(len, blocks)) <= BLOCK:  # one copy of the ids takes less time than a look at the places of each block
        return (blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))).index_select(0, places)
    ids, start = torch.empty_like(places), 0
    for block in blocks:
        here = ((places >= start) & (places < start + len(block))).nonzero().squeeze(1)
        ids[here] = block[places[here] - start]
        start += len(block)
    return ids
