"""MemLongMechanism: keys and values of one layer, found by the text they came from, and read in several layers.

The calls, with what they compute (MemLong, arXiv 2408.16967, section 3, and its released code):

``write``   One pass over a chunk, without gradients. In layer m, ``memory_layer``, keys ``K = W_k y`` and values
            ``V = W_v y`` of every token, y what the layer makes of its input by its norm, *before* rotary positions.
            The chunk is cut into groups of w tokens, ``group_tokens``, each with the embedding of its text as key.
``absorb``  Lets others leave where the bank is full, and puts the rows of a group, one a token, behind the others.
``open``    ``q``, the embedding of the text to ask with; of the stream's groups the k with the largest ``q . key``, the
            oldest first. All their tokens come back, M together, the same for all layers and tokens.
``reopen``  The same again, with the text so far, where ``retrieve_every`` says so.
``prefix``  In the layers of ``read_layers``: ``softmax([q K_m^T / sqrt(d) | q K^T / sqrt(d) + causal]) [V_m | V]``. K_m
            and V_m are those of layer m, whatever layer reads them. "Zero": rows at position 0, the text at 1, 2, ...;
            "Continual": rows at 0 .. M - 1, the text from M on. With a gate the first scores are multiplied by s(g),
            the others by 1 - s(g). All other layers are left alone.

Layers below m are frozen in the paper, and none of them reads. So what layer m receives depends on no memory: rows of
one source hold nothing of another's text, and are the same whenever a text is written.

Decisions of ours: streams of a batch may hold unequally many groups; no token is read with what a later one chose
(``query``); counters are of writes (``eviction``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from attrs import evolve
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import MPlusConfig
from mplus.errors import ConfigError, InputError
from mplus.mechanisms.base import Kept, MemoryMechanism
from mplus.mechanisms.decoder import Attended, Decoder, DecoderShape, Project, Text
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.root import Absorbed, Columns
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext, check_finite
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus_memlong.encoders import HiddenStates, SentenceEncoder, TextEncoder
from mplus_memlong.eviction import make_room
from mplus_memlong.options import SIZES, MemLongOptions, group_tokens, settled
from mplus_memlong.reading import Chosen, Positions, ReadGroups, attend_gated
from mplus_memlong.search import GroupSearch
from mplus_memlong.state import MemLongState, state_of


class MemLongAdditions(nn.Module):
    """What MemLong adds to a decoder: a gate for every head of every layer that reads, where there is one.

    Attributes:
        memory_layer, read_layers, encoder_layer: as the options say, or as follows from the decoder's depth.
        learned_positions: the decoder adds positions to its embeddings, so that no text is moved.
        gate: ``[layers that read, H]``, 0 at first; None without a gate.
    """

    gate: nn.Parameter | None

    def __init__(self, shape: DecoderShape, options: MemLongOptions) -> None:
        super().__init__()
        last = shape.layers - 1
        self.memory_layer = shape.layers // 2 if options.memory_layer is None else options.memory_layer
        if self.memory_layer > last:
            raise ConfigError(f"memory_layer must be one of the layers 0 to {last}, got {self.memory_layer}")
        spread = sorted({self.memory_layer + turn * (last - self.memory_layer) // 3 for turn in range(4)})
        self.read_layers = tuple(spread) if options.read_layers is None else options.read_layers
        if self.read_layers[0] < self.memory_layer or self.read_layers[-1] > last:
            raise ConfigError(
                f"read_layers must be from memory_layer ({self.memory_layer}) to the last layer ({last}), so that what "
                f"is kept depends on nothing that was read, got {list(self.read_layers)}"
            )
        self.encoder_layer = shape.layers // 4 if options.encoder_layer is None else options.encoder_layer
        if self.encoder_layer > last:
            raise ConfigError(f"encoder_layer must be one of the layers 0 to {last}, got {self.encoder_layer}")
        self.learned_positions = shape.positions == "learned"
        heads = shape.heads
        if options.gate and heads is None:
            raise ConfigError("gate must be False with a decoder whose configuration names no number of heads")
        gate = nn.Parameter(torch.zeros(len(self.read_layers), heads or 0)) if options.gate else None
        self.register_parameter("gate", gate)


class MemLongMechanism(MemoryMechanism):
    """Keeps un-rotated keys and values of one layer for every token, and reads the groups whose text is alike.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "memlong", "encoder": "BAAI/bge-m3"})
    """

    Options: ClassVar[type[MemLongOptions]] = MemLongOptions  # type: ignore[assignment]
    name = "memlong"
    State: ClassVar[type[StreamState]] = MemLongState
    attends = True
    keeps: ClassVar[frozenset[Kept]] = frozenset({"projected"})
    keeps_states = True
    retrieves_in_open = True
    sizes: ClassVar[Mapping[str, int]] = SIZES
    options: MemLongOptions
    additions: MemLongAdditions

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        return settled(config, room)

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: MemLongOptions) -> MemLongAdditions:
        """Make the gates, where there are any. Raises ConfigError where there are no such layers."""
        return MemLongAdditions(shape, options)

    def __init__(self, config: MPlusConfig, additions: MemLongAdditions, options: MemLongOptions) -> None:
        super().__init__(config, additions, options)
        self.group_tokens = options.group_tokens or group_tokens(config.chunk_tokens, config.retrieved_tokens)
        self.most_groups = max(config.retrieved_tokens // self.group_tokens, 1)
        encoder = options.encoder
        self.encoder: TextEncoder = (
            HiddenStates(additions.encoder_layer) if encoder is None else SentenceEncoder(encoder)
        )
        self.groups = GroupSearch(options.exact_groups)

    @property
    def dtype(self) -> torch.dtype | None:
        name = self.options.bank_dtype
        return None if name is None else cast("torch.dtype", getattr(torch, name))

    @property
    def isolated_sources(self) -> bool:
        return True

    # ------------------------------------------------------------------ what is kept

    def layout(self, shape: DecoderShape, kept: Kept, projected_size: int) -> StoreLayout:
        return evolve(super().layout(shape, kept, projected_size), layers=1)

    def layer_of(self, part: int) -> int:
        return self.additions.memory_layer

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> MemLongState:
        if layout.expiry:
            raise ConfigError(
                f"eviction must be a policy by which rows leave at capacity with the mechanism {self.name!r}, which "
                "merges nothing, so that no lifetime would run out: use 'fifo', say"
            )
        return MemLongState.empty()

    def bytes_beside(self, rows: int) -> int:
        """Return the bytes of the table of so many tokens in whole groups, without keys: 4 each, and 24 a group.

        What more it takes, for keys, counters and shorter groups, is counted when groups leave.
        """
        return 4 * rows + 24 * -(-rows // self.group_tokens)

    # ------------------------------------------------------------------ writing

    @torch.no_grad()
    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run one pass over a chunk of every stream, and embed the text of its groups. No gradients flow."""
        layer, ids = self.additions.memory_layer, text.need_ids()
        found = decoder.run(ids, adapter="write", collect={"inputs"}).inputs
        inputs = found[layer]
        keys = [
            self.encoder.groups(own.split(self.group_tokens), hidden, text.tokenizer)
            for own, hidden in zip(ids, found[self.additions.encoder_layer], strict=True)
        ]
        for key in keys:
            check_finite(key, "in the embedding of a group's text")
        rows = decoder.project(layer, inputs).to(self.dtype or inputs.dtype)
        return Update((), (rows,), beside=tuple({"group_key": key} for key in keys))

    def absorb(self, state: Any, update: Update, source: int, context: WriteContext) -> Absorbed:
        ids, rows = context.ids, update.projected[0].detach()
        if ids is None or ids.shape[0] != len(rows):
            raise InputError(f"absorb needs the ids of the {len(rows)} tokens that the rows were made of, got {ids!r}")
        layout, keys, evicted = context.store.layout, update.beside[0]["group_key"], 0
        rows = rows.to(layout.device, layout.dtype)
        found = self._recalled(state, keys)
        parts = zip(ids.split(self.group_tokens), rows.split(self.group_tokens), keys, found, strict=True)
        for own, own_rows, key, recalled in parts:
            state, left = make_room(state, len(own), context, self.options, self._room(context))
            births = torch.arange(state.clock, state.clock + len(own), device=layout.device)
            of_source = torch.full_like(births, source)
            context.store.append(0, MemoryRows(None, births, of_source, projected=own_rows))
            state, evicted = state.with_group(own, source, key, recalled), evicted + left
        return Absorbed(state, 0, evicted)

    def _recalled(self, state: MemLongState, keys: Tensor) -> Sequence[Tensor]:
        """Return for each new key ``[g, v]`` the times of the groups that it finds, of those that there were before."""
        if not state.groups:
            return [state.group_time[:0]] * len(keys)
        compared = self._compared(keys, state)
        if self.options.evict != "counters":
            return [state.group_time[:0]] * len(keys)
        scores = compared @ state.group_key.T
        best = scores.topk(min(self.most_groups, state.groups)).indices.sort().values
        return list(state.group_time[best])

    def _room(self, context: WriteContext) -> int | None:
        """Return the bytes that a stream may take under a budget; None: there is none."""
        capacity = context.capacity
        if capacity is None or capacity == self.config.long_term_tokens:
            return None
        return capacity * context.store.bytes_per_row + self.bytes_beside(capacity)

    # ------------------------------------------------------------------ reading

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Choose the groups that each text reads, by what it asks with (``MemLongOptions.query``)."""
        if not any(map(self.has_prefix, views)):
            return Opened(views)
        for view in views:
            self._check(view)
        chosen = self._chosen(views, self._queries(decoder, views, text))
        lengths = [state_of(view).group_length[one.groups].sum() for view, one in zip(views, chosen, strict=True)]
        offset = torch.stack(lengths)
        if self.options.positions == "zero":
            offset = offset.clamp(max=1)  # a text that reads nothing stays where it is
        read = self._read(decoder, views, chosen, offset)
        return Opened(views, own=read, text_offset=None if self.additions.learned_positions else offset)

    def reopen(self, decoder: Decoder, opened: Opened, text: Text, rows: Sequence[int]) -> Opened:
        """Exchange the groups of ``rows`` for what the text so far finds, its last ``encoder_tokens`` tokens."""
        if opened.own is None:
            return opened
        asked = evolve(text, queries=None, limited=True)
        queries: list[Tensor | None] = [None] * len(opened.views)
        asking = [row for row in rows if self.has_prefix(opened.views[row])]
        for row, query in zip(
            asking, self._encoded(decoder, [self._ids(asked, row) for row in asking], text), strict=True
        ):
            queries[row] = query
        chosen = list(opened.own.chosen)
        new = self._chosen(opened.views, queries)
        for row in asking:
            chosen[row] = new[row]
        return evolve(opened, own=self._read(decoder, opened.views, chosen, opened.own.offset))

    def _read(
        self, decoder: Decoder, views: Sequence[StreamView], chosen: Sequence[Chosen], offset: Tensor
    ) -> ReadGroups:
        read = ReadGroups(decoder.kept, views, chosen, cast("Positions", self.options.positions), offset)
        for row, view in enumerate(views):
            if view.access_log is not None and read.lengths[row]:
                view.access_log.record(0, read.ids(row), view.state.clock)
        return read

    def _check(self, view: StreamView) -> None:
        if self.options.evict != "released":
            state_of(view).check_store(view)

    def _queries(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> list[Tensor | None]:
        """Return ``[v]`` for each text, what it asks with; None for one whose stream is empty."""
        asking = [row for row, view in enumerate(views) if self.has_prefix(view)]
        named = text.queries is not None or text.limited or text.prompt
        if self.options.query == "before" and not named:
            found: Sequence[Tensor] = [state_of(views[row]).group_key[-1] for row in asking]
        else:
            found = self._encoded(decoder, [self._ids(text, row) for row in asking], text)
        queries = dict(zip(asking, found, strict=True))
        return [queries.get(row) for row in range(len(views))]

    def _ids(self, text: Text, row: int) -> Tensor:
        """Return the last tokens ``[n]`` int64 that a text asks with."""
        if text.queries is not None:
            own = text.queries[row]
        else:
            ids = text.need_ids()[row]
            mask = text.mask if text.query is None else text.query
            own = ids if mask is None else ids[mask[row].to(ids.device)]
        return own[-self.options.encoder_tokens :]

    def _encoded(self, decoder: Decoder, ids: Sequence[Tensor], text: Text) -> Sequence[Tensor]:
        return list(self.encoder.queries(ids, decoder, text.tokenizer)) if ids else []

    def _compared(self, queries: Tensor, state: MemLongState) -> Tensor:
        width = state.group_key.shape[1]
        if queries.shape[-1] != width:
            raise InputError(
                f"the groups of this memory have keys of width {width}, and the encoder makes vectors of width "
                f"{queries.shape[-1]}: use the encoder that they were written with"
            )
        return self.encoder.compared(queries, state.group_key)

    def _chosen(self, views: Sequence[StreamView], queries: Sequence[Tensor | None]) -> list[Chosen]:
        """Return the best groups of each stream; nothing where there is no query."""
        most = self.most_groups
        if self.options.equal_counts:
            most = min(most, *(state_of(view).groups for view in views))
        found = []
        for view, query in zip(views, queries, strict=True):
            if query is None or not most:
                found.append(Chosen.nothing())
                continue
            state = state_of(view)
            groups, scores = self.groups.best(self._compared(query[None], state)[0], state, view.store, most)
            found.append(Chosen(groups, scores, query))
        return found

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | Attended | None:
        if opened.own is None or layer not in self.additions.read_layers:
            return None
        turn = self.additions.read_layers.index(layer)
        segments: tuple[Segment, ...] = opened.own.segments(turn, layer, hidden)
        gate = self.additions.gate
        return segments if gate is None or not segments else Attended(segments, partial(attend_gated, gate[turn]))

    def has_prefix(self, view: StreamView) -> bool:
        return state_of(view).groups > 0

    def prefix_rows(self, view: StreamView) -> int:
        """Return the rows of the longest groups that a text can find."""
        lengths = state_of(view).group_length
        return int(lengths.topk(min(self.most_groups, len(lengths))).values.sum())

    # ------------------------------------------------------------------ reports

    def retrieved(self, opened: Opened, layer: int) -> list[Retrieved | None]:
        """Return the tokens of the groups that were chosen, in the order in which they are read."""
        found: list[Retrieved | None] = [None] * len(opened.views)
        if opened.own is None or layer not in self.additions.read_layers:
            return found
        for row, (view, one) in enumerate(zip(opened.views, opened.own.chosen, strict=True)):
            ids = opened.own.ids(row)
            if len(ids):
                rows = view.store.gather(0, ids, leave_out=("key", "expiry", "projected"))
                lengths = state_of(view).group_length[one.groups]
                scores, units = (part.repeat_interleave(lengths)[: len(ids)] for part in (one.scores, one.groups))
                found[row] = Retrieved(rows.replace(projected=None), ids, scores, units=units)
        return found

    def search(self, decoder: Decoder, view: StreamView, text: str, k: int, tokenizer: Any) -> list[FoundText]:
        """Return the groups that ``text`` finds, the best first."""
        if tokenizer is None:
            raise InputError("a search needs a tokenizer: pass tokenizer= to new_memory, load or open")
        state = state_of(view)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if not state.groups or not len(ids):
            return []
        query = self.encoder.queries([ids[-self.options.encoder_tokens :]], decoder, tokenizer)
        places, scores = self.groups.best(self._compared(query, state)[0], state, view.store, k)
        pieces, sources = state.token_ids.split(state.group_length.tolist()), state.group_source.tolist()
        best = scores.argsort(descending=True, stable=True).tolist()
        return [
            FoundText.of(
                state,
                sources[place],
                score,
                str(tokenizer.decode(pieces[place], skip_special_tokens=True)),
            )
            for place, score in ((int(places[one]), float(scores[one])) for one in best)
        ]

    def sync_index(self, store: MemoryStore) -> None:
        """Let go of an index of groups of which some are forgotten."""
        self.groups.drop(store)
