"""MemLong for mplus: keys and values of one layer, found by the text they came from, and read in several layers."""

from pathlib import Path

from mplus_memlong.encoders import HiddenStates, SentenceEncoder, TextEncoder
from mplus_memlong.mechanism import MemLongMechanism
from mplus_memlong.options import MemLongOptions
from mplus_memlong.state import MemLongState

__all__ = [
    "TINY",
    "HiddenStates",
    "MemLongMechanism",
    "MemLongOptions",
    "MemLongState",
    "SentenceEncoder",
    "TextEncoder",
]

TINY = Path(__file__).with_name("memlong-tiny.toml")
"""The recipe "memlong-tiny"."""
