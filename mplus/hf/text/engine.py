"""The engine behind a decoder's memories of text (see ``mplus.memory.engine.Engine``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from attrs import evolve
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mplus.config import Component, JsonValue, MPlusConfig
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from mplus.hf.model.offloading import input_device
from mplus.hf.reading.open_readings import OpenReadings
from mplus.hf.text.ask import Asking
from mplus.mechanisms.text.asking import Ask
from mplus.mechanisms.text.mechanism import ROWS, TextMechanism
from mplus.mechanisms.text.state import EntryState
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.passages import Passage
from mplus.memory.writing.update import NewEntries, Update
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.tokenizer import Tokenizer


class TextEngine:
    """One decoder, seen from its memories of text. Nothing that they hold depends on the decoder.

    Attributes:
        model: the wrapped decoder.
        config: its memory configuration.
        mechanism: the rules of its memories.
        tokenizer: of memories that are given none.
        sees_padding: whether the decoder sees padding that a mask hides, so that prompts of a batch must be equally
            long with what is recalled.
        readings: the blocks of ``model.reading`` that are open.
    """

    writes_text: ClassVar[bool] = True

    def __init__(
        self, model: PreTrainedModel, config: MPlusConfig, mechanism: TextMechanism, sees_padding: bool = False
    ) -> None:
        self.model = model
        self.config = config
        self.mechanism = mechanism
        self.sees_padding = sees_padding
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.readings = OpenReadings()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "readings"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, readings=OpenReadings())

    @property
    def layout(self) -> StoreLayout:
        return ROWS

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a memory of text has by name; it holds no number of this dtype."""
        return ROWS.dtype

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def vocab_size(self) -> int:
        weight = cast("Tensor", self.model.get_input_embeddings().weight)
        return int(weight.shape[0])

    def new_state(self, layout: StoreLayout) -> StreamState:
        """Return a new stream; see ``Engine.new_state``."""
        return evolve(self.mechanism.new_state(layout), weights=self.weights())

    def write_text(self, views: Sequence[StreamView], passages: Sequence[Passage]) -> NewEntries:
        """Let the mechanism make entries; see ``Engine.write_text``.

        Raises MemoryMismatchError where the decoder was unwrapped.
        """
        self.check_wrapped()
        made = []
        for view, passage in zip(views, passages, strict=True):
            known = cast("EntryState", view.state).of_source(passage.source)
            asking = self.asking(passage.tokenizer)
            made.append(tuple(self.mechanism.write(known, passage.text, passage.before, asking)))
        return NewEntries(tuple(made))

    def search(self, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None) -> list[FoundText]:
        """Let the mechanism say what ``text`` would bring back; see ``Engine.search``."""
        known = cast("PreTrainedTokenizerBase", tokenizer)
        return self.mechanism.search(self.asking(known), view, text, k, known)

    def asking(self, tokenizer: PreTrainedTokenizerBase) -> Ask:
        """Return an interface to ask the decoder for texts, through ``tokenizer``."""
        return Asking(self.model, tokenizer)

    def check_wrapped(self) -> None:
        """Raise MemoryMismatchError when the decoder was unwrapped."""
        if self.model.__dict__.get("mplus_engine") is not self:
            raise MemoryMismatchError(
                f"this memory's {type(self.model).__name__} is no longer wrapped: save memories before mplus.unwrap, "
                "and load them for the model once it is wrapped again"
            )

    def check_options(self, **given: Component | torch.device | JsonValue) -> None:
        """Refuse all that is about rows; see ``Engine.check_options``."""
        for name, value in given.items():
            if value is not None and value is not False:
                raise ConfigError(
                    f"{name} means nothing to the mechanism {self.mechanism.name!r}, whose memories are made of text "
                    f"and not of rows, got {value!r}: leave it out"
                )

    def fingerprint(self, saved: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
        """Return the facts that a memory of text is bound to: the mechanism by name, and nothing of the decoder."""
        return {
            "layers": ROWS.layers,
            "hidden_size": ROWS.hidden_size,
            "key_size": ROWS.key_size,
            "mechanism": self.mechanism.name,
        }

    def weights(self, adapters: Sequence[str] | None = None) -> WeightsState:
        """Return nothing: text depends on no weights."""
        return WeightsState()

    def write(
        self,
        views: Sequence[StreamView],
        ids: Tensor,
        tokenizer: Tokenizer | None = None,
        sources: Sequence[int | None] = (),
        short: bool = False,
    ) -> Update:
        """Raise NotSupported: there are no rows."""
        raise self._no_rows()

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return None: there are no rows."""
        return None

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """Raise NotSupported: there are no rows."""
        raise self._no_rows()

    def refresh(self, rows: MemoryRows, layer: int) -> MemoryRows:
        """Return the rows, which hold nothing that is computed."""
        return rows

    def _no_rows(self) -> NotSupported:
        return NotSupported(f"memories of the mechanism {self.mechanism.name!r} are made of text and have no such rows")


def refuse_text(model: nn.Module, what: str) -> None:
    """Raise NotSupported where memories of a wrapped decoder are made of text, and ``what`` knows rows only."""
    engine = getattr(model, "mplus_engine", None)
    if isinstance(engine, TextEngine):
        raise NotSupported(
            f"{what} is of memories that are made of rows, and those of the mechanism {engine.mechanism.name!r} are "
            "made of text: use memory.write and generate(..., memory=memory)"
        )
