"""Decoder: what a wrapped decoder offers to the mechanism of its memories; ``mplus.hf`` provides it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from attrs import define, field
from torch import Tensor

from mplus.backends.base import AttentionRequest, AttentionResult, Segment
from mplus.errors import InputError
from mplus.mechanisms.opened import Insertion
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.mechanisms.copied_layers import Copies, LayerCall
    from mplus.stores.base import Location

Collected = Literal["inputs", "outputs", "projected", "hidden", "calls", "logits"]
"""What ``Decoder.run`` can bring back of a pass besides the final hidden state."""
Adapter = Literal["write", "read"]
"""Which of the LoRA adapters a pass runs with."""


@define(frozen=True, eq=False)
class Text:
    """Text of one pass.

    Attributes:
        ids: ``[B, n]`` int64; of a read that was given embeddings there are none.
        mask: ``[B, n]`` bool, False at padding; None: there is none.
        tokenizer: turns ids into text again, where the memory has one.
        embedded: ``[B, n, w]``, the embeddings of a read that was given no ids.
        query: ``[B, n]`` bool, of a read: the tokens to retrieve with (``query_tokens``); None: all that are text.
        sources: of a write, for each row the number of the source that the chunk comes from, None where it is a new
            one; () where it is not known.
        short: of a write: it is too short for a chunk, so that it is to cost no more rows than it has tokens.
        limited: a read says with how many tokens to retrieve, so that a mechanism does not choose among them itself.
        queries: of each row ``[q]`` int64, ids to retrieve with in the place of its own (``retrieval_query``).
        further: tokens that may be read behind these, such as those of an answer.
        prompt: of a read: a generation goes on behind it, so that none of its own tokens is to be predicted.
        min_score: bring back only what scores higher; None: as the mechanism's options say.
        reopens: of a read: what it reads may be chosen anew as more of it comes (``retrieve_every``).
        shared: of a read: returns a table for what reads of this state of the memory share, which is kept until the
            memory or a weight changes; None where nothing may be shared, because gradients flow, say.
        shared_by_row: the same for each batch row of a read of many memories; (): it is a read of one.

    Example:
        >>> text = Text(torch.tensor([[0, 0, 7, 8]]), mask=torch.tensor([[False, False, True, True]]))
        >>> text.positions
        tensor([[0, 0, 0, 1]])
    """

    ids: Tensor | None
    mask: Tensor | None = None
    tokenizer: Tokenizer | None = None
    embedded: Tensor | None = None
    query: Tensor | None = None
    sources: tuple[int | None, ...] = ()
    short: bool = False
    limited: bool = False
    queries: Sequence[Tensor] | None = None
    further: int = 0
    prompt: bool = False
    min_score: float | None = None
    reopens: bool = False
    shared: Callable[[], dict[str, Any] | None] = lambda: None
    shared_by_row: Sequence[Callable[[], dict[str, Any] | None]] = ()

    @property
    def positions(self) -> Tensor:
        """``[B, n]`` int64, how many tokens stand before each one, padding not counted; 0 at left padding.

        Raises InputError where there are neither ids nor a mask.
        """
        mask = torch.ones_like(self.need_ids(), dtype=torch.bool) if self.mask is None else self.mask
        return (mask.cumsum(1) - 1).clamp(min=0)

    def need_ids(self) -> Tensor:
        """Return ``ids``. Raises InputError where there are embeddings only."""
        if self.ids is None:
            raise InputError("this memory needs the ids of a text that is read with it, got embeddings: pass input_ids")
        return self.ids


@define(frozen=True, eq=False)
class DecoderShape:
    """Sizes and abilities of a decoder.

    Attributes:
        layers: that carry memory; layers of a mechanism are numbered among these.
        depth: all layers.
        width: of hidden states.
        embedding_width: of token embeddings, which a decoder may widen before its first layer.
        heads, key_heads: of attention, H and Hkv, as the decoder's configuration says; None: it does not.
        head_size, value_size: of one head's key and value, D and Dv; from there too.
        max_positions: that the decoder was made for; None: its configuration does not say.
        vocab_size: ids lie in ``[0, vocab_size)``.
        hybrid: some layers carry no memory (state-space layers, say) and see the text alone.
        positions: "learned": added to the embeddings, so that nothing in attention can be moved; "alibi": distances
            as biases; "rotary": everything else.
        dtype: of hidden states.
        device: where ids go.
        begin: ``[L, 1, d]``, what each layer that carries memory would receive for the token that begins a text, as
            it was when the decoder was wrapped: in every layer what the first one receives, its embedding.
        begin_inputs: ``[L, 1, d]``, the same, in every layer what it does receive.
        first_token: that begins a text: BOS, else EOS; None: there is neither.
        embedding_std: standard deviation of the numbers in token embeddings, of which some are looked at.
        copies: makes copies of layers, for a network beside the decoder; None: this is no shape of a real decoder.
    """

    layers: int
    depth: int
    width: int
    embedding_width: int
    heads: int | None
    key_heads: int | None
    head_size: int | None
    value_size: int | None
    max_positions: int | None
    vocab_size: int
    hybrid: bool
    positions: Literal["rotary", "learned", "alibi"]
    dtype: torch.dtype
    device: torch.device
    begin: Tensor
    begin_inputs: Tensor
    first_token: int | None = None
    embedding_std: float = 1.0
    copies: Copies | None = field(default=None, repr=False)


@define(frozen=True, eq=False)
class Rows:
    """Rows to be put in front of one layer's text: what the layer would receive, not yet projected.

    Attributes:
        hidden: ``[B or 1, P, d]``, oldest first; shorter streams have filler behind their rows.
        lengths: ``[B]`` int64, real rows of each stream, or None when all rows are real.
        behind: further memory rows between these and the text.
        positions: ``[B or 1, P]`` int64, where the rows sit on the position axis; None: right in front of the text, as
            the decoder's configuration says (``memory_positions``).
        before: further memory rows in front of these.
    """

    hidden: Tensor
    lengths: Tensor | None = None
    behind: int = 0
    positions: Tensor | None = None
    before: int = 0


Project = Callable[[Rows], Segment]
"""Puts rows through a layer's own norm and projections, and rotates keys to the rows' positions."""
Compute = Callable[[AttentionRequest], AttentionResult]
"""Attention as usual, by the decoder's backend."""
Attend = Callable[[AttentionRequest, Compute], AttentionResult]
"""A layer's attention in the mechanism's own way: a gate, a second softmax, a merge by log-sum-exp."""


@define(frozen=True, eq=False)
class Attended:
    """A layer's memory, and the mechanism's own way to attend to it.

    Refused where the decoder computes attention by itself (technique "cache_view").
    """

    segments: tuple[Segment, ...]
    attend: Attend


Prefix = Callable[[int, Tensor, Project], tuple[Segment, ...] | Attended | None]
"""``prefix(layer, hidden [B, T, d], project)``: what a layer sees in front of its text, oldest first; None or () for
nothing. ``hidden`` is the text after the layer's input norm."""
Edit = Callable[[int, Tensor], Tensor]
"""``edit(layer, hidden [B, T, d])``: what a layer receives in the place of ``hidden``."""


@define(frozen=True, eq=False)
class PassResult:
    """The results of one pass.

    Attributes:
        hidden: ``[B, T, d]``, after the final norm; None where there are logits and no ``hidden_states``.
        inputs, outputs: of each layer that carries memory ``[B, T, d]``.
        projected: of each such layer ``[B, T, Hkv (D + Dv)]``: keys of its inputs, not rotated, and behind them values.
        hidden_states: depth + 1 times ``[B, T, d]``: what the first layer receives, and what each layer gives; the last
            one before the final norm.
        calls: depth times, how the decoder called the layer; for ``CopiedLayer``.
        logits: ``[B, T, V]``.
        text: of a read (``finish``): all text so far ``[B, S]``, whose last T tokens are those of this pass.

    All but ``hidden`` are there if they were asked for; what is of a layer holds the last rows only where so many were.
    """

    hidden: Tensor | None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    projected: tuple[Tensor, ...] = ()
    hidden_states: tuple[Tensor, ...] = field(factory=tuple)
    calls: tuple[LayerCall, ...] = ()
    logits: Tensor | None = None
    text: Text | None = None

    def need_logits(self) -> Tensor:
        """Return ``logits``. Raises InputError where a pass has not left them."""
        if self.logits is None:
            raise InputError("this pass left no logits: ask for them with collect={'logits'}")
        return self.logits

    def need_hidden(self) -> Tensor:
        """Return ``hidden``. Raises InputError where a pass has not left it."""
        if self.hidden is None:
            raise InputError("the final hidden state is wanted of a pass that left none: collect 'hidden'")
        return self.hidden

    def need_text(self) -> Text:
        """Return ``text``. Raises InputError where a pass was not that of a read."""
        if self.text is None:
            raise InputError("the text so far is wanted of a pass that is no read: there is none")
        return self.text


Finish = Callable[[PassResult], Tensor]
"""``finish(result)``: the final hidden state ``[B, T, d]`` that the head gets in the place of ``result.hidden``."""


Tables = tuple[Tensor, Tensor]
"""Cosines and sines, ``[B or 1, P, R]``, for the first R numbers of every head."""


class RowPositions(Protocol):
    """Where memory rows sit on the position axis; see ``mplus.hf.retrofit.positions.MemoryPositions``."""

    @property
    def layout(self) -> str:
        """Return how they sit: "sequential", "compressed" or "constant"."""

    @property
    def offset(self) -> bool:
        """Return whether memory sits at 0, 1, ... and the text behind it."""

    def of_rows(self, place: Tensor, total: int | Tensor, text_offset: int | Tensor = 0) -> Tensor:
        """Return ``[B or 1, P]`` int64 positions of the rows at ``place`` of ``total``, counted from the oldest."""


class KeptProjection(Protocol):
    """The projection behind rows that are kept as keys and values: ``mplus.hf.retrofit.projection.Projection``."""

    @property
    def heads(self) -> int:
        """Hkv."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def value_width(self) -> int:
        """Dv."""

    @property
    def size(self) -> int:
        """Width of ``MemoryRows.projected``."""

    @property
    def positions(self) -> RowPositions:
        """Where rows sit."""

    def rows(self, layer: int, hidden: Tensor) -> Tensor:
        """Return ``[B, n, Hkv (D + Dv)]`` of rows ``[B, n, d]``: keys, not rotated, and behind them values."""

    def tables(self, layer: int, like: Tensor, positions: Tensor) -> Tables | None:
        """Return what ``turned`` rotates rows at ``positions`` with; None where nothing is rotated."""

    def table_key(self, layer: int) -> Hashable:
        """Return what is equal in layers that have the same tables."""

    def picked(self, layer: int, begin: Tensor, found: Location, tables: Tables | None) -> Segment:
        """Return ``begin`` ``[1, w]`` and behind it the ``found`` rows ``[n, w]``, as a segment."""

    def turned(self, layer: int, parts: Sequence[Tensor], tables: Tables | None) -> Segment:
        """Return rows ``[B, n_i, w]``, one part behind the other, as a segment."""


class Decoder(Protocol):
    """A wrapped decoder, seen from the mechanism of its memories.

    Example:
        >>> def write(self, decoder, views, text):
        ...     found = decoder.run(text.ids, adapter="write", collect={"outputs"}, last=1)
        ...     return Update(found.outputs)  # the last output of every layer, as one new row
    """

    @property
    def shape(self) -> DecoderShape:
        """Sizes and abilities."""

    @property
    def kept(self) -> KeptProjection:
        """Return what makes segments of kept keys and values. Raises NotSupported where they cannot be kept."""

    @property
    def weights(self) -> str:
        """A digest of the weights that passes run with."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return the token embeddings ``[B, n, w]`` of ids ``[B, n]``."""

    def run(
        self,
        text: Tensor,
        *,
        prefix: Prefix | None = None,
        prefix_rows: int = 0,
        edit: Edit | None = None,
        adapter: Adapter | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        collect: Collection[Collected] = (),
        last: int | None = None,
        logits_to_keep: int = 0,
        finish: Finish | None = None,
        insertion: Insertion | None = None,
    ) -> PassResult:
        """Run one pass of the decoder over ``text``. Gradients flow where they are enabled; nothing is cached.

        Args:
            text: ids ``[B, T]`` int64, or embeddings ``[B, T, w]``.
            prefix: gives every layer that carries memory what it sees in front of the text.
            prefix_rows: rows that ``prefix`` gives, in the layer that has most.
            edit: changes what these layers receive.
            adapter: that is switched on; None: none.
            positions: ``[T]`` or ``[B, T]`` int64, of the text; None: from 0 on, or behind the prefix where that
                begins at 0.
            mask: ``[B, T]``, 0 at padding.
            collect: what is wanted of the pass.
            last: of what is collected layer by layer, only so many last rows; None: all.
            logits_to_keep: compute the logits of so many last tokens only; 0: of all.
            finish: gives the final hidden state, from what is collected.
            insertion: where in the text the rows of ``prefix`` stand, which then decides on ``positions``; None: in
                front of all of it.

        Raises:
            InputError: text and prefix together need more learned positions than the decoder has, or ``collect`` or
                ``adapter`` is unknown.
            MemoryMismatchError: the decoder was unwrapped in the meantime.
            NotSupported: it has been set to an attention implementation that memory does not go with, or cannot do
                what is asked (``attend`` where it computes attention by itself).
        """

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """Return ``MemoryRows.projected`` ``[B, n, Hkv (D + Dv)]`` of rows ``[B, n, d]`` that the layer would receive.

        Gradients flow where they are enabled. Raises NotSupported where a decoder's keys cannot be had before they are
        rotated.
        """

    def rotated(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys ``[B, h, n, D]``, turned or not, turned further by ``positions`` ``[n]`` int64.

        Gradients flow where they are enabled. Raises NotSupported where it is not known how a layer turns its keys.
        """

    def normed(self, layer: int, hidden: Tensor) -> Tensor:
        """Return rows ``[..., d]`` after the layer's input norm: what its projections and a retriever are given."""

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return retriever keys ``[m, r]`` of rows ``[m, d]``, or None where the retriever keeps none."""

    def ask(
        self, tokenizer: Tokenizer, prompt: str, tokens: int, stop: Sequence[str] = (), choices: Sequence[str] = ()
    ) -> str:
        """Return what greedy decoding, without memory, puts behind ``prompt``.

        Args:
            tokenizer: turns texts into ids and back.
            prompt: any text.
            tokens: generated at most.
            stop: texts before the first of which the answer ends.
            choices: if any, the answer is one of these, chosen token by token among those that are left.

        Raises:
            InputError: the prompt and what is to be generated do not fit into the decoder's positions, or a choice has
                no tokens.
        """


def side_by_side(streams: Sequence[Tensor]) -> Rows:
    """Return rows ``[P_b, d]`` of every stream as one; shorter ones get filler behind."""
    rows = max(part.shape[0] for part in streams)
    if all(part.shape[0] == rows for part in streams):
        return Rows(torch.stack(list(streams)))
    hidden = torch.stack([torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0])) for part in streams])
    return Rows(hidden, torch.tensor([part.shape[0] for part in streams], device=hidden.device))
