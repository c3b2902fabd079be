"""MemLong for mplus: keys and values of one layer, found by the text they came from, and read in several layers."""

from mplus_memlong.encoders import HiddenStates, SentenceEncoder, TextEncoder
from mplus_memlong.mechanism import MemLongMechanism
from mplus_memlong.options import MemLongOptions
from mplus_memlong.state import MemLongState

__all__ = [
    "HiddenStates",
    "MemLongMechanism",
    "MemLongOptions",
    "MemLongState",
    "SentenceEncoder",
    "TextEncoder",
]
