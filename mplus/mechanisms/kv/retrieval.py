"""Which chunks a question brings back: scored by a chunk retriever, as many as there is room for."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from mplus.mechanisms.search import choose
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, Query


@define(frozen=True, eq=False)
class ChosenChunks:
    """What one question brings back from one stream.

    Attributes:
        chunks: ``[k]`` int64, places in the table of chunks, the best first.
        scores: ``[k]`` float64, of each.
    """

    chunks: Tensor
    scores: Tensor


@define(frozen=True, kw_only=True)
class ChunkBudget:
    """How much comes back at most: ``tokens`` in all, and ``chunks``, None: as many as fit."""

    tokens: int
    chunks: int | None = None


def choose_chunks(
    retriever: ChunkRetriever,
    query: Query,
    chunks: Chunks,
    prompt: Tensor,
    budget: ChunkBudget,
    min_score: float | None = None,
) -> ChosenChunks:
    """Return the best chunks above the threshold that fit; of equal ones the newer.

    Args:
        retriever: scores them.
        query: the question.
        chunks: of the stream.
        prompt: ``[n]``, ids that the decoder reads anyway: a chunk whose ids stand there is not brought back.
        budget: the most there is room for.
        min_score: only chunks with a higher score; None: the retriever's own threshold.
    """
    if not len(chunks) or not len(query.ids):
        return ChosenChunks(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    scores = retriever.scores(query, chunks)
    able = (scores > (retriever.threshold if min_score is None else min_score)).nonzero().squeeze(1)
    able = able[~standing_in(prompt, chunks, able)]
    chosen = able[choose(chunks.lengths[able], scores[able], budget.tokens)[: budget.chunks]]
    return ChosenChunks(chosen, scores[chosen])


def standing_in(prompt: Tensor, chunks: Chunks, some: Tensor) -> Tensor:
    """Return for each of ``some`` ``[k]`` chunks whether ``prompt`` ``[n]`` has its ids one behind the other, bool."""
    prompt = prompt.cpu().to(chunks.ids.dtype)
    ends = chunks.lengths.cumsum(0)
    # Most chunks are told from the prompt by their first token already.
    first = torch.isin(chunks.ids[(ends - chunks.lengths)[some]], prompt)
    found = torch.zeros_like(first)
    for place in first.nonzero().squeeze(1).tolist():
        end, length = int(ends[some[place]]), int(chunks.lengths[some[place]])
        if length <= len(prompt):
            found[place] = bool((prompt.unfold(0, length, 1) == chunks.ids[end - length : end]).all(1).any())
    return found
