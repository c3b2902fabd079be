"""A mechanism like LongMem: a side network over the decoder's hidden states, which searches a bank for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from mplus.mechanisms.kv.mechanism import KvMechanism
from mplus.mechanisms.opened import Opened, TextCache, TokenTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.mechanisms.decoder import Collected, Decoder, DecoderShape, PassResult, Text
    from mplus.memory.state import StreamView

CUTS = (0, 2, 5)
"""Side layer i goes with the decoder's layers from the first of two numbers to the second."""
BANK_LAYER, TOP = 3, 6
HEADS, SIZE = 4, 8


class SideLayer(nn.Module):
    """Attention with a bias by distance, and a feed-forward network beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, HEADS * SIZE, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * SIZE, width, bias=False)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)


class SideNetwork(nn.Module):
    """Its parameters: a layer for each cut, and the gate of each head between text and bank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SideLayer(width) for _ in CUTS[1:])
        self.gate = nn.Parameter(torch.zeros(HEADS))


class SideMechanism(KvMechanism):
    """Keeps what "kv" keeps; nothing stands in front of a text."""

    name = "side"
    empty_is_base = False
    collect: ClassVar[frozenset[Collected]] = frozenset({"hidden"})

    @classmethod
    def build(cls, shape: DecoderShape, config: Any, options: Any) -> nn.Module:
        return SideNetwork(shape.width)

    def has_prefix(self, view: StreamView) -> bool:
        return False

    def prefix_rows(self, view: StreamView) -> int:
        return 0

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        return Opened(views)

    def prefix(self, *what: Any) -> None:
        return None

    def new_cache(self) -> TokenTensors:
        return TokenTensors()

    def finish(self, opened: Opened, result: PassResult, cache: TextCache | None) -> Tensor:
        assert isinstance(cache, TokenTensors)
        side: Any = self.additions
        states = [state.detach() for state in result.hidden_states]
        hidden, bias = states[0], distances(result.need_text(), states[0].shape[1])
        banks = [bank(view, hidden) for view in opened.views_of(hidden.shape[0])]
        for number, (layer, first, last) in enumerate(zip(side.layers, CUTS, CUTS[1:], strict=False)):
            inside = layer_norm(hidden, hidden.shape[-1:])
            query, key, value = (heads(part(inside)) for part in (layer.query, layer.key, layer.value))
            keys = cache.append(f"{number}.keys", key).transpose(1, 2)
            values = cache.append(f"{number}.values", value).transpose(1, 2)
            query = query.transpose(1, 2)
            scores = query @ keys.transpose(-1, -2) * SIZE**-0.5 + bias.to(query)
            found = scores.softmax(-1) @ values
            if number == 1 and banks[0] is not None:
                gate = side.gate.sigmoid()[:, None, None]
                read = torch.stack([search(one, *of) for one, of in zip(query, banks, strict=True)])
                found = (1 - gate) * found + gate * read
            hidden = hidden + layer.out(found.transpose(1, 2).flatten(2)) + layer.down(gelu(layer.up(inside)))
            hidden = hidden + states[last] - states[first]
        return layer_norm(hidden, hidden.shape[-1:])


def distances(text: Text, new: int) -> Tensor:
    """``[B, 1, T, S]``: a tenth of how far each of the last tokens is behind each token; very low where it is not."""
    place = text.positions
    apart = place[:, None] - place[:, -new:, None]
    hidden = apart > 0 if text.mask is None else (apart > 0) | ~text.mask[:, None]
    return (0.1 * apart).masked_fill(hidden, -1e4)[:, None]


def heads(rows: Tensor) -> Tensor:
    """``[B, n, H, D]``."""
    return rows.unflatten(-1, (HEADS, SIZE))


def bank(view: StreamView, like: Tensor) -> Any:
    """Keys and values ``[H, M, D]`` of one layer; None where there are none."""
    rows = view.store.gather(BANK_LAYER, view.store.ids(BANK_LAYER)).columns().get("projected")
    if rows is None or not len(rows):
        return None
    return tuple(heads(part).transpose(0, 1) for part in rows.to(like).chunk(2, -1))


def search(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each query ``[H, T, D]`` attends to the ``TOP`` keys that it likes best, by itself and in its own head."""
    scores = query @ keys.transpose(-1, -2)
    best = scores.topk(min(TOP, keys.shape[1]), -1)
    places = best.indices[..., None].expand(-1, -1, -1, SIZE)
    chosen = values[:, None].expand(-1, query.shape[1], -1, -1).gather(2, places)
    return ((best.values * SIZE**-0.5).softmax(-1)[..., None] * chosen).sum(2)
