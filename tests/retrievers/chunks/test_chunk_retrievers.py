"""Every chunk retriever of the registry, and what is special about some."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import MissingDependencyError
from mplus.retrievers.chunks import CHUNK_RETRIEVERS, ChunkRetriever, Chunks, Query
from mplus.retrievers.chunks.base import between
from mplus.retrievers.chunks.hidden import HiddenRetriever, Statistics
from mplus.retrievers.chunks.hybrid import HybridRetriever
from mplus.retrievers.chunks.statements import statements
from mplus.retrievers.chunks.words import WordRetriever
from mplus.testing.chunk_retrievers import SHAPE, WORDS, ChunkRetrieverConformance, SmallDecoder, SmallTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SmallEncoder:
    """Stands in for an encoder of sentence-transformers: counts words."""

    def __init__(self, model: str) -> None:
        self.model = model

    def get_sentence_embedding_dimension(self) -> int:
        return WORDS

    def encode(self, texts: Sequence[str], *, convert_to_tensor: bool, show_progress_bar: bool) -> Tensor:
        ids = [SmallTokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
        return torch.stack([torch.bincount(torch.tensor(one), minlength=WORDS).double() for one in ids])


@pytest.fixture
def sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SmallEncoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


class TestWords(ChunkRetrieverConformance):
    implementation = WordRetriever


class TestHidden(ChunkRetrieverConformance):
    implementation = HiddenRetriever


class TestHybrid(ChunkRetrieverConformance):
    implementation = HybridRetriever


@pytest.mark.usefixtures("sentence_transformers")
class TestDense(ChunkRetrieverConformance):
    def make(self) -> ChunkRetriever:
        return CHUNK_RETRIEVERS.get("dense")()


def test_every_one_is_tried() -> None:
    assert CHUNK_RETRIEVERS.names() == ["dense", "hidden", "hybrid", "trained", "words"]


def test_an_encoder_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r"'dense' needs the package .* pip install 'mplus\[dense\]'"):
        CHUNK_RETRIEVERS.build(mplus.MPlusConfig(retriever="dense").retriever)


def test_the_statements_are_few_and_different() -> None:
    texts = statements()
    assert len({one.passage for one in texts}) == len({one.question for one in texts}) == len(texts) == 60
    assert all(one.question.endswith("?") and one.passage.endswith(".") for one in texts)
    assert sum(len(f"{one.passage} {one.question}".split()) for one in texts) < 2500


def test_layers_that_tell_texts_apart_are_chosen() -> None:
    """Only layer 2 of 4 knows which passage a question belongs to; a large constant everywhere hides it."""
    generator = torch.Generator().manual_seed(0)
    passages, questions = (torch.randn(20, 4, 16, generator=generator) for _ in range(2))
    own = torch.randn(20, 16, generator=generator)
    passages[:, 2], questions[:, 2] = own + 50, own - 30
    passages[:, 3, 0] += 1000
    found = Statistics.of(passages, questions, 1)
    assert found.layers.tolist() == [2]
    again = Statistics.from_flat(found.flat())
    for name in ("layers", "chunks", "queries", "unrelated"):
        torch.testing.assert_close(getattr(again, name), getattr(found, name))
    assert len(Statistics.of(passages, questions, 9).layers) == 4


def test_the_unit_of_scores_is_the_deviation_of_those_of_unrelated_texts() -> None:
    _, similar = HiddenRetriever().calibrated(SmallDecoder(), SmallTokenizer())
    wrong = similar[~torch.eye(len(similar), dtype=torch.bool)]
    assert float(wrong.mean()) == pytest.approx(0, abs=1e-4)
    assert float(wrong.std()) == pytest.approx(1, abs=1e-4)


def test_the_threshold_lies_between_what_is_wrong_and_what_is_right() -> None:
    scores = torch.zeros(40, 40).fill_diagonal_(8.0)
    assert float(between(scores)) == 4.0
    scores[0, 0], scores[0, 1] = -99.0, 99.0  # an outlier moves nothing
    assert float(between(scores)) == 4.0


def test_hybrid_adds_both_and_goes_by_words_where_there_are_no_keys() -> None:
    suite, hybrid = TestHybrid(), HybridRetriever()
    texts = suite.texts(5)
    chunks = suite.chunks(hybrid, texts)
    query = suite.query(hybrid, texts[1], chunks)
    parts = [WordRetriever().scores(query, chunks), HiddenRetriever().scores(query, chunks)]
    assert torch.equal(hybrid.scores(query, chunks), parts[0] + parts[1])
    assert hybrid.key_size(SHAPE) == 3 * SHAPE.hidden_size
    bare = Chunks(chunks.lengths, chunks.ids, torch.empty(5, 0))
    asked = Query(query.ids, torch.empty(0))
    assert torch.equal(hybrid.scores(asked, bare), WordRetriever().scores(asked, bare))
    assert hybrid.threshold(bare) == 0
