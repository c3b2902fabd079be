"""``train_chunk_retriever``: from texts to the file of a retriever, with a report of what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from attrs import asdict

from mplus.config import Component, JsonValue
from mplus.environment import run_info
from mplus.errors import CheckpointError, ConfigError
from mplus.mechanisms.kv.passes import BegunDecoder
from mplus.mechanisms.kv.state import state_of
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.training.chunk_retriever.fitting import FitOptions, PooledPairs, fit
from mplus.training.chunk_retriever.pairs import Pairs, pairs_of
from mplus.training.chunk_retriever.pooled import PooledDecoder, PooledStates, Progress
from mplus.training.chunk_retriever.report import compare

if TYPE_CHECKING:
    from mplus.evaluation.texts import Tokenizer
    from mplus.hf.model.model_class import MemoryModel
    from mplus.hf.types import PreTrainedTokenizerBase

MAPS, REPORT, POOLED = "maps.safetensors", "report.json", "pooled"
"""What a run leaves in its folder."""

Step = Callable[[str, int, int], None]
"""Called with what is done, how much of it was done since the last call, and how much there is."""


def train_chunk_retriever(
    model: MemoryModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Path],
    out: str | Path,
    *,
    questions: Path | None = None,
    passages: int = 1000,
    options: FitOptions | None = None,
    step: Step = lambda what, done, of: None,
) -> dict[str, JsonValue]:
    """Train the maps of a "trained" retriever for a decoder, and compare them with "hidden", "words" and "hybrid".

    The hidden states of all texts are computed once and kept in ``out/pooled``: a run that was stopped goes on there.

    Args:
        model: a decoder wrapped for the mechanism "kv".
        tokenizer: its own.
        texts: files of plain text, of any kind that memories will be of.
        out: the folder for ``maps.safetensors``, ``report.json`` and ``pooled``.
        questions: JSON lines with "question" and "passage", or None: sentences of the texts alone.
        passages: of all texts together at most.
        options: of the fit; None: the default.
        step: called as it goes on.

    Returns:
        What ``report.json`` holds: recall at 1 and 4 on the ends of the texts, which nothing was trained on.

    Raises:
        ConfigError: the decoder is wrapped for another mechanism, or with other adapters than none.
        InputError: too little text, or a file that cannot be read.
        NonFiniteError: hidden states that are not finite.
        TrainingError: a loss that is not finite.
        CheckpointError: a file of ``out`` is damaged, or cannot be written.

    Example:
        >>> found = train_chunk_retriever(model, tokenizer, [Path("novel.txt")], Path("retriever"))
        >>> found["recall"]["hybrid with trained"]["recall_at_1"]
        0.86
    """
    options, out = options if options is not None else FitOptions(), Path(out)
    engine = getattr(model, "mplus_engine", None)
    if engine is None or engine.mechanism.name != "kv":
        raise ConfigError("a retriever of chunks is trained for a decoder wrapped with the mechanism 'kv'")
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("The first chunk.")
    (view,) = memory.snapshot()
    reader = BegunDecoder(engine.decoder, [view], [state_of(view).begin_rows])
    pairs = pairs_of(
        texts, questions, cast("Tokenizer", tokenizer), chunk_tokens=engine.config.chunk_tokens, most=passages
    )
    pooled = PooledStates(out / POOLED, reader, state_of(view).begin_ids)
    tokens = sum(pooled.missing([*one.passages, *one.queries]) for one in pairs)
    trained, held_out = (pooled_pairs(one, pooled, lambda done: step("reading", done, tokens)) for one in pairs)
    maps, losses = fit(reader.weights, trained, held_out, options, lambda done: step("training", done, options.steps))
    _write(out, lambda: maps.write(out / MAPS))
    report: dict[str, JsonValue] = {
        **run_info(),
        "decoder": reader.weights,
        "options": asdict(options),
        "pairs": {"trained": len(pairs[0]), "held_out": len(pairs[1]), "tokens": sum(one.tokens for one in pairs)},
        "layers": maps.layers.tolist(),
        "losses": losses,
        "recall": _compared(PooledDecoder(pooled), tokenizer, pairs[1], held_out, out / MAPS),
    }
    _write(out, lambda: (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
    return report


def pooled_pairs(pairs: Pairs, pooled: PooledStates, progress: Progress) -> PooledPairs:
    """Return the mean hidden states of pairs; those that are not there yet are read."""
    passages, queries = (pooled.of(texts, progress) for texts in (pairs.passages, pairs.queries))
    return PooledPairs(passages, queries, torch.tensor(pairs.right))


def _compared(
    decoder: PooledDecoder, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, pooled: PooledPairs, file: Path
) -> dict[str, JsonValue]:
    """Return recall on pairs by the retrievers that need no training, and with the maps."""
    maps: dict[str, JsonValue] = {"path": str(file)}
    components = {name: Component(name) for name in ("words", "hidden", "hybrid")}
    components |= {"trained": Component("trained", maps), "hybrid with trained": Component("hybrid", maps)}
    retrievers = {name: CHUNK_RETRIEVERS.build(one) for name, one in components.items()}
    calibrations = {name: one.calibrate(decoder, tokenizer) for name, one in retrievers.items()}
    return compare(retrievers, calibrations, tokenizer, pairs, pooled)


def _write(out: Path, write: Callable[[], object]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise CheckpointError(f"{out} must be writable: {error}") from error
