"""The value of lost context to a language model, and how much of it a memory wins back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import cross_entropy

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.short_term.batched_prefix import ScoreSelector
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.memory.report import progress_bar
from mplus.training.decoder import TrainedDecoder, make_batched_streams

WAYS = ("window", "full", "memory", "empty", "unrelated")
"""How a text is read: alone ("window"), behind all that came before it ("full"), with a memory of that ("memory"),
with an empty memory, and with a full memory of other documents ("unrelated")."""


@define(frozen=True, eq=False)
class ContextValue:
    """Losses in nats per token of the same texts, read in several ways.

    Attributes:
        losses: way -> ``[D]`` float64, mean over the tokens of each document's text.
        tokens: predicted tokens per document.
        context_tokens: tokens in front of each text.
    """

    losses: dict[str, Tensor]
    tokens: int
    context_tokens: int

    def loss(self, way: str) -> float:
        """Return the mean over documents."""
        return float(self.losses[way].mean())

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """Return the mean of ``first - second`` over documents, and half its 95 % interval (paired, normal)."""
        pairs = self.losses[first] - self.losses[second]
        half = 1.96 * float(pairs.std()) / math.sqrt(len(pairs)) if len(pairs) > 1 else float("inf")
        return float(pairs.mean()), half

    @property
    def won_back(self) -> float:
        """Return the share of the headroom (window - full) that the memory wins; NaN where context is worth nothing."""
        headroom = self.difference("window", "full")[0]
        return self.difference("window", "memory")[0] / headroom if headroom > 0 else float("nan")

    @property
    def harm_percent(self) -> float:
        """Return the change of perplexity by an unrelated full memory against the decoder alone, in percent."""
        return 100 * (math.exp(self.difference("unrelated", "window")[0]) - 1)

    def plain(self) -> dict[str, JsonValue]:
        """Return this as plain data."""
        headroom, memory, harm = (
            self.difference(*pair) for pair in (("window", "full"), ("window", "memory"), ("unrelated", "window"))
        )
        return {
            "documents": len(self.losses["window"]),
            "predicted_tokens_per_document": self.tokens,
            "context_tokens": self.context_tokens,
            "nats_per_token": {way: round(self.loss(way), 5) for way in self.losses},
            "headroom_nats": [round(x, 5) for x in headroom],
            "won_back_nats": [round(x, 5) for x in memory],
            "won_back_share": round(self.won_back, 4),
            "unrelated_memory_nats": [round(x, 5) for x in harm],
            "unrelated_memory_perplexity_percent": round(self.harm_percent, 4),
        }


@torch.no_grad()
def context_value(
    model: MemoryModel,
    documents: Sequence[Tensor],
    *,
    chunk_tokens: int,
    chunks: int,
    text_tokens: int,
    known_tokens: int = 1,
    distraction: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> ContextValue:
    """Read the text behind ``chunks`` chunks of every document in all ``WAYS``.

    Args:
        model: wrapped, in eval mode.
        documents: ids ``[n]`` each; those shorter than ``chunks * chunk_tokens + text_tokens`` are left out.
        chunk_tokens, chunks: what is written, or read in front.
        text_tokens: of the text.
        known_tokens: tokens at its beginning that are read but not predicted; retrieval sees these alone, so that no
            text leaks its future into its own score.
        distraction: chunks of other documents that are written after a document's own, before its text is read.
        batch_size: documents at a time.
        seed: of the draws of which rows leave the STM.

    Raises:
        InputError: fewer than two documents are long enough.
        ConfigError: a mechanism or setting that memories held as dense tensors would not follow.
    """
    needed = chunks * chunk_tokens + text_tokens
    usable = [ids[:needed] for ids in documents if len(ids) >= needed]
    if not 1 <= known_tokens < text_tokens:
        raise InputError(f"known_tokens must be at least 1 and below text_tokens ({text_tokens}), got {known_tokens}")
    if len(usable) < 2:
        raise InputError(f"at least 2 documents must have {needed} tokens, got {len(usable)} of {len(documents)}")
    decoder = TrainedDecoder(model)
    found: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    with progress_bar("reading texts", len(usable), None, steps=len(usable) // batch_size + 1, unit="texts") as advance:
        for start in range(0, len(usable), batch_size):
            ids = torch.stack(usable[start : start + batch_size])
            if len(ids) < 2:  # an unrelated memory is that of the next document of the batch
                ids = torch.stack(usable[start - 1 : start + 1])[1:].repeat(2, 1)
            for way, losses in _batch(
                decoder, ids, (chunks, chunk_tokens), known_tokens, distraction, seed + start
            ).items():
                found[way].append(losses[: len(usable) - start])
            advance(len(ids))
    return ContextValue(
        {way: torch.cat(parts) for way, parts in found.items()}, text_tokens - known_tokens, chunks * chunk_tokens
    )


def _batch(
    decoder: TrainedDecoder, ids: Tensor, shape: tuple[int, int], known: int, distraction: int, seed: int
) -> dict[str, Tensor]:
    engine, batch = decoder.engine, len(ids)
    chunks, chunk_tokens = shape
    split = chunks * chunk_tokens
    before, text = ids[:, :split].view(batch, chunks, chunk_tokens), ids[:, split:]
    capacity = engine.config.long_term_tokens if engine.mechanism.long_term else 0
    rows = (chunks + distraction) * engine.config.memory_tokens_per_chunk
    streams = [
        make_batched_streams(engine, range(batch), seed=seed, long_term_tokens=rows if capacity is None else capacity)
        for _ in range(3)
    ]
    related, empty, unrelated = streams
    everything = torch.arange(batch)
    for place in range(chunks):
        related.write(before[:, place], everything)
        unrelated.write(before.roll(1, 0)[:, place], everything)
    for place in range(distraction):
        other = before.roll(2 + place // chunks, 0)[:, place % chunks]
        related.write(other, everything)
        unrelated.write(other, everything)
    retriever = engine.mechanism.retriever
    selector = None if retriever is None else ScoreSelector(retriever)

    def with_memory(held: BatchedStreams) -> Tensor:
        queries = (torch.arange(text.shape[1]) < known).expand(batch, 1, -1)
        return _losses(decoder.read(held, text[:, None], queries=queries, selector=selector).logits[:, 0], text, known)

    return {
        "window": _losses(decoder.plain(text), text, known),
        "full": _losses(decoder.plain(ids)[:, split:], text, known),
        "memory": with_memory(related),
        "empty": with_memory(empty),
        "unrelated": with_memory(unrelated),
    }


def _losses(logits: Tensor, text: Tensor, known: int) -> Tensor:
    """Return ``[D]`` mean loss of the tokens after the first ``known``."""
    flat = cross_entropy(logits[:, :-1].flatten(0, 1).double(), text[:, 1:].flatten(), reduction="none")
    return flat.view(len(text), -1)[:, known - 1 :].mean(1)
