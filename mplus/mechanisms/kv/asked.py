"""What is asked of a memory, and what it brings back."""

from __future__ import annotations

from attrs import define
from torch import Tensor

from mplus.mechanisms.kv.state import KvState, state_of
from mplus.memory.state import StreamView
from mplus.retrievers.chunks.base import Chunks, Query
from mplus.tokenizer import Tokenizer


@define(frozen=True, eq=False)
class Asked:
    """The question that one row of a batch asks of its stream.

    Attributes:
        view: the stream.
        begin: ``[L, b, w]``, rows of what its chunks were written behind.
        question: ``[q]`` int64, the ids to ask with; at least one.
        prompt: ``[n]`` int64, ids that the decoder reads anyway: a chunk whose ids stand there is not brought back.
        room: tokens that may come back.
    """

    view: StreamView
    begin: Tensor
    question: Tensor
    prompt: Tensor
    room: int

    @property
    def state(self) -> KvState:
        """The table of the stream's chunks."""
        return state_of(self.view)

    def chunks(self, tokenizer: Tokenizer | None) -> Chunks:
        """Return the chunks of the stream, as a retriever sees them."""
        state = self.state
        return Chunks(state.chunk_length, state.token_ids, state.chunk_key, state.calibration, tokenizer)


@define(frozen=True, eq=False)
class Question(Query):
    """A question, and what late interaction compares of it.

    Attributes:
        values: ``[k, q, Hkv, Dv]``, of its tokens in the layers of ``KvState.late_interaction``; None: nothing.
    """

    values: Tensor | None = None


@define(frozen=True, eq=False)
class ChosenChunks:
    """The chunks that one question brings back from one stream.

    Attributes:
        chunks: ``[k]`` int64, places in the table of chunks, the best first.
        scores: ``[k]`` float64, of each.
    """

    chunks: Tensor
    scores: Tensor

    def at(self, places: Tensor) -> ChosenChunks:
        """Return those at ``places`` ``[m]``, in that order."""
        return ChosenChunks(self.chunks[places], self.scores[places])
