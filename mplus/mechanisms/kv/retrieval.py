"""Which chunks a question brings back: scored by a chunk retriever, reordered by the decoder, as many as have room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.mechanisms.decoder import Decoder
from mplus.mechanisms.kv.asked import Asked, ChosenChunks, Question
from mplus.mechanisms.kv.passes import BegunDecoder, padded
from mplus.mechanisms.kv.ranking import Ranking, ranked
from mplus.mechanisms.search import choose
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks
from mplus.tokenizer import Tokenizer, says_pieces

BEHIND = 1e6
"""What keeps chunks that were not reordered behind those that were."""


@define(frozen=True, kw_only=True)
class Retrieval:
    """Chooses chunks for the questions of a batch.

    Attributes:
        retriever: scores them.
        chunks: brought back at most; None: as many as fit.
        min_score: only chunks with a higher score; 0: all; None: the retriever's own threshold.
        rerank: so many of the best are reordered (``ranked``); 0: none.
        likelihood: they are reordered by the likelihood of the question, too.
    """

    retriever: ChunkRetriever
    chunks: int | None = None
    min_score: float | None = None
    rerank: int = 0
    likelihood: bool = False

    @torch.no_grad()
    def choose(self, decoder: Decoder, asked: Sequence[Asked], tokenizer: Tokenizer | None) -> list[ChosenChunks]:
        """Return the best chunks above the threshold that fit, for each row; of near-equal ones the newest first."""
        questions = self.queries(decoder, asked, tokenizer)
        found = [self._able(one, own, tokenizer) for one, own in zip(asked, questions, strict=True)]
        rankings = [self._by_scores(one.scores) for one in found]
        best = [one.scores.argsort(descending=True, stable=True)[: self.rerank] for one in found]
        several = [row for row, first in enumerate(best) if len(first) > 1]
        rows = [(asked[row], questions[row], found[row].at(best[row])) for row in several]
        anew = ranked(decoder, rows, self.retriever.near, self.likelihood)
        for row, ranking in zip(several, anew, strict=True):
            weights, near = rankings[row].weights - BEHIND, torch.zeros_like(rankings[row].near)
            weights[best[row]], near[best[row]] = ranking.weights, ranking.near
            rankings[row] = Ranking(weights, near)
        return [self._fitting(*one) for one in zip(asked, found, rankings, strict=True)]

    @torch.no_grad()
    def queries(self, decoder: Decoder, asked: Sequence[Asked], tokenizer: Tokenizer | None) -> list[list[Question]]:
        """Return what each row asks with: its question, and that without what is said behind a question mark.

        The keys of all that is asked of streams with the same statistics are made in one pass.
        """
        texts = [(row, ids) for row, one in enumerate(asked) for ids in _parts(one.question, tokenizer)]
        groups: list[list[tuple[int, Tensor]]] = []
        for row, ids in texts:
            known = asked[row].state.calibration
            alike = [group for group in groups if torch.equal(asked[group[0][0]].state.calibration, known)]
            alike[0].append((row, ids)) if alike else groups.append([(row, ids)])
        found: list[list[Question]] = [[] for _ in asked]
        for group in groups:
            for (row, _), question in zip(group, self._read(decoder, asked, group, tokenizer), strict=True):
                found[row].append(question)
        return found

    def _read(
        self, decoder: Decoder, asked: Sequence[Asked], texts: Sequence[tuple[int, Tensor]], tokenizer: Tokenizer | None
    ) -> list[Question]:
        """Return the questions ``texts``, ids with the row that asks them, as they are compared with chunks."""
        ids, mask = padded([own for _, own in texts])
        rows = [asked[row] for row, _ in texts]
        layers = [one.state.late_interaction[:-2].long().tolist() if self.rerank > 1 else [] for one in rows]
        reader = BegunDecoder(decoder, [one.view for one in rows], [one.begin for one in rows], any(layers))
        keys = self.retriever.query_keys(ids, mask, reader, rows[0].state.calibration, tokenizer)
        values = reader.values(ids, mask) if any(layers) else []
        return [
            Question(own, key, torch.stack([values[layer][place, : len(own)] for layer in chosen]) if chosen else None)
            for place, ((_, own), key, chosen) in enumerate(zip(texts, keys, layers, strict=True))
        ]

    def _by_scores(self, scores: Tensor) -> Ranking:
        near = scores >= scores.max() - self.retriever.near if len(scores) else torch.empty(0, dtype=torch.bool)
        return Ranking(scores, near)

    def _able(self, asked: Asked, queries: Sequence[Question], tokenizer: Tokenizer | None) -> ChosenChunks:
        """Return all chunks above the threshold that have room and do not stand in the prompt, the newest first."""
        chunks = asked.chunks(tokenizer)
        scores = torch.stack([self.retriever.scores(query, chunks) for query in queries]).amax(0)
        # 0 asks for whatever there is, also for what scores below 0.
        least = self.retriever.threshold(chunks) if self.min_score is None else self.min_score or -torch.inf
        able = ((scores > least) & (chunks.lengths <= asked.room)).nonzero().squeeze(1).flip(0)
        able = able[~standing_in(asked.prompt, chunks, able)]
        return ChosenChunks(able, scores[able])

    def _fitting(self, asked: Asked, found: ChosenChunks, ranking: Ranking) -> ChosenChunks:
        """Return as many of the chunks as may come back; ``found`` has the newest first."""
        if not len(found.chunks):
            return found
        weights = ranking.weights.clone()
        # Of those that are about as good as the best one the newest comes first: chunks are numbered in order of
        # writing.
        weights[torch.where(ranking.near, found.chunks, -1).argmax()] = weights.max() + 1
        order = choose(asked.state.chunk_length[found.chunks], weights, asked.room)
        return found.at(order[: self.chunks])


def _parts(question: Tensor, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Return a question, and what it has up to its last question mark where that is less: an instruction may follow."""
    if not says_pieces(tokenizer):
        return [question]
    pieces = tokenizer.convert_ids_to_tokens(question.tolist())  # None for an id that the tokenizer does not have
    marks = [place for place, piece in enumerate(pieces) if "?" in (piece or "")]
    return [question] if not marks or marks[-1] + 1 == len(question) else [question, question[: marks[-1] + 1]]


def standing_in(prompt: Tensor, chunks: Chunks, some: Tensor) -> Tensor:
    """Return for each of ``some`` ``[k]`` chunks whether ``prompt`` ``[n]`` has its ids one behind the other, bool."""
    prompt = prompt.cpu().to(chunks.ids.dtype)
    ends = chunks.lengths.cumsum(0)
    # Most chunks are told from the prompt by their first token already.
    first = torch.isin(chunks.ids[(ends - chunks.lengths)[some]], prompt)
    found = torch.zeros_like(first)
    for place in first.nonzero().squeeze(1).tolist():
        end, length = int(ends[some[place]]), int(chunks.lengths[some[place]])
        # Compared with every run of so many ids of the prompt.
        if length <= len(prompt):
            found[place] = bool((prompt.unfold(0, length, 1) == chunks.ids[end - length : end]).all(1).any())
    return found
