"""Memory: the state of one conversation, user or book; it knows nothing of decoders or files of weights."""

from mplus.memory.memory import Memory
from mplus.memory.report import ForgetReport, MergeReport, SourceInfo, WriteReport
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.write import write_together

__all__ = [
    "ForgetReport",
    "FoundText",
    "Memory",
    "MergeReport",
    "SourceInfo",
    "StreamState",
    "StreamView",
    "WriteReport",
    "write_together",
]
