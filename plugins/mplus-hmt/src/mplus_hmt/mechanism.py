"""HMTMechanism: one vector per segment, recalled by cross-attention, and read as a soft prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.config import JsonValue, MPlusConfig, flag, is_number, must_be, one_of, whole
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.mechanisms.base import Kept, MemoryMechanism
from mplus.mechanisms.decoder import Adapter, Decoder, DecoderShape, Project, Rows, Text
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.root import Absorbed, Columns
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus_hmt.additions import HMTAdditions
from mplus_hmt.passes import front_inputs, remembered, summarised
from mplus_hmt.recall import Recalled, recall, side_by_side_lists
from mplus_hmt.settle import settled
from mplus_hmt.state import HMTState, state_of

SENSORY_TOKENS = 32
_share = must_be("a number above 0 and at most 1", lambda given: is_number(given, 0, 1) and given > 0)


@define(frozen=True, eq=False)
class Front:
    """What a read puts in front of the text.

    Attributes:
        inputs: of every layer ``[B, 1 + k, d]``.
        lengths: ``[B]`` int64, how many of these each row has.
        recalled: where the first of them came from.
    """

    inputs: tuple[Tensor, ...]
    lengths: Tensor
    recalled: Recalled


class HMTMechanism(MemoryMechanism):
    """Keeps one vector for each segment of ``chunk_tokens`` tokens, and reads ``[recalled vector | sensory tokens]``.

    Every text is read behind them, the learned first prompt P0 in the place of a recalled vector where there is no
    memory; so an empty memory is not the bare decoder. The recall looks at the first half of a segment that is read,
    whose tokens are scored behind it (as in the paper): where that must not be, say ``query_tokens``.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "hmt", "sensory_tokens": 16}, chunk_tokens=256)
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of HMT; ``variant="published"`` sets the last four to what the released code does when it generates.

        Attributes:
            sensory_tokens: k, last tokens of the segment before that a segment is read behind.
            summary: p / L, the share of a segment that its topic summary is made of.
            recall_width: h; None: that of the token embeddings. Published: 4096.
            recall: False: there is no recall, and the newest vector is the prompt (RMT with sensory tokens).
            recall_dtype: "bfloat16" computes recall in that (published); None: in the decoder's dtype.
            flat_recall: divide scores by h in the place of sqrt(h) where h and w are at least 4096. The released code
                does so in training, and not in generation.
            halved_summary: p is ``L // 2``. The released code says so in generation, and ``round(summary * L)``, half
                to even, in training; for odd L these may differ.
            padding_counts: padding of a row is among the tokens that are summarised, so that a row is not as alone.
        """

        sensory_tokens: int = field(default=SENSORY_TOKENS, validator=whole(0))
        summary: float = field(default=0.5, validator=_share)
        recall_width: int | None = field(default=None, validator=whole(1, optional=True))
        recall: bool = field(default=True, validator=flag)
        recall_dtype: Literal["bfloat16"] | None = field(default=None, validator=one_of(None, "bfloat16"))
        flat_recall: bool = field(default=False, validator=flag)
        halved_summary: bool = field(default=False, validator=flag)
        padding_counts: bool = field(default=False, validator=flag)

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return what differs in the variant "published": the released code's defaults and defects."""
            if variant != "published":
                return {}
            return {
                "recall_width": 4096,
                "recall_dtype": "bfloat16",
                "halved_summary": True,
                "padding_counts": True,
            }

    name = "hmt"
    State: ClassVar[type[StreamState]] = HMTState
    empty_is_base: ClassVar[bool] = False
    keeps: ClassVar[frozenset[Kept]] = frozenset({"hidden"})
    keeps_states: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 990}

    additions: HMTAdditions
    options: Options

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        return settled(config, room, cast("int", config.mechanism.options.get("sensory_tokens", SENSORY_TOKENS)))

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: Any) -> HMTAdditions:
        """Make T, P0, Wq and Wk.

        Raises:
            ConfigError: a segment with what stands around it takes more learned positions than there are.
            NotSupported: some layers carry no memory, so that they would not see what is read.
        """
        if shape.hybrid:
            raise NotSupported(
                "HMT stands in front of the text in every layer, and some layers of this decoder carry no memory: use "
                "another decoder"
            )
        taken = config.chunk_tokens + options.sensory_tokens + 2
        if shape.positions == "learned" and shape.max_positions is not None and taken > shape.max_positions:
            raise ConfigError(
                f"chunk_tokens + sensory_tokens + 2 must be at most the {shape.max_positions} learned positions of the "
                f"decoder, got {taken}: use shorter segments"
            )
        width = shape.embedding_width
        recall_width = (options.recall_width or width) if options.recall else None
        return HMTAdditions(width, recall_width, shape.embedding_std)

    def layout(self, shape: DecoderShape, kept: Kept, projected_size: int) -> StoreLayout:
        return evolve(super().layout(shape, "hidden", 0), layers=1, hidden_size=shape.embedding_width)

    def capacity(self, rows: int) -> int:
        return rows * self.config.chunk_tokens

    def reserve(self, layout: StoreLayout) -> int:
        return 4 * self.options.sensory_tokens

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> HMTState:
        return HMTState.empty()

    # ------------------------------------------------------------------ writing

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run the passes of topic summary and segment; the streams have equally many sensory tokens."""
        embedded = decoder.embed(text.need_ids())
        prompt = self.recalled(decoder, views, embedded, adapter="write").prompt
        sensory = torch.stack(self._sensory(decoder, views))
        found = remembered(decoder, prompt, sensory.to(prompt), embedded, "write")
        return Update((found[:, -1:],))

    def absorb(self, state: Any, update: Update, source: int, context: WriteContext) -> Absorbed:
        if context.ids is None:
            raise InputError("absorb needs the ids of the segment that the vector was made of, got none")
        made, device = update.hidden[0], context.store.layout.device
        birth = torch.tensor([state.clock], device=device)
        rows = MemoryRows(made.to(device, context.store.layout.dtype), birth, torch.full_like(birth, source))
        context.store.append(0, rows)
        after = state.with_segment(context.ids, source, self.options.sensory_tokens)
        return Absorbed(after, 0, max(context.evict()))

    # ------------------------------------------------------------------ reading

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Recall by the first tokens of the text, and run the pass over what stands in front of it."""
        embedded = decoder.embed(text.need_ids()) if text.embedded is None else text.embedded
        seen = text.query if text.limited and text.query is not None else text.mask
        recalled = self.recalled(decoder, views, embedded, seen, adapter="read")
        sensory = self._sensory(decoder, views)
        inputs = front_inputs(decoder, recalled.prompt, sensory, "read")
        lengths = torch.tensor([1 + len(one) for one in sensory])
        offset = lengths if decoder.shape.positions == "learned" else None
        return Opened(views, own=Front(inputs, lengths, recalled), text_offset=offset)

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...]:
        front: Front = opened.own
        equal = bool((front.lengths == front.lengths[0]).all())
        return (project(Rows(front.inputs[layer].to(hidden), None if equal else front.lengths.to(hidden.device))),)

    def prefix_rows(self, view: StreamView) -> int:
        return 1 + len(state_of(view).sensory)

    # ------------------------------------------------------------------ both

    def recalled(
        self,
        decoder: Decoder,
        views: Sequence[StreamView],
        text: Tensor,
        seen: Tensor | None = None,
        *,
        adapter: Adapter,
    ) -> Recalled:
        """Return the prompt that each text is read behind.

        Args:
            decoder: runs the pass of the topic summary.
            views: one per text.
            text: ``[B, n, w]``, embeddings.
            seen: ``[B, n]`` bool, False at tokens that are not summarised; None: all may be.
            adapter: of the pass.
        """
        lists = [view.store.gather(0, view.store.ids(0)).need_hidden().to(text) for view in views]
        first = self.additions.first_prompts(text)
        topic = self.additions.topic
        if topic is None or any(state_of(view).newest_only for view in views):
            newest = [one[-1:] if len(one) else first[row] for row, one in enumerate(lists)]
            return Recalled(torch.stack(newest))
        if not any(map(len, lists)):
            return Recalled(first)
        options = self.options
        summary = summarised(
            decoder, topic, text, seen, self.summary_tokens, adapter, padding_counts=options.padding_counts
        )
        dtype = None if options.recall_dtype is None else torch.bfloat16
        return recall(self.additions, summary, *side_by_side_lists(lists), dtype=dtype, flat=options.flat_recall)

    @property
    def summary_tokens(self) -> int:
        """Return p, the tokens that a topic summary is made of."""
        size = self.config.chunk_tokens
        return size // 2 if self.options.halved_summary else round(self.options.summary * size)

    def _sensory(self, decoder: Decoder, views: Sequence[StreamView]) -> list[Tensor]:
        """Return the embeddings ``[k_i, w]`` of the sensory tokens of each stream."""
        device = decoder.shape.device
        return [decoder.embed(state_of(view).sensory.to(device, torch.int64)[None])[0] for view in views]
