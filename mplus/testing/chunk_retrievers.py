"""What every ``ChunkRetriever`` must do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from attrs import evolve
from torch import Tensor

from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, ChunkShape, Query

SHAPE = ChunkShape(depth=3, hidden_size=8)
WORDS = 40
"""Different words of the texts that retrievers are tried with."""


class SmallTokenizer:
    """A tokenizer of words and numbers: "w0" has id 0, and every other word one of the ids of ``WORDS`` words."""

    all_special_ids: ClassVar[tuple[int, ...]] = ()

    def __len__(self) -> int:
        return WORDS

    @overload
    def __call__(
        self, texts: str, /, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> dict[str, list[int]]: ...
    @overload
    def __call__(
        self, texts: list[str], /, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> dict[str, list[list[int]]]: ...
    def __call__(
        self, texts: str | list[str], /, *, add_special_tokens: bool = False, verbose: bool = True
    ) -> dict[str, list[int]] | dict[str, list[list[int]]]:
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts)}
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        # By their letters and not by ``hash``, which differs from one process to the next.
        return [
            int(word[1:]) if word[:1] == "w" and word[1:].isdigit() else sum(map(ord, word)) % WORDS
            for word in text.split()
        ]

    def convert_ids_to_tokens(self, ids: int | list[int], /) -> str | list[str]:
        """Return the pieces of ids, each a word."""
        if isinstance(ids, int):
            return f"Ġw{ids}"
        return [f"Ġw{one}" for one in ids]

    def decode(self, ids: Tensor | list[int], /, *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return " ".join(f"w{one}" for one in torch.as_tensor(ids).tolist())


class SmallDecoder:
    """A decoder of fixed random embeddings, whose hidden states know what stood in front of each token."""

    weights = "small"

    def __init__(self, shape: ChunkShape = SHAPE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.randn(shape.depth + 1, WORDS, shape.hidden_size, generator=generator)

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Return depth + 1 times ``[B, n, d]`` of ids ``[B, n]``."""
        return [layer[ids] + 0.1 * layer[ids].cumsum(1) for layer in self.layers]


class ChunkRetrieverConformance:
    """Subclass it in a test module and set ``implementation``, or override ``make``.

    Attributes:
        implementation: the chunk retriever class under test.
        tolerance: by how much scores may differ with the batch in which keys are made; None: not at all.
    """

    implementation: ClassVar[type[ChunkRetriever]]
    tolerance: ClassVar[float] = 1e-3

    def make(self) -> ChunkRetriever:
        """Return a new retriever."""
        return self.implementation()

    # ------------------------------------------------------------------ helpers

    def texts(self, count: int) -> list[Tensor]:
        """Return ``count`` texts of different lengths, ids ``[n]``."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(0, WORDS, (4 + place % 5,), generator=generator) for place in range(count)]

    def chunks(self, retriever: ChunkRetriever, texts: Sequence[Tensor]) -> Chunks:
        """Return the chunks of texts as a memory has them, each of a pass of its own."""
        tokenizer, decoder = SmallTokenizer(), SmallDecoder()
        known = retriever.calibrate(decoder, tokenizer)
        keys = torch.empty(0, 0)
        for text in texts:
            ids = text[None]
            states = decoder.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
            made = retriever.chunk_keys(ids, states if retriever.collect else (), known, tokenizer)
            keys = torch.cat([keys.to(made), made]) if len(keys) else made
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        return Chunks(lengths, torch.cat(list(texts)).int(), keys, known, tokenizer)

    def query(self, retriever: ChunkRetriever, text: Tensor, chunks: Chunks) -> Query:
        """Return a question, asked by itself."""
        mask = torch.ones(1, len(text), dtype=torch.bool)
        (key,) = retriever.query_keys(text[None], mask, SmallDecoder(), chunks.calibration, chunks.tokenizer)
        return Query(text, key)

    def without(self, chunks: Chunks, gone: int) -> Chunks:
        """Return the chunks without one of them."""
        kept = torch.arange(len(chunks)) != gone
        ids = chunks.ids[kept.repeat_interleave(chunks.lengths)]
        return evolve(chunks, lengths=chunks.lengths[kept], ids=ids, keys=chunks.keys[kept])

    # ------------------------------------------------------------------ tests

    def test_it_has_a_name_and_options(self) -> None:
        retriever = self.make()
        assert isinstance(retriever, ChunkRetriever)
        assert isinstance(retriever.name, str)
        assert isinstance(retriever.options, type(retriever).Options)

    def test_keys_have_the_width_it_says(self) -> None:
        retriever = self.make()
        chunks = self.chunks(retriever, self.texts(3))
        assert chunks.keys.shape == (3, retriever.key_size(SHAPE))
        assert self.query(retriever, self.texts(1)[0], chunks).key.shape == (retriever.key_size(SHAPE),)
        assert bool(torch.isfinite(chunks.keys).all())

    def test_scores_are_one_number_for_each_chunk_and_always_the_same(self) -> None:
        retriever = self.make()
        chunks = self.chunks(retriever, self.texts(6))
        query = self.query(retriever, self.texts(9)[-1], chunks)
        scores = retriever.scores(query, chunks)
        assert (scores.dtype, scores.shape, scores.device.type) == (torch.float64, (6,), "cpu")
        assert torch.equal(retriever.scores(query, chunks), scores)
        assert not bool(scores.isnan().any())
        assert retriever.threshold(chunks) < torch.inf
        assert torch.equal(self.make().scores(query, self.chunks(self.make(), self.texts(6))), scores)

    def test_chunks_that_came_one_by_one_are_scored_as_those_that_came_at_once(self) -> None:
        retriever, texts = self.make(), self.texts(7)
        for count in range(1, 7):  # asks in between, which must leave no trace
            chunks = self.chunks(retriever, texts[:count])
            retriever.scores(self.query(retriever, texts[0], chunks), chunks)
        chunks = self.chunks(retriever, texts)
        query = self.query(retriever, texts[3][:3], chunks)
        fresh = self.make()
        assert torch.equal(retriever.scores(query, chunks), fresh.scores(query, self.chunks(fresh, texts)))

    def test_a_chunk_that_was_forgotten_leaves_nothing(self) -> None:
        retriever, texts = self.make(), self.texts(6)
        chunks = self.chunks(retriever, texts)
        query = self.query(retriever, texts[2], chunks)
        retriever.scores(query, chunks)
        left = self.without(chunks, 2)
        found, fresh = retriever.scores(query, left), self.make()
        assert torch.equal(found, fresh.scores(query, self.chunks(fresh, [*texts[:2], *texts[3:]])))

    def test_a_question_in_a_batch_is_asked_as_if_alone(self) -> None:
        retriever, texts = self.make(), self.texts(5)
        chunks = self.chunks(retriever, texts)
        longest = max(len(text) for text in texts)
        ids = torch.stack([torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts])
        mask = torch.stack([torch.arange(longest) < len(text) for text in texts])
        keys = retriever.query_keys(ids, mask, SmallDecoder(), chunks.calibration, chunks.tokenizer)
        for text, key in zip(texts, keys, strict=True):
            alone = retriever.scores(self.query(retriever, text, chunks), chunks)
            torch.testing.assert_close(retriever.scores(Query(text, key), chunks), alone, rtol=0, atol=self.tolerance)

    def test_a_copy_and_a_calibration_that_was_saved_do_as_well(self) -> None:
        retriever, texts = self.make(), self.texts(5)
        chunks = self.chunks(retriever, texts)
        query = self.query(retriever, texts[1], chunks)
        scores, least = retriever.scores(query, chunks), retriever.threshold(chunks)
        saved = evolve(chunks, keys=chunks.keys.clone(), calibration=chunks.calibration.clone())
        for again in (copy.deepcopy(retriever), pickle.loads(pickle.dumps(retriever)), self.make()):  # noqa: S301
            assert torch.equal(again.scores(query, saved), scores)
            assert again.threshold(saved) == least

    def test_without_a_tokenizer_chunks_are_scored_all_the_same(self) -> None:
        retriever, text = self.make(), self.texts(1)[0]
        nothing = torch.empty(0)
        states = SmallDecoder().hidden_states(text[None], torch.ones(1, len(text), dtype=torch.bool))
        keys = retriever.chunk_keys(text[None], states if retriever.collect else (), nothing, None)
        chunks = Chunks(torch.tensor([len(text)]), text.int(), keys)
        assert not bool(retriever.scores(self.query(retriever, text, chunks), chunks).isnan().any())

    def test_what_it_was_told_is_found(self) -> None:
        """Most chunks are the best for their own words."""
        retriever, texts = self.make(), self.texts(12)
        chunks = self.chunks(retriever, texts)
        best = [int(retriever.scores(self.query(retriever, text, chunks), chunks).argmax()) for text in texts]
        assert sum(place == found for place, found in enumerate(best)) >= len(texts) * 3 / 4
