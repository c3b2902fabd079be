"""What every ``BatchSource`` must do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from mplus.training.batch import IGNORE_INDEX, NO_SOURCE, Batch, BatchSource

STREAMS = 3


class SourceConformance:
    """Subclass it in a test module, set ``implementation`` and override ``make``.

    Attributes:
        implementation: the source class under test.
        requests: arguments of ``batch`` that it is asked for, one after the other.
    """

    implementation: ClassVar[Any]
    requests: ClassVar[Sequence[dict[str, Any]]] = ({"chunks": 1}, {"chunks": 3}, {"chunks": 2})

    def make(self, numbers: Sequence[int], seed: int) -> BatchSource:
        """Return a source for the streams ``numbers``, of which there may be ``STREAMS`` in all."""
        raise NotImplementedError("a SourceConformance must override make(numbers, seed)")

    # ------------------------------------------------------------------ helpers

    def batches(self, source: BatchSource, count: int = 12) -> list[Batch]:
        """Return the next ``count`` batches, by ``requests`` in a circle."""
        return [source.next_batch(**self.requests[step % len(self.requests)]) for step in range(count)]

    @staticmethod
    def one(batch: Batch, place: int) -> dict[str, Any]:
        """Return the batch of the stream at ``place``, without padding."""
        mask = batch.mask[place]
        found: dict[str, Any] = {"reset": batch.reset}
        for name, value in attrs.asdict(batch).items():
            if isinstance(value, Tensor) and name != "mask":
                row = value[place]
                of_text = value.ndim == 3 and value.shape == batch.mask.shape
                found[name] = [line[kept].tolist() for line, kept in zip(row, mask, strict=True)] if of_text else row
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}

    # ------------------------------------------------------------------ tests

    def test_has_options(self) -> None:
        assert issubclass(self.implementation, BatchSource)
        assert attrs.has(self.implementation.Options)

    def test_shapes_and_dtypes(self) -> None:
        for step, batch in enumerate(self.batches(self.make(range(STREAMS), 1))):
            chunks = self.requests[step % len(self.requests)].get("chunks", 1)
            streams, written, _ = batch.chunks.shape
            assert (streams, written) == (STREAMS, chunks)
            assert batch.sources.shape == (STREAMS, chunks)
            assert batch.texts.ndim == 3
            assert batch.text_sources.shape == batch.texts.shape[:2]
            for name in ("labels", "mask", "query_mask", "answer_mask"):
                value = getattr(batch, name)
                assert value is None or value.shape == batch.texts.shape, name
            for name in ("mask", "query_mask", "answer_mask", "window_mask"):
                value = getattr(batch, name)
                assert value is None or value.dtype == torch.bool, name
            for name in ("chunks", "sources", "texts", "labels", "text_sources"):
                assert getattr(batch, name).dtype == torch.int64, name

    def test_padding_is_on_the_right_and_never_predicted(self) -> None:
        for batch in self.batches(self.make(range(STREAMS), 1)):
            lengths = batch.mask.sum(-1, keepdim=True)
            assert torch.equal(batch.mask, torch.arange(batch.mask.shape[2]) < lengths)
            assert bool((batch.labels[~batch.mask] == IGNORE_INDEX).all())
            for part in (batch.query_mask, batch.answer_mask):
                assert part is None or not bool((part & ~batch.mask).any())
            if batch.windows is not None:
                assert batch.window_mask is not None
                assert batch.window_labels is not None
                assert bool((batch.window_labels[~batch.window_mask] == IGNORE_INDEX).all())

    def test_a_label_is_its_token(self) -> None:
        predicted = 0
        for batch in self.batches(self.make(range(STREAMS), 1)):
            wanted = batch.labels != IGNORE_INDEX
            assert torch.equal(batch.labels[wanted], batch.texts[wanted])
            assert not bool(wanted[..., 0].any()), "nothing precedes the first token of a text"
            if batch.answer_mask is not None:
                assert bool(wanted[batch.answer_mask].all())
            predicted += int(wanted.sum())
        assert predicted

    def test_a_text_is_about_what_its_stream_was_told(self) -> None:
        told: list[set[int]] = [set() for _ in range(STREAMS)]
        for batch in self.batches(self.make(range(STREAMS), 1), 24):
            for place in range(STREAMS):
                if batch.reset:
                    told[place].clear()
                told[place].update(batch.sources[place].tolist())
                assert set(batch.text_sources[place].tolist()) <= told[place] | {NO_SOURCE}

    def test_the_same_seed_gives_the_same_and_another_does_not(self) -> None:
        first, again, other = (
            [self.one(batch, 0) for batch in self.batches(self.make([0], seed))] for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other

    def test_streams_differ(self) -> None:
        batches = self.batches(self.make(range(STREAMS), 1))
        texts = [str([self.one(batch, place)["texts"] for batch in batches]) for place in range(STREAMS)]
        assert len(set(texts)) == STREAMS

    def test_a_stream_gets_the_same_in_every_process_layout(self) -> None:
        together = self.batches(self.make(range(STREAMS), 1))
        for numbers in ([0], [2, 1]):
            for batch, whole in zip(self.batches(self.make(numbers, 1)), together, strict=True):
                for place, number in enumerate(numbers):
                    assert self.one(batch, place) == self.one(whole, number)

    def test_a_restored_source_goes_on_as_the_saved_one(self) -> None:
        first = self.make(range(STREAMS), 1)
        for before in (0, 1, 7):
            self.batches(first, before)
            state = copy.deepcopy(first.state_dict())
            expected = [self.one(batch, place) for batch in self.batches(first) for place in range(STREAMS)]
            second = self.make(range(STREAMS), 1)
            self.batches(second, 2)
            second.load_state_dict(state)
            assert [self.one(batch, place) for batch in self.batches(second) for place in range(STREAMS)] == expected
