"""Abstention: signs of whether the answer is in memory, calibrated on some questions and judged on others."""

from __future__ import annotations

from typing import Any

import torch

from mplus.evaluation.execution.base import Execution, Signals
from mplus.evaluation.metrics.calibration import compare


@torch.no_grad()
def abstention(execution: Execution[Any, Any], *, name: str | None = None) -> dict[str, Any]:
    """Compare signs of whether an answer is in memory, on questions that were told and on some that were not.

    Of data sets, episodes with even numbers calibrate and the others are judged; of facts, other streams calibrate.

    Args:
        execution: of a decoder and a task; of a data set, with ``untold`` of at least 1.
        name: what the report calls the model.

    Returns:
        As ``mplus.evaluation.metrics.calibration.compare``: every sign by itself and all together. With
        ``said_unknown``, how often the decoder says so by itself, where it has a word for that.

    Raises:
        InputError: the task asks nothing that was not told, or makes one episode only.
        NotSupported: a mechanism whose reads cannot be traced.
        ConfigError: a setting that the execution would not follow.
    """
    found = list(execution.signals())
    features, told, calibrates = (
        torch.cat([getattr(part, column) for part in found]) for column in ("features", "told", "calibrates")
    )
    present = [column for column in range(features.shape[1]) if not bool(features[:, column].isnan().all())]
    report = compare(features[:, present], [execution.features[column] for column in present], told, calibrates)
    if all(part.said_unknown is not None for part in found):
        report["said_unknown"] = _said_unknown(found)
    return execution.plain("abstention", report, name)


def _said_unknown(found: list[Signals]) -> dict[str, float]:
    """Return how often the decoder says so of what was told, and of what was not."""
    judged = [(part.said_unknown[~part.calibrates], part.told[~part.calibrates]) for part in found]  # type: ignore[index]
    said, told = (torch.cat(columns) for columns in zip(*judged, strict=True))
    return {"of_told": float(said[told].float().mean()), "of_untold": float(said[~told].float().mean())}
