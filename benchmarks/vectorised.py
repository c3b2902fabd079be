"""Training on a batch of memories against one memory at a time, as the published code trains.

    python -m benchmarks.vectorised            # writes benchmarks/records/vectorised.json

Same decoder, objective (single_context with retrieval and retriever loss), chunk lengths and number of optimiser
steps; samples (one chunk written and its questions read by one stream) and text tokens per second. Runs are
interleaved and the median of the ratios is reported.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mplus.environment import run_info
from mplus.facts.language import Language
from mplus.hf.decoders.train_model import build_for_training, choose_trained, load_for_training
from mplus.training.batched.read import DenseDecoder
from mplus.training.batched.stream_batch import StreamBatch
from mplus.training.data.generated.facts import RecallOptions, RecallTurns
from mplus.training.losses import RetrieverLoss
from mplus.training.objectives import OBJECTIVES
from mplus.training.recipe.files import read

RECORD = Path(__file__).parent / "records" / "vectorised.json"
STREAMS, STEPS, WARM, REPEATS = 32, 20, 4, 5


class Loop:
    """A training of ``streams`` streams that can be run a few steps at a time."""

    def __init__(self, model: Any, streams: int, parameters: Any) -> None:
        choose_trained(model, parameters)
        model.train()
        self.decoder = DenseDecoder(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4)
        vocabulary = model.config.vocab_size
        options = RecallOptions(language=Language(), episode=64, ages="uniform")
        self.source = RecallTurns(options, tokenizer=None, numbers=range(streams), seed=0)
        self.streams = StreamBatch(model.mplus_engine, range(streams), seed=0, long_term_tokens=256)
        self.objective = OBJECTIVES.get("single_context")()
        self.loss = RetrieverLoss(negatives="stream")
        self.tokens = 0
        if vocabulary < len(Language().vocabulary):
            raise ValueError(f"the decoder must know {len(Language().vocabulary)} words, it knows {vocabulary}")

    def run(self, steps: int) -> float:
        """Seconds for ``steps`` optimiser steps."""
        begun = time.perf_counter()
        for _ in range(steps):
            turn = self.source.turn(1)
            if turn.fresh:
                self.streams.reset()
            outcome = self.objective(self.decoder, self.streams, turn, self.loss)
            self.optimizer.zero_grad()
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.tokens = turn.chunks.numel() + int(turn.mask.sum())
        return time.perf_counter() - begun


def compare(make: Any, parameters: str) -> dict[str, Any]:
    """Both ways of training one decoder; ``make`` builds it."""
    batch, single = Loop(make(), STREAMS, parameters), Loop(make(), 1, parameters)
    for loop in (batch, single):
        loop.run(WARM + 64)  # past the first episode, so that long-term memory is in use
    ratios, seconds = [], ([], [])  # type: ignore[var-annotated]
    for _ in range(REPEATS):
        together, alone = batch.run(STEPS), single.run(STEPS)
        ratios.append(STREAMS * alone / together)
        seconds[0].append(together / STEPS)
        seconds[1].append(alone / STEPS)
    step = [statistics.median(some) for some in seconds]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "seconds_per_step": {"batch": round(step[0], 4), "one": round(step[1], 4)},
        "samples_per_second": {"batch": round(STREAMS / step[0], 1), "one": round(1 / step[1], 1)},
        "tokens_per_second": {"batch": round(batch.tokens / step[0]), "one": round(single.tokens / step[1])},
    }


def recall_decoder() -> Any:
    """The decoder of recall-tiny, new; everything is trained."""
    recipe = read("recall-tiny").recipe
    build = recipe.model.build
    if build is None:
        raise ValueError("recall-tiny builds its decoder")
    return build_for_training(build.model_type, build.fields, build.init, recipe.memory, None)


def stories_decoder() -> Any:
    """The shipped stories260K, frozen, with the memory of the recipe stories; adapters are trained."""
    return load_for_training("stories260K", read("stories").recipe.memory, torch.float32)


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
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
