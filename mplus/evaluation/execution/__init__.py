"""Manners of telling and asking: memories and generated answers, or many streams of facts at once."""

from mplus.evaluation.execution.base import Execution
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.execution.streams import ParallelStreams

__all__ = ["Execution", "GeneratedAnswers", "ParallelStreams"]
