"""Which chunks a question brings back: scored by a chunk retriever, reordered by the decoder, as many as have room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mplus.mechanisms.decoder import Decoder
from mplus.mechanisms.kv.front import Front
from mplus.mechanisms.kv.passes import BegunDecoder, run_behind
from mplus.mechanisms.kv.state import state_of
from mplus.mechanisms.search import choose
from mplus.memory.state import StreamView
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, Query

NATS = 0.5
"""What a nat of the question's likelihood behind a chunk counts for, in the units of the scores of "hybrid"."""


NEAR = 1.0
"""Scores that were reordered are near-equal where they differ by no more: the likelihood has told the others apart."""
BEHIND = 1e6
"""What keeps chunks that were not reordered behind those that were."""


@define(frozen=True, eq=False)
class Asked:
    """The question that one row of a batch asks of its stream.

    Attributes:
        view: the stream.
        begin: ``[L, b, w]``, rows of what its chunks were written behind.
        question: ``[q]`` int64, the ids to ask with; at least one.
        prompt: ``[n]`` int64, ids that the decoder reads anyway: a chunk whose ids stand there is not brought back.
        room: tokens that may come back.
    """

    view: StreamView
    begin: Tensor
    question: Tensor
    prompt: Tensor
    room: int

    def chunks(self, tokenizer: Any) -> Chunks:
        """Return the chunks of the stream, as a retriever sees them."""
        state = state_of(self.view)
        return Chunks(state.chunk_length, state.token_ids, state.chunk_key, state.calibration, tokenizer)


@define(frozen=True, eq=False)
class ChosenChunks:
    """The chunks that one question brings back from one stream.

    Attributes:
        chunks: ``[k]`` int64, places in the table of chunks, the best first.
        scores: ``[k]`` float64, of each.
    """

    chunks: Tensor
    scores: Tensor

    def at(self, places: Tensor) -> ChosenChunks:
        """Return those at ``places`` ``[m]``, in that order."""
        return ChosenChunks(self.chunks[places], self.scores[places])


@define(frozen=True, kw_only=True)
class Retrieval:
    """Chooses chunks for the questions of a batch.

    Attributes:
        retriever: scores them.
        chunks: brought back at most; None: as many as fit.
        min_score: only chunks with a higher score; 0: all; None: the retriever's own threshold.
        rerank: so many of the best are reordered by how likely the decoder finds the question behind each; 0: none.
    """

    retriever: ChunkRetriever
    chunks: int | None = None
    min_score: float | None = None
    rerank: int = 0

    @torch.no_grad()
    def choose(self, decoder: Decoder, asked: Sequence[Asked], tokenizer: Any) -> list[ChosenChunks]:
        """Return the best chunks above the threshold that fit, for each row; of near-equal ones the newest first."""
        queries = self.queries(decoder, asked, tokenizer)
        found = [self._able(one, own, tokenizer) for one, own in zip(asked, queries, strict=True)]
        weights = [one.scores.clone() for one in found]
        best = [one.scores.argsort(descending=True, stable=True)[: self.rerank] for one in found]
        several = [place for place, first in enumerate(best) if len(first) > 1]
        likely = _likelihoods(decoder, [(asked[place], found[place].chunks[best[place]]) for place in several])
        for place, nats in zip(several, likely, strict=True):
            reordered = weights[place][best[place]] + NATS * (nats - nats.max())
            weights[place] -= BEHIND
            weights[place][best[place]] = reordered
        near = [NEAR if place in several else self.retriever.near for place in range(len(asked))]
        return [self._fitting(*one) for one in zip(asked, found, weights, near, strict=True)]

    @torch.no_grad()
    def queries(self, decoder: Decoder, asked: Sequence[Asked], tokenizer: Any) -> list[list[Query]]:
        """Return what each row asks with: its question, and that without what is said behind a question mark.

        The keys of all that is asked of streams with the same statistics are made in one pass.
        """
        texts = [(row, ids) for row, one in enumerate(asked) for ids in _parts(one.question, tokenizer)]
        states = [state_of(one.view) for one in asked]
        groups: list[list[tuple[int, Tensor]]] = []
        for row, ids in texts:
            known = states[row].calibration
            alike = [group for group in groups if torch.equal(states[group[0][0]].calibration, known)]
            alike[0].append((row, ids)) if alike else groups.append([(row, ids)])
        found: list[list[Query]] = [[] for _ in asked]
        for group in groups:
            ids, mask = padded([own for _, own in group])
            rows = [asked[row] for row, _ in group]
            reader = BegunDecoder(decoder, [one.view for one in rows], [one.begin for one in rows])
            keys = self.retriever.query_keys(ids, mask, reader, states[group[0][0]].calibration, tokenizer)
            for (row, own), key in zip(group, keys, strict=True):
                found[row].append(Query(own, key))
        return found

    def _able(self, asked: Asked, queries: Sequence[Query], tokenizer: Any) -> ChosenChunks:
        """Return all chunks above the threshold that have room and do not stand in the prompt, the newest first."""
        chunks = asked.chunks(tokenizer)
        scores = torch.stack([self.retriever.scores(query, chunks) for query in queries]).amax(0)
        least = self.retriever.threshold(chunks) if self.min_score is None else self.min_score or -torch.inf
        able = ((scores > least) & (chunks.lengths <= asked.room)).nonzero().squeeze(1).flip(0)
        able = able[~standing_in(asked.prompt, chunks, able)]
        return ChosenChunks(able, scores[able])

    def _fitting(self, asked: Asked, found: ChosenChunks, weights: Tensor, near: float) -> ChosenChunks:
        """Return as many of the chunks as may come back, by ``weights`` ``[k]``; ``found`` has the newest first."""
        if not len(found.chunks):
            return found
        newest = torch.where(weights >= weights.max() - near, found.chunks, -1).argmax()
        weights = weights.clone()
        weights[newest] = weights.max() + 1
        order = choose(state_of(asked.view).chunk_length[found.chunks], weights, asked.room)
        return found.at(order[: self.chunks])


def _parts(question: Tensor, tokenizer: Any) -> list[Tensor]:
    """Return a question, and what it has up to its last question mark where that is less: an instruction may follow."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [question]
    marks = [place for place, piece in enumerate(tokenizer.convert_ids_to_tokens(question.tolist())) if "?" in piece]
    return [question] if not marks or marks[-1] + 1 == len(question) else [question, question[: marks[-1] + 1]]


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, n]`` of texts, padded on the right, and a bool mask ``[B, n]`` that is False there."""
    lengths = torch.tensor([len(text) for text in texts])
    return pad_sequence(list(texts), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


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


def _likelihoods(decoder: Decoder, asked: Sequence[tuple[Asked, Tensor]]) -> list[Tensor]:
    """Return the logarithm of the likelihood of each row's question behind each of its chunks, ``[k]`` float64."""
    if not asked:
        return []
    pairs = [(one, chunk) for one, chunks in asked for chunk in chunks.split(1)]
    ids, mask = padded([one.question for one, _ in pairs])
    front = Front.before_text(
        decoder.kept,
        [one.view for one, _ in pairs],
        [state_of(one.view).places(chunk) for one, chunk in pairs],
        [one.begin for one, _ in pairs],
    )
    logits = run_behind(decoder, front, ids, mask=mask, collect={"logits"}).need_logits()
    likely = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)
    nats = (likely * mask[:, 1:].to(likely.device)).sum(1).double().cpu()
    return list(nats.split([len(chunks) for _, chunks in asked]))
