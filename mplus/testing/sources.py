"""What every ``TurnSource`` must do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from mplus.training.batch import IGNORED, NO_ONE, Turn, TurnSource

STREAMS = 3


class SourceConformance:
    """Subclass it in a test module, set ``implementation`` and override ``make``.

    Attributes:
        implementation: the source class under test.
        requests: arguments of ``turn`` that it is asked for, one after the other.
    """

    implementation: ClassVar[Any]
    requests: ClassVar[Sequence[dict[str, Any]]] = ({"chunks": 1}, {"chunks": 3}, {"chunks": 2})

    def make(self, numbers: Sequence[int], seed: int) -> TurnSource:
        """A source for the streams ``numbers``, of which there may be ``STREAMS`` in all."""
        raise NotImplementedError("a SourceConformance must override make(numbers, seed)")

    # ------------------------------------------------------------------ helpers

    def turns(self, source: TurnSource, count: int = 12) -> list[Turn]:
        """The next ``count`` turns, by ``requests`` in a circle."""
        return [source.turn(**self.requests[step % len(self.requests)]) for step in range(count)]

    @staticmethod
    def one(turn: Turn, place: int) -> dict[str, Any]:
        """What the stream at ``place`` gets, without padding."""
        mask = turn.mask[place]
        found: dict[str, Any] = {"fresh": turn.fresh}
        for name, value in attrs.asdict(turn).items():
            if isinstance(value, Tensor) and name != "mask":
                row = value[place]
                of_text = value.ndim == 3 and value.shape == turn.mask.shape
                found[name] = [line[kept].tolist() for line, kept in zip(row, mask, strict=True)] if of_text else row
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}

    # ------------------------------------------------------------------ tests

    def test_has_options(self) -> None:
        assert issubclass(self.implementation, TurnSource)
        assert attrs.has(self.implementation.Options)

    def test_shapes_and_dtypes(self) -> None:
        for step, turn in enumerate(self.turns(self.make(range(STREAMS), 1))):
            chunks = self.requests[step % len(self.requests)].get("chunks", 1)
            batch, written, _ = turn.chunks.shape
            assert (batch, written) == (STREAMS, chunks)
            assert turn.sources.shape == (STREAMS, chunks)
            assert turn.texts.ndim == 3
            assert turn.about.shape == turn.texts.shape[:2]
            for name in ("labels", "mask", "queries", "answers"):
                value = getattr(turn, name)
                assert value is None or value.shape == turn.texts.shape, name
            for name in ("mask", "queries", "answers", "window_mask"):
                value = getattr(turn, name)
                assert value is None or value.dtype == torch.bool, name
            for name in ("chunks", "sources", "texts", "labels", "about"):
                assert getattr(turn, name).dtype == torch.int64, name

    def test_padding_is_on_the_right_and_never_predicted(self) -> None:
        for turn in self.turns(self.make(range(STREAMS), 1)):
            lengths = turn.mask.sum(-1, keepdim=True)
            assert torch.equal(turn.mask, torch.arange(turn.mask.shape[2]) < lengths)
            assert bool((turn.labels[~turn.mask] == IGNORED).all())
            for part in (turn.queries, turn.answers):
                assert part is None or not bool((part & ~turn.mask).any())
            if turn.windows is not None:
                assert turn.window_mask is not None
                assert turn.window_labels is not None
                assert bool((turn.window_labels[~turn.window_mask] == IGNORED).all())

    def test_a_label_is_its_token(self) -> None:
        predicted = 0
        for turn in self.turns(self.make(range(STREAMS), 1)):
            wanted = turn.labels != IGNORED
            assert torch.equal(turn.labels[wanted], turn.texts[wanted])
            assert not bool(wanted[..., 0].any()), "nothing precedes the first token of a text"
            if turn.answers is not None:
                assert bool(wanted[turn.answers].all())
            predicted += int(wanted.sum())
        assert predicted

    def test_a_text_is_about_what_its_stream_was_told(self) -> None:
        told: list[set[int]] = [set() for _ in range(STREAMS)]
        for turn in self.turns(self.make(range(STREAMS), 1), 24):
            for place in range(STREAMS):
                if turn.fresh:
                    told[place].clear()
                told[place].update(turn.sources[place].tolist())
                assert set(turn.about[place].tolist()) <= told[place] | {NO_ONE}

    def test_the_same_seed_gives_the_same_and_another_does_not(self) -> None:
        first, again, other = ([self.one(turn, 0) for turn in self.turns(self.make([0], seed))] for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_streams_differ(self) -> None:
        turns = self.turns(self.make(range(STREAMS), 1))
        texts = [str([self.one(turn, place)["texts"] for turn in turns]) for place in range(STREAMS)]
        assert len(set(texts)) == STREAMS

    def test_a_stream_gets_the_same_in_every_process_layout(self) -> None:
        together = self.turns(self.make(range(STREAMS), 1))
        for numbers in ([0], [2, 1]):
            for turn, whole in zip(self.turns(self.make(numbers, 1)), together, strict=True):
                for place, number in enumerate(numbers):
                    assert self.one(turn, place) == self.one(whole, number)

    def test_a_restored_source_goes_on_as_the_saved_one(self) -> None:
        first = self.make(range(STREAMS), 1)
        for before in (0, 1, 7):
            self.turns(first, before)
            state = copy.deepcopy(first.state_dict())
            expected = [self.one(turn, place) for turn in self.turns(first) for place in range(STREAMS)]
            second = self.make(range(STREAMS), 1)
            self.turns(second, 2)
            second.load_state_dict(state)
            assert [self.one(turn, place) for turn in self.turns(second) for place in range(STREAMS)] == expected
