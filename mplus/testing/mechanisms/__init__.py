"""What every mechanism must do: ``MechanismConformance``, to derive from in a test module."""

from mplus.testing.mechanisms.conformance import MechanismConformance

__all__ = ["MechanismConformance"]
