"""How well signs decide whether to answer, calibrated on some streams and judged on others."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve

from mplus.evaluation.metrics.calibration import compare
from mplus.evaluation.recall.facts import Telling
from mplus.evaluation.recall.signals import FEATURES, signs


def abstention(model: Any, telling: Telling, *, long_term_tokens: int | None = None) -> dict[str, Any]:
    """Every sign by itself and all together, and the decoder's own word "unknown" without any calibration.

    Returns:
        As ``mplus.evaluation.metrics.calibration.compare``, with ``said_unknown``: how often the decoder says so by
        itself.
    """
    calibration = signs(model, evolve(telling, seed=telling.seed + 1), long_term_tokens=long_term_tokens, seed=1)
    judged = signs(model, telling, long_term_tokens=long_term_tokens, seed=2)
    found = compare(
        torch.cat([calibration.features, judged.features]),
        FEATURES,
        torch.cat([calibration.told, judged.told]),
        torch.arange(len(calibration.told) + len(judged.told)) < len(calibration.told),
    )
    return {
        **found,
        "said_unknown": {
            "of_told": float(judged.said_unknown[judged.told].float().mean()),
            "of_untold": float(judged.said_unknown[~judged.told].float().mean()),
        },
        "ages": list(telling.ages),
    }
