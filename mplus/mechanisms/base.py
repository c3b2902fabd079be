"""MemoryMechanism: what is written when a chunk is read, and which rows each layer sees when text is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from attrs import evolve
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import MPlusConfig
from mplus.errors import ConfigError, NotSupported
from mplus.mechanisms.decoder import (
    Attended,
    Collected,
    Decoder,
    DecoderShape,
    KeptProjection,
    PassResult,
    Project,
    Text,
)
from mplus.mechanisms.opened import Opened, Retrieved, TextCache
from mplus.mechanisms.root import Absorbed, Columns, IndexedMechanism
from mplus.mechanisms.streams import TrainingStreams
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext, absorbed_by, check_state
from mplus.registry import Registry
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever
from mplus.retrievers.chunks.base import ChunkRetriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout, StoreView
from mplus.tokenizer import Tokenizer

Kept = Literal["projected", "hidden", "both"]
"""What a memory keeps of a row: see ``MPlusConfig.memory_rows``."""


class MemoryMechanism(IndexedMechanism):
    """The rules of one memory. Holds no state of any memory; built as ``Mechanism(config, additions, options)``.

    Attributes:
        additions: the module that ``build`` made: its own parameters.
        retrievers: the kind of retriever that ``MPlusConfig.retriever`` names.
        uses_retriever: whether ``build`` makes a retriever where there is long-term memory.
        empty_is_base: whether a new memory leaves the decoder as it is, bit for bit; checked when a decoder is wrapped.
        attends: whether ``prefix`` returns ``Attended``, so that attention must go through mplus.
        keeps: the ``memory_rows`` that make sense for it.
        keeps_states: whether rows are made by whole passes, so that other weights anywhere make other rows.
        retrieves_in_open: whether ``open``, and ``reopen``, choose rows of the store; ``retrieved`` says which.
        searches_in_passes: whether passes search the store of the views that ``open`` was given, token by token.
        takes_min_score: whether ``open`` and ``reopen`` bring back only what scores above ``Text.min_score``.
        collect: what ``finish`` wants of a pass besides the final hidden state: "inputs", "outputs" or "hidden".
    """

    State: ClassVar[type[StreamState]] = StreamState
    retrievers: ClassVar[Registry[Retriever] | Registry[ChunkRetriever]] = RETRIEVERS
    uses_retriever: ClassVar[bool] = False
    empty_is_base: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    keeps: ClassVar[frozenset[Kept]] = frozenset({"projected", "hidden", "both"})
    keeps_states: ClassVar[bool] = False
    retrieves_in_open: ClassVar[bool] = False
    searches_in_passes: ClassVar[bool] = False
    takes_min_score: ClassVar[bool] = False
    collect: ClassVar[frozenset[Collected]] = frozenset()

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: Any) -> nn.Module:
        """Make the parameters that this mechanism adds to a decoder; by default there are none.

        They live at ``model.mplus``, are brought to the decoder's dtype and device, and are trained, saved and part of
        its fingerprint. A retriever among them is called ``retriever``.

        Args:
            shape: of the decoder.
            config: of the memory.
            options: of this mechanism.
        """
        return nn.Module()

    def __init__(self, config: MPlusConfig, additions: nn.Module, options: Any) -> None:
        self.config = config
        self.additions = additions
        self.options = options
        self.retriever = getattr(additions, "retriever", None)

    def start_from(self, pool: Tensor) -> None:
        """Let every new memory start from ``pool`` ``[L, N, d]``, rows that came with a checkpoint.

        Raises:
            ConfigError: new memories of this mechanism are empty.
        """
        raise ConfigError(
            f"pool means nothing to the mechanism {self.name!r}, whose new memories are empty: leave it out"
        )

    def draw_parameters(self) -> None:
        """Draw own parameters for a decoder that is trained from nothing; by default those of ``build`` stay."""

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of new rows; None: that of the decoder's hidden states."""
        return None

    @property
    def isolated_sources(self) -> bool:
        """Return whether rows of one source hold nothing of the text of another.

        Where they do, as rows that are made while older ones are read, what a chunk took in of a source stays after
        that source is forgotten; ``forget(source, mode="rebuild")`` takes it back.
        """
        return False

    @property
    def expiry(self) -> bool:
        """Return whether long-term rows carry an expiry."""
        return False

    @property
    def long_term(self) -> bool:
        """Return whether there is a long-term memory at all."""
        return self.config.long_term_tokens != 0

    @property
    def keeps_pinned(self) -> bool:
        return self.pins and self.long_term

    def reserve(self, layout: StoreLayout) -> int:
        """Return the most bytes that one layer of a stream takes besides its store: what a budget sets aside."""
        return 0

    def bytes_beside(self, rows: int) -> int:
        """Return the most bytes of a stream's state that come with ``rows`` long-term rows a layer: a table, say."""
        return 0

    @property
    def key_size(self) -> int:
        """Width of retriever keys; 0 where none are kept."""
        return 0 if self.retriever is None else self.retriever.key_size

    def layout(self, shape: DecoderShape, kept: Kept, projected_size: int) -> StoreLayout:
        """Return what the rows of a memory look like, and how many lists of them a stream has.

        By default there is a list for every layer that carries memory, of rows as wide as hidden states. A mechanism
        that keeps the rows of one layer, or one list for all layers, says ``layers=1``, and one whose rows are
        embeddings another ``hidden_size``: ``evolve(super().layout(shape, kept, projected_size), layers=1)``.

        Args:
            shape: of the decoder.
            kept: what is kept of a row.
            projected_size: width of a row's keys and values; 0 where they are not kept.
        """
        return StoreLayout(
            layers=shape.layers,
            hidden_size=shape.width,
            key_size=self.key_size,
            expiry=self.expiry,
            dtype=self.dtype or shape.dtype,
            device=shape.device,
            projected_size=projected_size,
            keeps_hidden=kept != "projected",
            transposed_keys=self.retriever is not None and self.retriever.transposed_keys,
        )

    def layer_of(self, part: int) -> int:
        """Return the layer, of those that carry memory, that projects rows of list ``part`` and makes their keys."""
        return part

    def capacity(self, rows: int) -> int:
        """Return how many text tokens ``rows`` rows of a list hold; by default a row is a token."""
        return rows

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> StreamState:
        """Return a fresh stream; by default a ``State`` without anything.

        Args:
            layout: of its rows.
            columns: makes the columns of rows that a stream begins with; None: there are only their hidden states.
        """
        return self.State()

    def chunks(self, ids: Tensor, tokenizer: Tokenizer | None) -> list[Tensor] | None:
        """Return the chunks that a text ``[n]`` is cut into when it is written; None, the default: all of one size.

        A chunk has to be the same whatever comes behind the ``chunk_tokens + 1`` tokens from its first one on, so that
        a text can be written in pieces. ``tokenizer`` is that of the memory, or None.
        """
        return None

    @abstractmethod
    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Make new rows of one chunk of each stream; nothing of the streams may be changed.

        Runs the passes it wants. Gradients flow where they are enabled.

        Args:
            decoder: runs passes.
            views: the streams, equal in ``StreamState.pass_key``.
            text: the chunks, of equal length.
        """

    @abstractmethod
    def absorb(self, state: StreamState, update: Update, source: int, context: WriteContext) -> Absorbed:
        """Take the new rows of one stream, written from ``source``, into its state and its store."""

    def example(self, decoder: Decoder, ids: Tensor, context: WriteContext) -> StreamView:
        """Return a stream to which ``ids`` ``[1, n]`` were written: what a decoder is checked with when it is wrapped.

        Args:
            decoder: runs passes.
            ids: a few tokens.
            context: of an empty store, whose layout is that of the stream.
        """
        new, layout = self.new_state(context.store.layout, decoder), context.store.layout
        check_state(new, self.State, layout, self.name, "new_state must return a")
        state, source = new.with_source(None, ids.shape[1])
        update = self.write(decoder, [StreamView(state, context.store)], Text(ids))
        Update.check(update, self.name, 1, [layout])
        update.check_finite(ids.shape[1], self.name)
        absorbed = absorbed_by(self, state, update.of(0), source, evolve(context, ids=ids[0]))
        return StreamView(absorbed.state, context.store.snapshot())

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        """Long-term rows for each batch row, oldest first; None where there is no long-term memory.

        Args:
            layer: index among the layers that carry memory.
            hidden: ``[B, T, d]`` text after the layer's input norm.
            mask: ``[B, T]`` bool, False at padding.
            views: one per batch row.
        """
        return [None] * len(views)

    def bring_back(self, store: StoreView, layer: int, ids: Tensor, scores: Tensor) -> Retrieved:
        """Return rows as ``retrieve`` does, oldest first: for what chooses in its place.

        Args:
            store: what ``searched`` gave for the layer.
            layer: index among the layers that carry memory.
            ids, scores: ``[n]`` int64, ascending, and ``[n]`` or empty.
        """
        rows = store.gather(layer, ids)
        order = rows.birth.argsort(stable=True)
        scores = scores[order.to(scores.device)] if len(scores) else scores
        return Retrieved(rows.select(order), ids[order], scores)

    def retrieved(self, opened: Opened, layer: int) -> list[Retrieved | None]:
        """Return the rows of a layer that ``open`` chose, for each batch row; None where it chose none.

        For reports: of a mechanism that chooses layer by layer, in ``retrieve``, these are all None.
        """
        return [None] * len(opened.views)

    def prepare(self, projection: KeptProjection, batch: int | None) -> Any:
        """Return what all reads of one state of a memory share, or None; it is kept until the memory changes.

        Args:
            projection: of rows that are kept as keys and values.
            batch: rows of the batch it is for, where each has an adapter of its own; else None.
        """
        return None

    def prepare_together(self, prepared: Sequence[Any]) -> Any:
        """Return what one read of several memories has of what ``prepare`` made for each, none of them None; or None.

        Args:
            prepared: of each batch row.
        """
        raise NotSupported(f"memories of the mechanism {self.name!r} are read one by one: it has no prepare_together")

    def prepare_tensors(self) -> dict[str, Tensor]:
        """Return own tensors that ``prepare`` computes with, by name: if one changes, it is called again."""
        return {}

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Get ready for one read, before its first pass: retrieve by the whole text, say, or make a soft prompt.

        Args:
            decoder: runs passes.
            views: one per batch row.
            text: of the first forward.
        """
        return Opened(views)

    def reopen(self, decoder: Decoder, opened: Opened, text: Text, rows: Sequence[int]) -> Opened:
        """Choose anew what the rest of a text reads; asked for when ``retrieve_every`` further tokens have come.

        What a row reads may depend on its view and its text alone. So after beams were reordered, say, rows get what
        they would have got by themselves. Text that was read before stays as it is in the decoder's cache.

        Args:
            decoder: runs passes.
            opened: what was read so far, with a view for each batch row.
            text: all text so far; its ``mask`` ends, in every row, with the token at which the row chooses anew.
            rows: the batch rows that do so. What others read stays.
        """
        return opened

    def resume(self, decoder: Decoder, opened: Opened, text: Text, read: Tensor) -> Opened:
        """Choose what new tokens read besides, where a call goes on with a cache; of a mechanism that ``reopens``.

        What was read stays; ``Opened.insertion`` may get blocks behind the ``read`` ``[B]`` tokens of each row.
        """
        return opened

    @abstractmethod
    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | Attended | None:
        """Return what a layer sees in front of the text, oldest first; None: the layer is left alone.

        Args:
            opened: what ``open`` returned.
            layer: index among the layers that carry memory.
            found: what ``retrieve`` returned for this layer.
            hidden: ``[B, T, d]``, the text after the layer's input norm; gives device and dtype.
            project: projects rows, and rotates their keys to their positions.
        """

    def finish(self, opened: Opened, result: PassResult, cache: TextCache | None) -> Tensor:
        """Return the final hidden state ``[B, T, d]`` that the decoder's head gets.

        Called in every forward of a read, behind the decoder's final norm, with gradients where they are enabled.

        Args:
            opened: what ``open`` returned.
            result: of the pass, with what ``collect`` names, and the text so far.
            cache: what ``new_cache`` made for this text, to be filled by this method.
        """
        return result.need_hidden()

    def new_cache(self) -> TextCache | None:
        """Return what ``finish`` keeps of the tokens of one text; it goes with the decoder's key/value cache."""
        return None

    @property
    def retrieves(self) -> bool:
        """Return whether layers ask for rows with their own hidden states (``retrieve``)."""
        return type(self).retrieve is not MemoryMechanism.retrieve

    @property
    def reopens(self) -> bool:
        """Return whether something else can be read later on in a text (``reopen``)."""
        return type(self).reopen is not MemoryMechanism.reopen

    @property
    def finishes(self) -> bool:
        """Return whether it has a say in the final hidden state (``finish``)."""
        return type(self).finish is not MemoryMechanism.finish

    def has_prefix(self, view: StreamView) -> bool:
        """Return whether a read puts anything in front of the text."""
        return self.prefix_rows(view) > 0

    @abstractmethod
    def prefix_rows(self, view: StreamView) -> int:
        """Return how many rows a read puts in front of the text, in the layer that has most."""

    def attended_rows(self, view: StreamView) -> int:
        """Return how many tokens of memory a token of the text attends to, in the layer that sees most: for reports.

        By default the rows in front of the text; a mechanism that reads in ``finish`` puts none there.
        """
        return self.prefix_rows(view)

    def streams(
        self,
        decoder: Decoder,
        layout: StoreLayout,
        numbers: Sequence[int],
        *,
        seed: int,
        long_term: bool = True,
    ) -> TrainingStreams | None:
        """Return the memories of many streams, held together so that they are trained fast.

        None, the default: they are trained by ``write``, ``absorb``, ``retrieve`` and ``prefix`` of each stream
        (``mplus.mechanisms.separate_streams``), as they are.

        Args:
            decoder: runs passes.
            layout: of the rows.
            numbers: global number of each stream; seeds its draws.
            seed: of all draws.
            long_term: whether rows that leave short-term memory are kept, where a mechanism has one.
        """
        return None

    def standing(self, view: StreamView, layer: int) -> MemoryRows | None:
        """Return the rows of a layer that every read sees, whatever it retrieves; None where there are none."""
        return None

    def searched(self, view: StreamView, layer: int) -> StoreView:
        """Return the rows of a layer that ``retrieve`` chooses from."""
        return view.store
