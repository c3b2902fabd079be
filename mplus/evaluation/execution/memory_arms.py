"""MemoryArms: the arms that there are for a decoder's mechanism, and how each reads memory."""

from __future__ import annotations

import attrs
from attrs import define

from mplus.errors import NotSupported
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.oracle import retrieves
from mplus.evaluation.reports.report import ARMS
from mplus.evaluation.retriever_swap import Way, find_way
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.kv.state import KvState
from mplus.mechanisms.short_term.batched_streams import BATCHED

WITHOUT_MEMORY = ("none", "window", "full-context", "snapkv", "bm25", "ceiling")
"""Arms that run the decoder alone."""
TEXT = "-text"
"""Ends the name of the arm that reads what a mechanism chooses as text."""


@define(frozen=True, eq=False)
class MemoryArms:
    """The arms of one wrapped decoder.

    Attributes:
        model: the decoder.
    """

    model: MemoryModel

    @property
    def own(self) -> str | None:
        """Return the name of a mechanism that is an arm of its own; None for M+ and MemoryLLM."""
        name = self.model.mplus_config.mechanism.name
        return None if name in BATCHED else str(name)

    @property
    def reading(self) -> tuple[str, ...]:
        """Return the names of the arms that read memory by such a mechanism."""
        name, mechanism = str(self.own), self.model.mplus_engine.mechanism
        if not isinstance(mechanism, MemoryMechanism) or not retrieves(mechanism):
            return (name,)
        text = (name + TEXT,) if mechanism.State is KvState else ()  # others keep no tokens of what they choose
        return (name, f"{name}-oracle", *text)

    @property
    def every(self) -> tuple[str, ...]:
        """Return the names of all arms there are."""
        return (*ARMS, "ceiling") if self.own is None else (*ARMS, "ceiling", *self.reading)

    def settle(self, options: ArmOptions) -> ArmOptions:
        """Return ``options`` with a window and a number of passages for BM25, and the arms that can be measured.

        Raises:
            NotSupported: an arm would measure the mechanism under another one's name.
        """
        config, passages = self.model.mplus_config, options.bm25_passages or 4
        if self.own is None:
            window = options.window_tokens or 1 + config.retrieved_tokens + config.short_term_tokens
            return attrs.evolve(options, window_tokens=window, bm25_passages=passages)
        if self.own in ARMS:
            raise NotSupported(
                f"the mechanism {self.own!r} has the name of an arm that there is for every decoder, so it cannot be "
                "measured beside it: register it under another name"
            )
        usable = (*WITHOUT_MEMORY, *self.reading)
        wanted = usable if options.arms is None else options.arms
        reading = [name for name in wanted if name in ARMS and name not in WITHOUT_MEMORY]
        if reading:
            raise NotSupported(
                f"the arms {', '.join(reading)} measure the mechanisms {' and '.join(map(repr, BATCHED))}, and the "
                f"decoder's mechanism is {self.own!r}: none of them would measure it under its own name. Ask for "
                f"some of the arms {', '.join(usable)}"
            )
        retrieved = config.retrieved_tokens if retrieves(self.model.mplus_engine.mechanism) else 0
        window = options.window_tokens or max(retrieved + (config.short_term_tokens or 0), config.chunk_tokens)
        return attrs.evolve(options, arms=wanted, window_tokens=window, bm25_passages=passages)

    def way(self, arm: str, options: ArmOptions) -> Way | str:
        """Return the way in which an arm reads memory, or the reason why it cannot."""
        if self.own is not None:
            return Way(oracle=arm != self.own)
        return find_way(self.model, arm, options)
