"""LongMem for mplus: a side network beside a frozen decoder, which reads a bank of that one's keys and values."""

from mplus_longmem.mechanism import LongMemMechanism
from mplus_longmem.settings import LongMemOptions

__all__ = ["LongMemMechanism", "LongMemOptions"]
