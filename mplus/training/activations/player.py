"""MemoPlayer: behaviours of MEMO in a JSON file, computed by what plans the swapping of activations here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mplus.config import JsonValue
from mplus.errors import CheckpointError
from mplus.interop import BehaviourPlayer, Unavailable
from mplus.training.activations.planning import (
    KEPT_LAYERS,
    LayerBytes,
    gpt_layer_bytes,
    held_bytes,
    llama_layer_bytes,
    swapped_share,
    swapped_tokens,
)

ADDRESSES = (
    "addresses are not planned here: PyTorch offers no supported way to pin those of intermediate tensors, and its "
    "allocator reuses what a layer frees"
)


class MemoPlayer(BehaviourPlayer):
    """Plays the cases of the system "memo": bytes of layers, shares and tokens swapped, bytes held."""

    system: ClassVar[str] = "memo"

    def compute(self, name: str, given: Mapping[str, Any]) -> JsonValue:
        """Return the outcome of a behaviour. Raises Unavailable for the planning of addresses."""
        if name in {"address planning", "two levels of planning"}:
            raise Unavailable(ADDRESSES)
        if name not in BEHAVIOURS:
            raise CheckpointError(
                f"behaviour of the system 'memo' must be one of {', '.join(BEHAVIOURS)}, got {name!r}"
            )
        return BEHAVIOURS[name](given)


def _layer(sizes: Mapping[str, int]) -> JsonValue:
    return {"tensors": dict(sizes), "total": sum(sizes.values())}


def _share(given: Mapping[str, Any]) -> JsonValue:
    transferable = given["bandwidth"] * given["layer_seconds"]
    host = given["host_bytes"] / (given["layers"] - KEPT_LAYERS)
    return swapped_share(LayerBytes(**given["bytes"]), transferable=transferable, host=host)


def _held_bytes(given: Mapping[str, Any]) -> JsonValue:
    settings = {name: given[name] for name in ("mode", "layers", "tokens", "share")}
    tensors: Mapping[str, int] = given["tensors"]
    others = sum(size for name, size in tensors.items() if name not in {"input", "attention"})
    device, host = held_bytes(LayerBytes(tensors["input"], tensors["attention"], others), **settings)
    return {"device": device, "host": host}


BEHAVIOURS: dict[str, Callable[[Mapping[str, Any]], JsonValue]] = {
    "skeletal bytes of a GPT layer": lambda given: _layer(gpt_layer_bytes(**given)),
    "skeletal bytes of a Llama layer": lambda given: _layer(llama_layer_bytes(**given)),
    "share of tokens that is swapped": _share,
    "tokens that are swapped": lambda given: swapped_tokens(**given),
    "bytes held between forward and backward": _held_bytes,
}
"""Functions that compute them, by name."""
