"""Check that the decoder still computes with the weights that a memory's rows, or a key/value cache, were made with."""

from __future__ import annotations

from collections.abc import Sequence

from mplus.errors import MemoryMismatchError, NotSupported
from mplus.hf.adapters.weights import Look
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.reading import Reading
from mplus.memory.recompute import holds_rows, unfit
from mplus.memory.state import StreamView


def is_as_kept(view: StreamView, look: Look) -> bool:
    """Return whether a stream's keys and values are what the decoder would make of its rows now."""
    return view.state.weights is None or not view.state.weights.of_projection(look.weights)


def check_rows(engine: DecoderEngine, views: Sequence[StreamView], look: Look) -> None:
    """Check that each batch row can be read with the adapter that ``adapter_names`` gives it.

    Raises:
        MemoryMismatchError: it keeps keys and values only, made with another adapter; or ``adapter_names`` does not
            fit the memory.
        NotSupported: the retriever asks the decoder, which knows one adapter for each row of the batch only; or text
            waits, which is read by itself.
    """
    names = look.names or ()
    repeats = len(names) // len(views)
    if repeats * len(views) != len(names) or any(
        len(set(names[place : place + repeats])) > 1 for place in range(0, len(names), repeats)
    ):
        raise MemoryMismatchError(
            f"adapter_names must give each of the memory's {len(views)} streams one adapter, got {list(names)}"
        )
    if repeats > 1 and engine.own_attention.used:
        raise NotSupported(
            "adapter_names with several copies of a prompt (beams) does not go with a retriever that ranks rows by the "
            "decoder's attention: use one copy, or the retriever 'linear'"
        )
    for row, view in enumerate(views):
        if view.state.tail:
            raise NotSupported(
                f"adapter_names does not go with text that waits, and batch row {row} has {view.state.tail_tokens} "
                "tokens of it: call memory.flush() first, with that row's adapter active"
            )
        made, layout, now = view.state.weights, view.store.layout, look.of_row(row, repeats)
        if made is None or not holds_rows(view.state, view.store):
            continue
        if not layout.keeps_hidden and made.of_projection(now):
            raise unfit(made, now, row)
        if layout.key_size and made.of_retrieval(now):
            raise MemoryMismatchError(
                f"the retriever keys of batch row {row} cannot be used: {'; '.join(made.of_retrieval(now))}: read it "
                "with this adapter active and without adapter_names first, so that they are computed anew"
            )


def check_weights(engine: DecoderEngine, reading: Reading, *, whole: bool = True) -> None:
    """Check that the decoder computes with the weights that a cache was begun with.

    Args:
        engine: of the decoder.
        reading: what the cache belongs to.
        whole: look at all weights, as at the beginning of a text; else only at which adapters are switched on, which
            a single token can afford.

    Raises:
        MemoryMismatchError: it does not.
    """
    before = reading.look
    if before is None:
        return
    if not whole and engine.watch.switches() == before.switches:
        return
    now = engine.watch.look()
    if (now.weights, now.names, now.each, now.acting, now.contents) == (
        before.weights, before.names, before.each, before.acting, before.contents
    ) and now.switches == before.switches:  # fmt: skip
        return
    differences = before.weights.of_projection(now.weights)
    if not differences:
        names = f"made under adapters {list(before.names or before.acting)}, now {list(now.names or now.acting)}"
        differences = [f"{names}, or their scaling or contents have changed"]
    raise MemoryMismatchError(
        f"past_key_values cannot be continued with other weights: {'; '.join(differences)}: go back to what it was "
        "made with, or start a new cache"
    )
