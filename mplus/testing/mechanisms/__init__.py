"""What every mechanism must do: ``MechanismConformance`` and ``TextMechanismConformance``, to derive from in a test."""

from mplus.testing.mechanisms.conformance import MechanismConformance, MechanismMemory
from mplus.testing.mechanisms.text import TextMechanismConformance

__all__ = ["MechanismConformance", "MechanismMemory", "TextMechanismConformance"]
