"""Every registered mechanism keeps to the rules of ``MechanismConformance``."""

from __future__ import annotations

from typing import ClassVar

from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.text.mechanism import TextMechanism
from mplus.testing.mechanisms import MechanismConformance, TextMechanismConformance
from mplus.testing.registered import suites
from tests.mechanisms.gists import GistMechanism


class ShortTerm(MechanismConformance):
    settings: ClassVar[dict[str, int]] = {"memory_tokens_per_chunk": 4, "short_term_tokens": 8}


SPECIAL = {"mplus": ShortTerm, "memoryllm": ShortTerm}
globals().update(suites(MechanismConformance, MECHANISMS, SPECIAL, of=MemoryMechanism))
globals().update(suites(TextMechanismConformance, MECHANISMS, of=TextMechanism))


class TestGists(MechanismConformance):
    implementation = GistMechanism
