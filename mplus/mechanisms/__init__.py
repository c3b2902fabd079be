"""Mechanisms of memory by name, and the names one needs to write another.

A mechanism derives from ``MemoryMechanism``, and the state of its streams from ``StreamState``; or, where its memories
are made of text, from ``TextMechanism``. ``MechanismConformance`` and ``TextMechanismConformance`` of
``mplus.testing.mechanisms`` try one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.backends.base import Segment
    from mplus.config import MPlusConfig, flag, must_be, number, one_of, options_of, whole
    from mplus.mechanisms.additions import MemoryAdditions
    from mplus.mechanisms.base import Kept, MemoryMechanism
    from mplus.mechanisms.copied_layers import CopiedLayer, Copies
    from mplus.mechanisms.decoder import (
        Adapter,
        Attended,
        Collected,
        Decoder,
        DecoderShape,
        Edit,
        PassResult,
        Prefix,
        Project,
        Rows,
        Text,
        side_by_side,
    )
    from mplus.mechanisms.opened import Insertion, Opened, Retrieved, TextCache, TokenTensors
    from mplus.mechanisms.root import Absorbed, Columns, Mechanism
    from mplus.mechanisms.streams import LayerRead, Read, TrainingStreams
    from mplus.mechanisms.text.asking import Ask
    from mplus.mechanisms.text.mechanism import Recalled, TextMechanism, TokenBudget
    from mplus.mechanisms.text.state import Entry, EntryState
    from mplus.mechanisms.text.vectors import TextVectors, vectors_name
    from mplus.memory.state import StreamState, StreamView
    from mplus.memory.writing.update import Update, WriteContext
    from mplus.retrievers.base import Retriever, RetrieverShape
    from mplus.retrievers.build import build_retriever
    from mplus.rows import MemoryRows
    from mplus.stores.base import MemoryStore, StoreLayout, StoreView

__all__ = [
    "MECHANISMS",
    "Absorbed",
    "Adapter",
    "Ask",
    "Attended",
    "Collected",
    "Columns",
    "CopiedLayer",
    "Copies",
    "Decoder",
    "DecoderShape",
    "Edit",
    "Entry",
    "EntryState",
    "Insertion",
    "Kept",
    "LayerRead",
    "MPlusConfig",
    "Mechanism",
    "MemoryAdditions",
    "MemoryMechanism",
    "MemoryRows",
    "MemoryStore",
    "Opened",
    "PassResult",
    "Prefix",
    "Project",
    "Read",
    "Recalled",
    "Retrieved",
    "Retriever",
    "RetrieverShape",
    "Rows",
    "Segment",
    "StoreLayout",
    "StoreView",
    "StreamState",
    "StreamView",
    "Text",
    "TextCache",
    "TextMechanism",
    "TextVectors",
    "TokenBudget",
    "TokenTensors",
    "TrainingStreams",
    "Update",
    "WriteContext",
    "build_retriever",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "side_by_side",
    "vectors_name",
    "whole",
]

MECHANISMS: Registry[Mechanism] = Registry(
    "mechanism",
    group="mplus.mechanisms",
    base="mplus.mechanisms.root:Mechanism",
    builtin={
        "mplus": "mplus.mechanisms.mplus:MPlusMechanism",
        "memoryllm": "mplus.mechanisms.memoryllm:MemoryLLMMechanism",
        "kv": "mplus.mechanisms.kv.mechanism:KvMechanism",
        "notes": "mplus.mechanisms.notes:NotesMechanism",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.mechanisms",
    {
        "mplus.backends.base": ("Segment",),
        "mplus.config": ("MPlusConfig", "flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.mechanisms.additions": ("MemoryAdditions",),
        "mplus.mechanisms.base": ("Kept", "MemoryMechanism"),
        "mplus.mechanisms.copied_layers": ("CopiedLayer", "Copies"),
        "mplus.mechanisms.decoder": (
            "Adapter",
            "Attended",
            "Collected",
            "Decoder",
            "DecoderShape",
            "Edit",
            "PassResult",
            "Prefix",
            "Project",
            "Rows",
            "Text",
            "side_by_side",
        ),
        "mplus.mechanisms.opened": ("Insertion", "Opened", "Retrieved", "TextCache", "TokenTensors"),
        "mplus.mechanisms.root": ("Absorbed", "Columns", "Mechanism"),
        "mplus.mechanisms.streams": ("LayerRead", "Read", "TrainingStreams"),
        "mplus.mechanisms.text.asking": ("Ask",),
        "mplus.mechanisms.text.mechanism": ("Recalled", "TextMechanism", "TokenBudget"),
        "mplus.mechanisms.text.state": ("Entry", "EntryState"),
        "mplus.mechanisms.text.vectors": ("TextVectors", "vectors_name"),
        "mplus.memory.state": ("StreamState", "StreamView"),
        "mplus.memory.writing.update": ("Update", "WriteContext"),
        "mplus.retrievers.base": ("Retriever", "RetrieverShape"),
        "mplus.retrievers.build": ("build_retriever",),
        "mplus.rows": ("MemoryRows",),
        "mplus.stores.base": ("MemoryStore", "StoreLayout", "StoreView"),
    },
)
