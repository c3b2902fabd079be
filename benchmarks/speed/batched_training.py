"""Training on a batch of memories against one memory at a time, as the published code trains.

    python -m benchmarks.speed.batched_training            # writes records/batched_training.json

Same decoder, objective (single_context with retrieval and retriever loss), chunk lengths and number of optimiser
steps; samples (one chunk written and its questions read by one stream) and text tokens per second. Runs are
interleaved and the median of the ratios is reported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.facts.language import Language
from mplus.hf.decoders.train_model import build_for_training, choose_trained, load_for_training
from mplus.timing import Arm, in_rounds, median, ratio
from mplus.training.data.generated.facts import RecallBatches, RecallOptions
from mplus.training.decoder import TrainedDecoder, make_batched_streams
from mplus.training.objectives import OBJECTIVES
from mplus.training.objectives.losses import RetrieverLoss
from mplus.training.recipe.files import read_recipe

RECORD = record_path("speed", "batched_training")
STREAMS, STEPS, WARM, REPEATS = 32, 20, 4, 5


class Loop:
    """A training of ``streams`` streams that can be run a few steps at a time."""

    def __init__(self, model: Any, streams: int, parameters: Any) -> None:
        choose_trained(model, parameters)
        model.train()
        self.decoder, self.samples = TrainedDecoder(model), streams
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4)
        vocabulary = model.config.vocab_size
        options = RecallOptions(language=Language(), episode=64, ages="uniform")
        self.source = RecallBatches(options, tokenizer=None, numbers=range(streams), seed=0)
        self.streams = make_batched_streams(model.mplus_engine, range(streams), seed=0, long_term_tokens=256)
        self.objective = OBJECTIVES.get("single_context")()
        self.loss = RetrieverLoss(negatives="stream")
        self.tokens = 0
        if vocabulary < len(Language().vocabulary):
            raise ValueError(f"the decoder must know {len(Language().vocabulary)} words, it knows {vocabulary}")

    @torch.enable_grad()
    def run(self, steps: int) -> None:
        """Take so many optimiser steps."""
        for _ in range(steps):
            batch = self.source.next_batch(1)
            if batch.reset:
                self.streams.reset()
            outcome = self.objective(self.decoder, self.streams, batch, self.loss)
            self.optimizer.zero_grad()
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.tokens = batch.chunks.numel() + int(batch.mask.sum())


def compare(make: Callable[[], Any], parameters: str) -> dict[str, Any]:
    """Train one decoder, which ``make`` builds, with many streams per step and with one, in turns."""
    loops = {"batch": Loop(make(), STREAMS, parameters), "one": Loop(make(), 1, parameters)}
    for loop in loops.values():
        loop.run(WARM + 64)  # past the first episode, so that long-term memory is in use
    arms = [Arm(name, lambda _, loop=loop: loop.run(STEPS)) for name, loop in loops.items()]  # type: ignore[misc]
    times = in_rounds(arms, REPEATS, torch.device("cpu"), warm=0)
    gain = ratio(times, "one", "batch")
    step = {name: median(taken) / STEPS for name, taken in times.items()}
    return {
        "ratio": None if gain is None else round(STREAMS * gain, 2),
        "ratios": [round(STREAMS * one / batch, 2) for batch, one in zip(times["batch"], times["one"], strict=True)],
        "seconds_per_step": {name: round(seconds, 4) for name, seconds in step.items()},
        "samples_per_second": {name: round(loop.samples / step[name], 1) for name, loop in loops.items()},
        "tokens_per_second": {name: round(loop.tokens / step[name]) for name, loop in loops.items()},
    }


def recall_decoder() -> Any:
    """Build the decoder of recall-tiny anew; everything is trained."""
    recipe = read_recipe("recall-tiny").recipe
    build = recipe.model.build
    if build is None:
        raise ValueError("recall-tiny builds its decoder")
    return build_for_training(build.model_type, build.fields, build.init, recipe.memory, None)


def stories_decoder() -> Any:
    """Load the shipped stories260K, frozen, with the memory of the recipe stories; adapters are trained."""
    return load_for_training("stories260K", read_recipe("stories").recipe.memory, torch.float32)


def main() -> None:
    """Measure and write the record."""
    torch.manual_seed(0)
    record = {
        "streams": STREAMS,
        "steps": STEPS,
        "circumstances": run_info(),
        "recall-tiny, all trained": compare(recall_decoder, "all"),
        "stories260K, adapters trained": compare(stories_decoder, "adapters"),
    }
    write(RECORD, record)
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
