"""What a memory costs whatever the machine: tokens that go through the layers of a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mplus.hf.model.observable import decoder_layers


@contextmanager
def counted(model: Any) -> Iterator[list[float]]:
    """Count in the ``with`` block the tokens that go through a layer of ``model``, mean over its layers.

    Yields a list with the number so far; set it to 0 to begin anew.
    """
    layers, passed = decoder_layers(model), [0.0]

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        passed[0] += hidden.shape[0] * hidden.shape[1] / len(layers)

    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
