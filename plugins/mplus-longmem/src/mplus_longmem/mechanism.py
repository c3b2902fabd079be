"""LongMemMechanism: the bank of one layer's keys and values, written by the decoder and read by a side network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from attrs import evolve
from torch import Tensor, nn

from mplus.backends import Segment
from mplus.config import options_of
from mplus.errors import NotSupported
from mplus.mechanisms import (
    Absorbed,
    Decoder,
    DecoderShape,
    Kept,
    MemoryMechanism,
    MemoryRows,
    MPlusConfig,
    Opened,
    PassResult,
    StoreLayout,
    StreamState,
    StreamView,
    Text,
    TextCache,
    TokenTensors,
    Update,
    WriteContext,
)
from mplus.mechanisms.decoder import Collected
from mplus_longmem.bank import Bank, ChunkSearch, Heads
from mplus_longmem.settings import LongMemOptions, settled
from mplus_longmem.side_network import Plan, SideNetwork


class LongMemMechanism(MemoryMechanism):
    """Keeps keys and values of one layer in chunks; every token and head of a side network reads its own ones.

    A row is a chunk of ``chunk_size`` tokens, so ``long_term_tokens`` and ``retrieved_tokens`` count chunks. The
    decoder is frozen, also where its parameters are not: nothing of it gets a gradient.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "longmem", "chunk_size": 4}, retrieved_tokens=16)
    """

    Options = LongMemOptions
    name = "longmem"
    empty_is_base = False  # the side network stands in the decoder's place
    attends = True
    keeps: ClassVar[frozenset[Kept]] = frozenset({"projected"})
    keeps_states = True
    searches_in_passes = True
    collect: ClassVar[frozenset[Collected]] = frozenset({"hidden", "calls"})
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 1024, "retrieved_tokens": 16}
    additions: SideNetwork
    options: LongMemOptions

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        options = options_of(cls, config.mechanism.options)
        return settled(config, room, cls.sizes, options.chunk_size)

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: LongMemOptions) -> nn.Module:
        """Copy the side network's layers and final norm from the decoder; gates start at 0, half open.

        Raises:
            ConfigError: layers that the options name are not there.
            NotSupported: the decoder's layers cannot be copied, or it does not say the sizes of its heads.
        """
        plan = Plan.of(shape.depth, options.reduction, options.layer)
        if shape.hybrid:
            raise NotSupported(
                "LongMem's side network needs a decoder all of whose layers attend, and some of this one's do not: use "
                "another mechanism, such as 'kv'"
            )
        search = ChunkSearch(_heads(shape, options.chunk_size), options.zero_neighbours)
        return SideNetwork(shape, plan, search, options.normed_last)

    def draw_parameters(self) -> None:
        """Let the decoder become another one: what it is known by is of no use while it is trained from nothing."""
        self.additions.decoder_mark.zero_()

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.options.bank_dtype is None else cast("torch.dtype", getattr(torch, self.options.bank_dtype))

    @property
    def isolated_sources(self) -> bool:
        return not self.options.shared_bank

    def layout(self, shape: DecoderShape, kept: Kept, projected_size: int) -> StoreLayout:
        heads = self.additions.search.heads
        size = heads.keys * (heads.width + heads.value_width)
        if projected_size and projected_size != size:
            raise NotSupported(
                f"LongMem needs the sizes of the decoder's heads, and its configuration says {heads.keys} heads of "
                f"{heads.width} and {heads.value_width}, where a token has {projected_size} numbers"
            )
        return evolve(
            super().layout(shape, kept, projected_size),
            layers=1,
            projected_size=heads.row,
            key_size=heads.keys * heads.width,
            key_dtype=torch.promote_types(shape.dtype, torch.float32),
            extra=(("tokens", (), torch.int32),),
        )

    def layer_of(self, part: int) -> int:
        return self.additions.plan.bank_layer

    def capacity(self, rows: int) -> int:
        return rows * self.options.chunk_size

    def chunks(self, ids: Tensor, tokenizer: Any) -> list[Tensor]:
        """Cut behind every ``chunk_tokens``, T, so that chunks of the bank are full up to the end of a text."""
        return list(ids.split(self.config.chunk_tokens))

    @torch.no_grad()
    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run one pass over the text alone, and cut the keys and values of one layer into chunks."""
        layer, ids = self.additions.plan.bank_layer, text.need_ids()
        found = decoder.run(ids, adapter="write", collect={"inputs"})
        made = [self._chunks(tokens) for tokens in self._texts(decoder.project(layer, found.inputs[layer]))]
        told = torch.tensor([made[0][2]])
        beside = tuple({"tokens": tokens, "told": told} for _, tokens, _ in made)
        return Update((), (torch.stack([rows for rows, _, _ in made]),), beside=beside)

    def _texts(self, projected: Tensor) -> list[Tensor]:
        """Return what each of B streams gets of ``[B, T, w]``: its own tokens, or those of all, row behind row."""
        if not self.options.shared_bank:
            return list(projected)
        return [projected.flatten(0, 1)] * len(projected)

    def _chunks(self, projected: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the chunks of tokens ``[N, w]``, how many tokens each has, and N."""
        size, count = self.options.chunk_size, len(projected)
        left = count % size
        if left and self.options.drop_remainder:
            projected = projected[: count - left]
        elif left:
            projected = nn.functional.pad(projected, (0, 0, 0, size - left))
        tokens = torch.full((len(projected) // size,), size, dtype=torch.int32, device=projected.device)
        if left and not self.options.drop_remainder:
            tokens[-1] = left
        return self.additions.search.heads.chunked(projected), tokens, count

    def absorb(self, state: StreamState, update: Update, source: int, context: WriteContext) -> Absorbed:
        store, layout = context.store, context.store.layout
        made, tokens = update.projected[0], update.beside[0]["tokens"]
        told = int(update.beside[0]["told"])
        evicted = self._make_room(told, len(made), context)
        births = state.clock + torch.arange(len(made), device=layout.device) * self.options.chunk_size
        means = self.additions.search.heads.means(made, tokens).to(layout.device, layout.key_dtype)
        rows = MemoryRows(
            None,
            births,
            torch.full_like(births, source),
            key=means,
            projected=made.to(layout.device, layout.dtype),
            extra={"tokens": tokens.to(layout.device)},
        )
        store.append(0, rows)
        return Absorbed(evolve(state, clock=state.clock + told), 0, evicted + context.evict()[0])

    def _make_room(self, told: int, new: int, context: WriteContext) -> int:
        """Let twice as many chunks leave as ``told`` tokens make, in the published variant; return how many did."""
        held = context.store.count(0)
        if not self.options.evict_double or context.capacity is None or held + new < context.capacity:
            return 0
        leaving = min(2 * told // self.options.chunk_size, held)
        context.store.remove(0, context.leaving(0, leaving))
        return leaving

    def example(self, decoder: Decoder, ids: Tensor, context: WriteContext) -> StreamView:
        size = self.options.chunk_size  # one chunk at least, also where a remainder is dropped
        return super().example(decoder, ids.repeat(1, -(-size // ids.shape[1])), context)

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        self.additions.check_decoder()
        return Opened(views, own=[Bank.of(view.store, self.config.retrieved_tokens) for view in views])

    def has_prefix(self, view: StreamView) -> bool:
        return True  # an empty bank is read too, by the side network alone

    def prefix_rows(self, view: StreamView) -> int:
        return 0

    def attended_rows(self, view: StreamView) -> int:
        return self.capacity(min(self.config.retrieved_tokens, view.store.count(0)))

    def prefix(self, opened: Opened, layer: int, *of: Any) -> tuple[Segment, ...] | None:
        """Return None: the decoder's own layers see the text alone."""
        return None

    def new_cache(self) -> TokenTensors:
        return TokenTensors()

    def finish(self, opened: Opened, result: PassResult, cache: TextCache | None) -> Tensor:
        copies = result.hidden_states[0].shape[0] // len(opened.views)
        banks = [bank for bank in opened.own for _ in range(copies)]
        found: Tensor = self.additions(result, banks, cast("TokenTensors | None", cache))
        return found


def _heads(shape: DecoderShape, tokens: int) -> Heads:
    """Return the sizes of a chunk of ``tokens``. Raises NotSupported: the decoder's configuration does not say them."""
    heads, keys, width, value_width = shape.heads, shape.key_heads, shape.head_size, shape.value_size
    if heads is None or keys is None or width is None or value_width is None:
        raise NotSupported(
            "LongMem needs a decoder whose configuration says how many heads it has and how wide they are, the same in "
            "all layers, and this one's does not"
        )
    return Heads(heads, keys, width, value_width, tokens)
