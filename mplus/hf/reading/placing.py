"""Where a text sits that memory stands in front of, or in the middle of."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from mplus.errors import InputError, NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.caches import is_begun
from mplus.hf.reading.inputs import ForwardInputs
from mplus.hf.reading.reading import Reading
from mplus.hf.retrofit.placement import Placement
from mplus.mechanisms.opened import Insertion


def place_text(
    engine: DecoderEngine, reading: Reading, inputs: ForwardInputs, mask: Tensor | None
) -> tuple[int | Tensor, Placement | None]:
    """Return ``Pass.text_offset`` and ``Pass.placement`` of a forward, whose positions become what they say.

    Args:
        engine: of the decoder.
        reading: what has been opened.
        inputs: of the forward.
        mask: ``[B, T]`` bool, False at padding; None: there is none.

    Raises:
        NotSupported: the decoder takes no positions.
        InputError: it has learned fewer than are needed, here or by the generation.
    """
    opened, positions, text = reading.need_opened(), engine.retrofit.positions, inputs.text
    if opened.insertion is not None:
        placement = _placement(reading, opened.insertion, inputs.cache, text, mask)
        if not bool(opened.insertion.rows.any()):
            return 0, None
        inputs.positions = _moved_positions(engine, reading, inputs, placement.moved(text.shape[0]))
        if placement.divides and not inputs.is_masked and inputs.cache is None:
            # Without either transformers takes a gap between positions for the beginning of another text.
            inputs.named["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        return opened.insertion.rooms.sum(1, keepdim=True).to(text.device), placement
    if opened.text_offset is not None:
        offset = opened.text_offset.to(text.device)[:, None]
    elif positions.offset:
        rows = map(reading.mechanism.prefix_rows, opened.views)
        offset = torch.tensor(list(map(positions.extent, rows)), device=text.device)[:, None]
    else:
        return 0, None
    moved = offset.repeat_interleave(text.shape[0] // offset.shape[0], 0)
    inputs.positions = _moved_positions(engine, reading, inputs, moved)
    return offset, None


def _placement(
    reading: Reading, insertion: Insertion, cache: Cache | None, text: Tensor, mask: Tensor | None
) -> Placement:
    past = int(cache.get_seq_length()) if cache is not None and is_begun(cache) else 0
    if reading.starts is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        reading.starts = Placement.starts_of(insertion, mask[:: text.shape[0] // len(insertion.tokens)], past)
    return Placement(insertion, reading.starts, past + text.shape[1], text.shape[1])


def _moved_positions(engine: DecoderEngine, reading: Reading, inputs: ForwardInputs, moved: Tensor) -> Tensor:
    """Return the positions ``[B, T]`` of a text whose tokens are moved on by ``moved`` ``[B, 1 or T]``."""
    name = type(engine.model).__name__
    if not inputs.takes_positions:
        raise NotSupported(
            f"{name} takes no position_ids, so the mechanism {reading.mechanism.name!r} cannot put a text behind its "
            "rows: use another decoder"
        )
    before = inputs.counted_positions()
    positions = before + moved.to(before.device)
    most = engine.shape.max_positions if engine.shape.positions == "learned" else None
    if most is not None:
        needed = int(positions.max()) + reading.further_tokens + 1
        reading.further_tokens = 0
        if needed > most:
            raise InputError(
                f"{name} has {most} learned positions, and the text behind {int(moved.max())} rows of memory needs "
                f"{needed}: use a shorter text, fewer new tokens, or a smaller retrieved_tokens"
            )
    return positions
