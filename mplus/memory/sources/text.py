"""The text of a source, where a stream keeps words or ids."""

from __future__ import annotations

from mplus.errors import InputError, NotSupported
from mplus.memory.sources.forget import check_known
from mplus.memory.state import StreamState
from mplus.tokenizer import Tokenizer


def text_of_source(state: StreamState, source: str | None, tokenizer: Tokenizer | None) -> str:
    """Return what was written from a source to a stream and is held; see ``Memory.text``. Raises as that."""
    check_known([state], [0], source)
    number = state.sources.find(source)
    kept = None if number is None else state.text_of(number)
    if number is None or kept is not None:
        return kept or ""
    ids = state.ids_of(number)
    if ids is None:
        raise NotSupported(
            "this memory keeps no words of what was written: make memories with new_memory(keep_text=True), or of the "
            "mechanism 'kv' or 'notes'"
        )
    if tokenizer is None:
        raise InputError("ids are made text by a tokenizer: pass tokenizer= to new_memory, load or open")
    return str(tokenizer.decode(ids, skip_special_tokens=True))
