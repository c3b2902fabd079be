"""What every ``Objective`` must do."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch

from mplus.config import AdapterConfig, Component, MPlusConfig
from mplus.hf.decoders.train_model import build_for_training
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.training.batch import NO_SOURCE, Batch
from mplus.training.decoder import TrainedDecoder, make_batched_streams
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.losses import RetrieverLoss

STREAMS, CHUNK, TOKENS, VOCABULARY = 2, 6, 7, 32


class ObjectiveConformance:
    """Subclass it in a test module and set ``implementation``, or override ``make``.

    Attributes:
        implementation: the objective class under test.
        trains_additions: whether it trains anything that memory adds to a decoder.
    """

    implementation: ClassVar[type[Objective]]
    trains_additions: ClassVar[bool] = True

    def make(self) -> Objective:
        """Return a new objective."""
        objective = self.implementation()
        assert isinstance(objective, Objective)
        return objective

    # ------------------------------------------------------------------ helpers

    def model(self) -> MemoryModel:
        """Return a wrapped decoder of two layers, of which everything is trained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = MPlusConfig(
                chunk_tokens=CHUNK,
                min_chunk_tokens=2,
                memory_tokens_per_chunk=2,
                short_term_tokens=6,
                retrieved_tokens=2,
                long_term_tokens=16,
                retriever=Component("linear", {"width": 4}),
                adapters=AdapterConfig(rank=2, target_modules=("q_proj", "v_proj")),
            )
            model = build_for_training("llama", {"vocab_size": VOCABULARY, **sizes}, "default", config, None)
            for parameter in model.parameters():
                parameter.requires_grad_(True)
                if parameter.ndim == 2:  # adapters begin as zero, and then pass no gradient on
                    torch.nn.init.normal_(parameter, std=0.2)
        training: MemoryModel = model.train()
        return training

    def streams(self, model: MemoryModel) -> BatchedStreams:
        """Return streams whose short-term memory is full, with rows in long-term memory."""
        streams = make_batched_streams(model.mplus_engine, range(STREAMS), seed=0, long_term_tokens=16)
        with torch.no_grad():
            for number in range(5):
                streams.write(torch.full((STREAMS, CHUNK), number + 2), torch.full((STREAMS,), number))
        return streams

    def batch(self) -> Batch:
        """Return a batch with the chunks that the objective wants, and three texts: of the newest, an older one, none.

        Where nothing is written both are about older chunks.
        """
        generator = torch.Generator().manual_seed(4)
        count = self.make().chunks

        def ids(*shape: int) -> torch.Tensor:
            return torch.randint(2, VOCABULARY, shape, generator=generator)

        texts, windows = ids(STREAMS, 3, TOKENS), ids(STREAMS, 9)
        labels, window_labels = texts.clone(), windows.clone()
        labels[..., :2] = window_labels[..., :2] = -100
        newest = 10 + count - 1 if count else 4
        return Batch(
            chunks=ids(STREAMS, count, CHUNK),
            sources=torch.arange(10, 10 + count).expand(STREAMS, -1),
            texts=texts,
            labels=labels,
            mask=torch.ones_like(texts, dtype=torch.bool),
            query_mask=(torch.arange(TOKENS) < 2).expand_as(texts),
            text_sources=torch.tensor([[newest, 1, NO_SOURCE]] * STREAMS),
            windows=windows,
            window_labels=window_labels,
            window_mask=torch.ones_like(windows, dtype=torch.bool),
        )

    def run(self, model: MemoryModel, streams: BatchedStreams, batch: Batch | None = None) -> ObjectiveResult:
        """Call the objective once, with a retriever loss that draws nothing."""
        loss = RetrieverLoss(candidates=64)
        return self.make()(TrainedDecoder(model), streams, batch or self.batch(), loss)

    # ------------------------------------------------------------------ tests

    def test_has_a_name_and_options(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        assert isinstance(self.make().options, self.implementation.Options)

    def test_the_loss_is_a_finite_scalar_with_a_graph(self) -> None:
        model = self.model()
        outcome = self.run(model, self.streams(model))
        assert outcome.loss.shape == ()
        assert math.isfinite(outcome.loss.item())
        outcome.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
        moved = {name for name, grad in grads.items() if bool(grad.abs().sum() > 0)}
        assert moved, "nothing is trained"
        added = any(name.startswith("mplus.") or ".lora_" in name for name in moved)
        assert added == self.trains_additions

    def test_metrics_are_numbers_by_name(self) -> None:
        model = self.model()
        outcome = self.run(model, self.streams(model))
        assert set(self.implementation.metrics) <= set(outcome.metrics)
        assert all(isinstance(value, float) and math.isfinite(value) for value in outcome.metrics.values())

    def test_keeps_no_state(self) -> None:
        model = self.model()
        objective, batch = self.make(), self.batch()
        losses = [
            objective(TrainedDecoder(model), self.streams(model), batch, RetrieverLoss(candidates=64)).loss.item()
            for _ in range(2)
        ]
        assert losses[0] == losses[1]

    def test_streams_do_not_see_each_other(self) -> None:
        """A change of what one stream is told and asked leaves the gradient at the other's texts as it is."""
        model, batch = self.model(), self.batch()
        halves = []
        for other in (0, 1):
            chunks, texts, windows = batch.chunks.clone(), batch.texts.clone(), batch.windows
            assert windows is not None
            windows = windows.clone()
            for changed in (chunks, texts, windows):
                changed[1] = (changed[1] + other) % VOCABULARY
            labels = batch.labels.clone()
            labels[1] = -100  # only the first stream is asked
            silent = batch.window_labels
            assert silent is not None
            silent = silent.clone()
            silent[1] = -100
            about = batch.text_sources.clone()
            about[1] = NO_SOURCE
            changed_turn = attrs.evolve(
                batch,
                chunks=chunks,
                texts=texts,
                windows=windows,
                labels=labels,
                window_labels=silent,
                text_sources=about,
            )
            halves.append(self.run(model, self.streams(model), changed_turn).loss.item())
        assert math.isclose(halves[0], halves[1], rel_tol=1e-5)

    def test_says_how_many_chunks_it_writes(self) -> None:
        model = self.model()
        streams, objective = self.streams(model), self.make()
        before = streams.clock
        self.run(model, streams)
        assert (streams.clock > before) == objective.writes

    def test_leaves_full_streams_full(self) -> None:
        model = self.model()
        streams = self.streams(model)
        rows, held = streams.rows, [layer.count for layer in streams.ltm]
        self.run(model, streams)
        assert streams.rows == rows
        assert [layer.count for layer in streams.ltm] >= held
