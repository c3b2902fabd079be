"""Choice: the chunks that a read brings back, seen from outside; with them alone, the read need not go on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from attrs import define

from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.override import WrappedMechanism, reading_as
from mplus.hf.reading.reading import RetrievedSource
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Decoder, Text
from mplus.mechanisms.kv.state import KvState
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.memory.state import StreamView


@define(frozen=True)
class Choice:
    """The chunks brought back for one question, in the order in which they are read.

    Attributes:
        sources: names of the sources they were written from, each once.
        ids: of their tokens; empty where the mechanism keeps none.
        score: the best of a chunk; None: nothing came back, or nothing was scored.
    """

    sources: tuple[str | None, ...] = ()
    ids: tuple[int, ...] = ()
    score: float | None = None

    def holds(self, sources: Collection[str]) -> bool:
        """Return whether something of each of ``sources`` was brought back."""
        return set(sources) <= set(self.sources)

    @classmethod
    def told(cls, layers: Sequence[Sequence[RetrievedSource]]) -> Choice:
        """Return the choice behind what a call reported as the sources of one row; its tokens are not known."""
        found = [one for layer in layers for one in layer]
        scores = [one.score for one in found if one.score is not None]
        return cls(tuple(dict.fromkeys(one.source for one in found)), score=max(scores, default=None))

    @classmethod
    def of(cls, view: StreamView, found: Retrieved | None) -> Choice:
        """Return the choice that rows of one layer are."""
        if found is None:
            return cls()
        names = {number: source.name for number, source in view.state.sources.items()}
        numbers = dict.fromkeys(found.rows.source.tolist())
        ids: list[int] = []
        if isinstance(view.state, KvState):
            # A row is a token, and the table of chunks has the tokens in the order of the rows.
            places = torch.searchsorted(view.store.ids(0), found.ids).cpu()
            ids = view.state.token_ids[places].tolist()
        best = float(found.scores.max()) if len(found.scores) else None
        return cls(tuple(names[number] for number in numbers), tuple(ids), best)


class ChoiceMade(Exception):
    """Ends a read once its chunks are chosen."""


class ChoosingMechanism(WrappedMechanism):
    """Notes in ``seen`` what ``open`` chooses for every batch row; the last read counts.

    Args:
        inner: the mechanism it stands in for, which chooses in ``open``.
        seen: a list for the choices.
        only: end the read then, by raising ``ChoiceMade``.

    Example:
        >>> from functools import partial
        >>> from mplus.hf.reading.override import reading_as
        >>> seen = []
        >>> with torch.no_grad(), reading_as(model, around=partial(ChoosingMechanism, seen=seen)):
        ...     logits = model(input_ids=prompt, memory=memory).logits
        >>> seen[0].holds({"diary"})
        True
    """

    def __init__(self, inner: MemoryMechanism, *, seen: list[Choice], only: bool = False) -> None:
        super().__init__(inner)
        self.seen, self.only = seen, only

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Open a read, as ``MemoryMechanism.open``. Raises ChoiceMade."""
        opened = self.inner.open(decoder, views, text)
        # A mechanism may read in some layers only, and then it is the first of these that says what was chosen.
        of_layers = (self.inner.retrieved(opened, layer) for layer in range(decoder.shape.layers))
        nothing: list[Retrieved | None] = [None] * len(opened.views)
        chosen = next((found for found in of_layers if any(one is not None for one in found)), nothing)
        # The views of what was opened: an oracle's are parts of those it was given.
        # In place: whoever gave the list looks at it behind the read.
        self.seen[:] = [Choice.of(view, rows) for view, rows in zip(opened.views, chosen, strict=True)]
        if self.only:
            raise ChoiceMade
        return opened


def choosing(model: MemoryModel, seen: list[Choice], only: bool = False) -> AbstractContextManager[None]:
    """Let reads of ``model`` in the ``with`` block note in ``seen`` what they choose; see ``ChoosingMechanism``.

    Nothing is noted of a mechanism that does not choose once for a whole text.
    """
    mechanism = model.mplus_engine.mechanism
    if not isinstance(mechanism, MemoryMechanism) or not mechanism.retrieves_in_open:
        return nullcontext()
    return reading_as(model, around=partial(ChoosingMechanism, seen=seen, only=only))
