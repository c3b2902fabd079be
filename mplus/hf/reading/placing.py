"""Where a text sits that memory stands in front of, or in the middle of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mplus.errors import InputError, NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.caches import is_begun
from mplus.hf.reading.reading import Reading
from mplus.hf.retrofit.placement import Placement
from mplus.mechanisms.opened import Insertion


def place_text(
    engine: DecoderEngine,
    reading: Reading,
    inputs: dict[str, Any],
    text: Tensor,
    mask: Tensor | None,
    takes_positions: bool,
) -> tuple[int | Tensor, Placement | None]:
    """Return ``Pass.text_offset`` and ``Pass.placement`` of a forward, whose ``position_ids`` become what they say.

    Args:
        engine: of the decoder.
        reading: what has been opened.
        inputs: arguments of the forward, by name.
        text: ids ``[B, T]`` or embeddings ``[B, T, w]``.
        mask: ``[B, T]`` bool, False at padding; None: there is none.
        takes_positions: whether the decoder has ``position_ids``.

    Raises:
        NotSupported: the decoder takes no positions.
        InputError: it has learned fewer than are needed, here or by the generation.
    """
    opened, positions = reading.need_opened(), engine.retrofit.positions
    if opened.insertion is not None:
        placement = _placement(reading, opened.insertion, inputs.get("past_key_values"), text, mask)
        if not bool(opened.insertion.rows.any()):
            return 0, None
        inputs["position_ids"] = _moved_positions(
            engine, reading, inputs, text, placement.moved(text.shape[0]), takes_positions
        )
        if placement.divides and inputs.get("attention_mask") is None and inputs.get("past_key_values") is None:
            # Without either transformers takes a gap between positions for the beginning of another text.
            inputs["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        return opened.insertion.rooms.sum(1, keepdim=True).to(text.device), placement
    if opened.text_offset is not None:
        offset = opened.text_offset.to(text.device)[:, None]
    elif positions.offset:
        rows = map(reading.mechanism.prefix_rows, opened.views)
        offset = torch.tensor(list(map(positions.extent, rows)), device=text.device)[:, None]
    else:
        return 0, None
    moved = offset.repeat_interleave(text.shape[0] // offset.shape[0], 0)
    inputs["position_ids"] = _moved_positions(engine, reading, inputs, text, moved, takes_positions)
    return offset, None


def _placement(
    reading: Reading, insertion: Insertion, cache: Cache | None, text: Tensor, mask: Tensor | None
) -> Placement:
    past = int(cache.get_seq_length()) if cache is not None and is_begun(cache) else 0
    if reading.starts is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        reading.starts = Placement.starts_of(insertion, mask[:: text.shape[0] // len(insertion.tokens)], past)
    return Placement(insertion, reading.starts, past + text.shape[1], text.shape[1])


def _moved_positions(
    engine: DecoderEngine,
    reading: Reading,
    inputs: dict[str, Any],
    text: Tensor,
    moved: Tensor,
    takes_positions: bool,
) -> Tensor:
    """Return the positions ``[B, T]`` of a text whose tokens are moved on by ``moved`` ``[B, 1 or T]``."""
    rows, tokens = text.shape[:2]
    name = type(engine.model).__name__
    if not takes_positions:
        raise NotSupported(
            f"{name} takes no position_ids, so the mechanism {reading.mechanism.name!r} cannot put a text behind its "
            "rows: use another decoder"
        )
    cache, positions = inputs.get("past_key_values"), inputs.get("position_ids")
    if positions is None:
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = torch.arange(past, past + tokens, device=text.device).expand(rows, -1)
    found: Tensor = positions + moved.to(positions.device)
    most = engine.shape.max_positions if engine.shape.positions == "learned" else None
    if most is not None:
        needed = int(found.max()) + reading.further_tokens + 1
        reading.further_tokens = 0
        if needed > most:
            raise InputError(
                f"{name} has {most} learned positions, and the text behind {int(moved.max())} rows of memory needs "
                f"{needed}: use a shorter text, fewer new tokens, or a smaller retrieved_tokens"
            )
    return found
