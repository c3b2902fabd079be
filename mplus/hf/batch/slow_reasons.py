"""Why rows cannot be stepped together by a plain decoder: what is known of the decoder, or found by trying."""

from __future__ import annotations

import torch

from mplus.hf.batch.prompts import result_of
from mplus.hf.batch.requests import Row, RowRequest
from mplus.hf.batch.row_buffer import RowBuffer
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.rounding import token_errors
from mplus.hf.model.self_check import TOKENS, check_ids
from mplus.hf.model.static_reader import reasons_against, reasons_against_decoder, running_decoder
from mplus.hf.model.wrapping import moving_rope
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.wrapping import SEEN


def reasons_to_step_alone(model: WrappedModel) -> list[str]:
    """Return why the rows of ``model`` are stepped one by one in it; empty: a plain decoder steps them together."""
    engine = model.mplus_engine
    if not isinstance(engine, TextEngine):
        return reasons_against(model)
    # What a memory of text brings back is part of the prompt, so the decoder alone matters, which nothing has probed.
    reasons = reasons_against_decoder(model)
    if moving_rope(model):
        reasons.append("its positions depend on the length of what is read")
    return reasons or _found_by_trying(model, engine)


@torch.no_grad()
def _found_by_trying(model: WrappedModel, engine: TextEngine) -> list[str]:
    """Step two short texts of unequal length together, and return what is wrong with that."""
    ids, lengths = check_ids(engine.vocab_size, engine.device), (TOKENS // 2, 2)
    buffer, expected = RowBuffer(running_decoder(model, None)), []
    try:
        for length in lengths:
            text = WrappedText(model, None)
            read = result_of(text, text.read(ids[:, :length]))
            if read.layers is None:
                return ["its cache holds something else than keys and values"]
            buffer.add(Row(RowRequest(None, ids[0, :length])), read.layers, read.position)
            expected.append(text.read(ids[:, length : length + 1]))
        found = buffer.step(torch.stack([ids[0, length] for length in lengths]))
    except Exception as error:  # noqa: BLE001 - whatever a foreign model cannot do, its rows are stepped one by one
        return [f"its plain decoder does not step two rows of unequal length: {error!r}"]
    worst = float(token_errors([found[None]], [torch.stack(expected)[None]]).max())
    return [] if worst < SEEN else [f"stepped beside another row, it says something else (error {worst:.2g})"]
