"""Harm: what carrying a memory costs the decoder's language modelling on texts that have nothing to do with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import cross_entropy

from mplus.config import JsonValue, flag, whole
from mplus.environment import run_info
from mplus.errors import ConfigError, InputError
from mplus.evaluation.texts import Texts, Tokenizer
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.reading import RetrievedSource
from mplus.hf.text.engine import refuse_text
from mplus.memory.memory import Memory
from mplus.memory.report import progress_bar

WAYS = ("none", "empty", "unrelated")
"""The decoder alone; with an empty memory; with a memory full of unrelated text."""


@define(frozen=True, kw_only=True)
class HarmOptions:
    """Settings of the measurement of perplexity.

    Attributes:
        text_tokens: tokens of each piece of held-out text, the begin-of-sequence id not counted.
        known_tokens: so many of them at the beginning are read but not predicted, and retrieval sees these alone:
            with more, a text would leak its own future into its score.
        pieces: most pieces.
        unrelated_tokens: most tokens of unrelated text that are written; None: as many as fill the long-term memory,
            or all there is.
        bos: id in front of every piece; None: none.
        bos_with_memory: also where memory is read, and its begin row stands there already.
        batch: pieces at a time.
        seed: of the draws of which rows leave the STM.
    """

    text_tokens: int = field(default=256, validator=whole(2))
    known_tokens: int = field(default=16, validator=whole(1))
    pieces: int = field(default=64, validator=whole(1))
    unrelated_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    bos: int | None = field(default=None, validator=whole(0, optional=True))
    bos_with_memory: bool = field(default=True, validator=flag)
    batch: int = field(default=8, validator=whole(1))
    seed: int = field(default=0, validator=whole(0))

    def __attrs_post_init__(self) -> None:
        if self.known_tokens >= self.text_tokens:
            raise ConfigError(
                f"known_tokens must be below text_tokens ({self.text_tokens}), got {self.known_tokens}: nothing would "
                "be left to predict"
            )


@torch.no_grad()
def harm(
    model: MemoryModel,
    tokenizer: Tokenizer,
    held_out: str,
    unrelated: str,
    *,
    options: HarmOptions | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> dict[str, JsonValue]:
    """Perplexity of held-out text without memory, with an empty one, and with one full of unrelated text.

    Args:
        model: a wrapped decoder; put into eval mode.
        tokenizer: its tokenizer.
        held_out: text to predict; cut into pieces, what is left over is not used.
        unrelated: text to remember, from elsewhere.
        options: settings.
        name: what the report calls the model.
        progress: show a bar; None: on a terminal.

    Returns:
        Plain data: nats per token and perplexity each way, and the change against "none" in percent with its 95 %
        interval over pieces (paired, normal). Of a memory that brings back whole chunks or nothing, also how many
        pieces brought back nothing, and how many of these were read bit for bit as without memory; such pieces are
        read one at a time, so that none moves for the length of another.

    Raises:
        InputError: a text is too short, or shares a piece with the other one.
        NotSupported: memories of the decoder are made of text.
    """
    refuse_text(model, "this evaluation")
    options = options or HarmOptions()
    model.train(False)
    texts = Texts(tokenizer)
    pieces = _pieces(texts.ids(held_out), options)
    if unrelated.strip() and unrelated.strip() in held_out:
        raise InputError("the unrelated text must not be part of the held-out one: take it from another document")
    memory = _filled(model, texts.ids(unrelated), tokenizer, options, progress)
    empty = model.new_memory(seed=options.seed)
    losses: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    whole, unread = model.mplus_engine.mechanism.retrieves_in_open, list[bool]()
    with progress_bar("reading held-out text", len(pieces), progress, steps=len(pieces), unit="pieces") as advance:
        for batch in pieces.split(1 if whole else options.batch):
            for way, state in (("none", None), ("empty", empty), ("unrelated", memory)):
                found_, rows = _losses(model, batch, options, state, sources=whole and way == "unrelated")
                losses[way].append(found_)
                unread += [not any(row) for row in rows]
            advance(len(batch))
    found = {way: torch.cat(parts) for way, parts in losses.items()}
    nothing = torch.tensor(unread, dtype=torch.bool)
    stream = memory.states[0]
    return {
        "format": 1,
        "kind": "harm",
        "pieces": len(pieces),
        "predicted_tokens": len(pieces) * (options.text_tokens - options.known_tokens),
        "nats_per_token": {way: float(one.mean()) for way, one in found.items()},
        "perplexity": {way: math.exp(float(one.mean())) for way, one in found.items()},
        "change_percent": {way: _change(found[way], found["none"]) for way in WAYS[1:]},
        **(
            {
                "pieces_without_chunks": int(nothing.sum()),
                "of_these_identical": int((found["unrelated"] == found["none"])[nothing].sum()),
            }
            if whole
            else {}
        ),
        "memory_rows_by_layer": {
            **{stream.lists[name].replace("-", "_"): rows for name, rows in stream.counts().items() if any(rows)},
            "long_term": [memory.stores[0].count(layer) for layer in range(memory.stores[0].layout.layers)],
        },
        "unrelated_tokens_written": sum(source.tokens for source in stream.sources),
        "settings": {**attrs.asdict(options), "memory": model.mplus_config.to_dict()},
        "circumstances": run_info(model=name, seeds={"memory": options.seed}),
    }


def _pieces(ids: Sequence[int], options: HarmOptions) -> Tensor:
    """Cut held-out text into pieces ``[n, text_tokens]``."""
    count = min(len(ids) // options.text_tokens, options.pieces)
    if count < 1:
        raise InputError(
            f"the held-out text must have at least text_tokens ({options.text_tokens}) tokens, it has {len(ids)}"
        )
    return torch.tensor(ids[: count * options.text_tokens]).view(count, options.text_tokens)


def _filled(
    model: MemoryModel, ids: Sequence[int], tokenizer: Tokenizer, options: HarmOptions, progress: bool | None
) -> Memory:
    """Write as much unrelated text as is wanted into a new memory."""
    config = model.mplus_config
    rows = (config.short_term_tokens or 0) + (config.long_term_tokens or 0)
    text = model.mplus_engine.mechanism.capacity(rows)
    enough = -(-text // config.chunk_tokens) * config.chunk_tokens
    if config.long_term_tokens is None:
        enough = len(ids)
    wanted = enough if options.unrelated_tokens is None else options.unrelated_tokens
    memory: Memory = model.new_memory(seed=options.seed, tokenizer=cast("Any", tokenizer))
    memory.write(list(ids[:wanted]), source="unrelated", progress=progress)
    return memory


def _losses(
    model: MemoryModel, pieces: Tensor, options: HarmOptions, memory: Memory | None, *, sources: bool
) -> tuple[Tensor, list[list[list[RetrievedSource]]]]:
    """Return ``[n]`` float64, the mean loss of each piece's tokens from ``known_tokens`` on, and its ``sources``.

    These are what ``output_sources`` says of each piece; none where they are not asked for.
    """
    begin = options.bos is not None and (memory is None or options.bos_with_memory)
    device = model.mplus_engine.device
    text = pieces.to(device)
    if begin:
        text = torch.cat([torch.full_like(text[:, :1], options.bos or 0), text], 1)
    known = options.known_tokens + begin
    output = model(input_ids=text, use_cache=False, memory=memory, query_tokens=known, output_sources=sources)
    predicted, expected = output.logits[:, known - 1 : -1].double(), text[:, known:]
    flat = cross_entropy(predicted.flatten(0, 1), expected.flatten(), reduction="none")
    return flat.view(len(text), -1).mean(1).cpu(), output.memory_sources if sources else []


def _change(one: Tensor, none: Tensor) -> dict[str, JsonValue]:
    """Return the change of perplexity in percent, and its 95 % interval over pieces, of losses ``[n]`` in nats."""
    pairs = one - none
    mean = float(pairs.mean())
    half = 1.96 * float(pairs.std()) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    interval = None if half is None else [100 * math.expm1(mean - half), 100 * math.expm1(mean + half)]
    return {"percent": 100 * math.expm1(mean), "interval": interval}
