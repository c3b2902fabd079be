"""What ``wrap`` chose for a decoder and found in it, for people."""

from __future__ import annotations

from typing import Any

from mplus.config import MPlusConfig
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.sizes import SIZES, chosen


def summary(model: Any) -> str:
    """See ``MemoryModel.mplus_summary``."""
    engine: DecoderEngine = model.mplus_engine
    installed, positions = model.mplus_installed, engine.retrofit.positions
    kept = f"rows kept as: {engine.memory_rows}"
    if isinstance(engine.projection, str):
        kept += f" ({engine.projection})"
    return "\n".join(
        [
            f"technique: {engine.retrofit.technique.replace('_', ' ')}",
            f"positions of memory: {positions.layout}{', offset' if positions.offset else ''}",
            kept,
            *size_lines(installed.asked, engine.config),
            *map(str, installed.checks),
            *(f"rejected: {reason}" for reason in installed.rejected),
        ]
    )


def size_lines(asked: MPlusConfig, config: MPlusConfig) -> list[str]:
    """One line per size of ``config``, with a remark on those that ``asked`` had left open."""
    left_open = chosen(asked, config)
    return [f"{name}: {getattr(config, name):,}{' (chosen)' if name in left_open else ''}" for name in SIZES]
