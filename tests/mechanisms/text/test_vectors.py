"""Vectors of short texts, and late stopping by hand."""

from __future__ import annotations

import math
import pickle
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import ConfigError, MissingDependencyError
from mplus.mechanisms.notes import NotesMechanism
from mplus.mechanisms.text.mechanism import TextMechanism
from mplus.mechanisms.text.stopping import LateStopping
from mplus.mechanisms.text.vectors import TextVectors, vectors_name

if TYPE_CHECKING:
    from collections.abc import Sequence


class Layers:
    """Stands in for a decoder; counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def vectors(self, texts: Sequence[str], layer: int) -> torch.Tensor:
        self.asked += texts
        return torch.tensor([[float(len(text)), float(layer)] for text in texts])


def test_ngrams_of_similar_names_are_similar() -> None:
    one, other, third, same = TextVectors("ngrams").of(["Apple Inc.", "Apple  inc", "Lisbon", "apple inc."], None)
    assert float(one @ other) > 0.8
    assert float(one @ third) < 0.1
    assert torch.equal(one, same)
    assert all(abs(float(vector.norm()) - 1) < 1e-6 for vector in TextVectors("ngrams").of(["a", "\ud800"], None))
    assert TextVectors("ngrams").of([], None).shape == (0, 1)


def test_empty_texts_are_near_to_nothing() -> None:
    layers: Any = Layers()
    vectors = TextVectors("hidden:3")
    assert vectors.of(["a", " ", "b", ""], layers).norm(dim=-1).tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])
    assert layers.asked == ["a", "b"]
    assert vectors.of([""], layers).tolist() == [[0.0]]
    assert vectors.of(["", "a"], layers).shape == (2, 2)


def test_each_text_is_computed_once_and_only_some_are_kept() -> None:
    layers: Any = Layers()
    vectors = TextVectors("hidden:3")
    found = vectors.of(["a", "bbbb", "a"], layers)
    assert torch.allclose(found[1], torch.tensor([0.8, 0.6]))
    assert torch.equal(found[0], found[2])
    vectors.of(["bbbb", "cc"], layers)
    assert layers.asked == ["a", "bbbb", "cc"]
    for other in "defgh":
        vectors.of([other], layers)
    vectors.of(["a"], layers)
    assert layers.asked.count("a") == 2, "what was not compared for a while is let go"
    assert pickle.loads(pickle.dumps(vectors)).source == "hidden:3"


def test_an_encoder_is_loaded_once_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        def __init__(self, name: str) -> None:
            loaded.append(name)

        def encode(self, texts: list[str], **options: Any) -> torch.Tensor:
            return torch.tensor([[3.0 * len(text), 4.0 * len(text)] for text in texts])

    loaded: list[str] = []
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    vectors = TextVectors("encoder:mine")
    assert torch.allclose(vectors.of(["a", "bb"], None), torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    vectors.of(["c"], None)
    assert loaded == ["mine"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match="vectors = 'encoder:mine' needs the package 'sentence_tra"):
        TextVectors("encoder:mine").of(["a"], None)


@pytest.mark.parametrize("wrong", ["", "words", "hidden:", "hidden:01", "hidden:-1", "encoder:", 3, None])
def test_names_of_other_vectors_are_refused(wrong: Any) -> None:
    attribute: Any = type("Attribute", (), {"name": "vectors"})
    with pytest.raises(ConfigError, match="vectors must be"):
        vectors_name(None, attribute, wrong)


STEPS = ((0.1, 0.8), (0.51, 0.49), (0.999, 0.001))


def test_late_stopping_waits_for_the_best_place() -> None:
    late = LateStopping(prompt=4, patience=2)
    done = [late.step(math.log(closing), math.log(other)) for closing, other in STEPS]
    assert done == [False, False, False], "the best place is the newest one"
    assert late.cut == 2
    assert late.places[1] == pytest.approx((math.log(0.8) + math.log(0.51)) / 5)
    assert late.step(math.log(0.2), math.log(0.1))
    assert late.cut == 2


def test_without_a_place_there_is_no_cut() -> None:
    late = LateStopping(prompt=4, patience=1)
    assert not late.step(-2.0, -1.0)
    assert late.cut is None


def test_a_variant_that_a_mechanism_does_not_know_is_refused() -> None:
    config = mplus.MPlusConfig(mechanism="notes", variant="published")
    with pytest.raises(ConfigError, match="variant means nothing to the mechanism 'notes'"):
        NotesMechanism.settle(config, None)
    both = type("Both", (NotesMechanism,), {"variants": ("paper", "published")})
    assert issubclass(both, TextMechanism)
    assert both.settle(config, None).variant == "published"
