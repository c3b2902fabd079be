"""Every registered mechanism keeps to the rules of ``MechanismConformance``, or of ``TextMechanismConformance``."""

from __future__ import annotations

from typing import ClassVar

import torch

from mplus.config import JsonValue
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.text.mechanism import TextMechanism
from mplus.testing import suites
from mplus.testing.mechanisms import MechanismConformance, MechanismMemory, TextMechanismConformance
from mplus.testing.mechanisms.suite import RowSuite
from tests.helpers.modes import NIGHTLY
from tests.mechanisms.gists import GistMechanism

SHORT_TERM = {"memory_tokens_per_chunk": 4, "short_term_tokens": 8}


class ShortTerm(MechanismConformance):
    settings: ClassVar[dict[str, int]] = SHORT_TERM


class AllChunks(RowSuite):
    """A read brings back all that the tests write, however little it has to do with the text."""

    settings: ClassVar[dict[str, int]] = {"min_chunk_tokens": 1}

    @classmethod
    def memory_table(cls) -> dict[str, JsonValue]:
        return {**super().memory_table(), "mechanism": {"name": cls.implementation.name, "retrieved_chunks": None}}


class KeysAndValues(AllChunks, MechanismConformance):
    pass


SPECIAL = {"mplus": ShortTerm, "memoryllm": ShortTerm, "kv": KeysAndValues}
globals().update(suites(MechanismConformance, MECHANISMS, SPECIAL, of=MemoryMechanism))
globals().update(suites(TextMechanismConformance, MECHANISMS, of=TextMechanism))


class TestGists(MechanismConformance):
    implementation = GistMechanism


def in_dtype(dtype: torch.dtype) -> dict[str, type]:
    """Return the tests of memories, of every mechanism, in numbers that people use."""
    title = str(dtype).removeprefix("torch.").capitalize()
    plain = type(f"Memory{title}", (MechanismMemory,), {"dtype": dtype})
    short = type(f"Short{title}", (MechanismMemory,), {"dtype": dtype, "settings": SHORT_TERM})
    chunks = type(f"AllChunks{title}", (AllChunks, MechanismMemory), {"dtype": dtype})
    special = {"mplus": short, "memoryllm": short, "kv": chunks}
    found = suites(plain, MECHANISMS, special, of=MemoryMechanism)
    return {**found, f"TestGists{title}": type(f"TestGists{title}", (plain,), {"implementation": GistMechanism})}


globals().update(in_dtype(torch.bfloat16))
if NIGHTLY:  # what goes wrong here but neither in float64, above, nor in bfloat16, is rare
    globals().update(in_dtype(torch.float32))
