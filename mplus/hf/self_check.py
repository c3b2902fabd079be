"""A few tokens' proof, at wrap time, that memory works in this decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.hf.engine import DecoderEngine
from mplus.hf.forward import generating
from mplus.hf.modes import in_eval_mode
from mplus.hf.reading import Reading
from mplus.hf.retrofit import Technique
from mplus.memory.stream import StreamView
from mplus.rows import MemoryRows
from mplus.stores.ram import RamStore

TOKENS = 8
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error, relative to the standard deviation of the logits; narrower dtypes are judged by their mean error."""
NARROW_TOLERANCE = 0.15


@define(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what was compared.
        error: relative error found; None where nothing could be compared.
        passed: whether it is within tolerance.
        remark: why a check was not applied, or what failed.
    """

    name: str
    error: float | None
    passed: bool
    remark: str = ""

    def __str__(self) -> str:
        found = self.remark or f"relative error {self.error:.2g}"
        return f"{self.name}: {found}"


def check_ids(vocab_size: int, device: torch.device) -> Tensor:
    """``[1, TOKENS]`` different ids of the vocabulary."""
    return ((torch.arange(TOKENS, device=device) * 7 + 3) % vocab_size)[None]


@torch.no_grad()
def self_check(model: Any, base_logits: Tensor) -> list[Check]:
    """Run all checks on a wrapped decoder in its present technique and positions.

    Args:
        model: the wrapped decoder.
        base_logits: ``[1, TOKENS, V]`` of the decoder before it was wrapped, for ``check_ids``.
    """
    with in_eval_mode(model):
        return _Checks(model, base_logits).run()


class _Checks:
    def __init__(self, model: Any, base_logits: Tensor) -> None:
        self.model = model
        self.engine: DecoderEngine = model.mplus_engine
        self.base_logits = base_logits
        self.ids = check_ids(self.engine.vocab_size, self.engine.device)
        self.tolerance = TOLERANCE.get(self.engine.dtype, NARROW_TOLERANCE)

    def run(self) -> list[Check]:
        """Every check; one that raises has failed."""
        self.view = self._view()
        steps = {
            "no memory = base model, bit for bit": self._no_memory,
            "memory acts": self._acts,
            "prefill and steps = full forward": self._steps,
            "left-padded row = row alone": self._padded,
            "attention function = cache view": self._techniques,
            "negative positions = offset positions": self._positions,
            "a write gives finite rows": self._write,
        }
        checks = []
        for name, step in steps.items():
            try:
                error, remark = step()
            except Exception as failure:  # noqa: BLE001 - the point is to find what a foreign model cannot do, and to say it
                checks.append(Check(name, None, False, f"{type(failure).__name__}: {failure}"))
                continue
            passed = bool(remark) if error is None else error <= (0.0 if step == self._no_memory else self.tolerance)
            checks.append(Check(name, error, passed, remark))
        return checks

    def _view(self) -> StreamView:
        """Memory of realistic rows: what the layers receive when other tokens are read."""
        seen: dict[int, Tensor] = {}
        handles = []
        for spec in self.engine.retrofit.anatomy.specs:
            index = spec.memory_index

            def keep(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                seen[index] = args[0] if args else kwargs["hidden_states"]

            handles.append(spec.layer.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            self.model(input_ids=(self.ids.flip(1) + 1) % self.engine.vocab_size)
        finally:
            for handle in handles:
                handle.remove()
        layout = self.engine.layout
        stm = []
        for index in range(layout.layers):
            hidden = seen[index][0, : TOKENS - 3].to(layout.device)
            numbers = torch.arange(len(hidden), device=layout.device)
            stm.append(MemoryRows(hidden, numbers, torch.zeros_like(numbers)))
        pending = tuple(rows.select(slice(0, 0)) for rows in stm)
        state = self.engine.mechanism.new_state(layout)
        return StreamView(
            evolve(state, stm=tuple(stm), pending=pending, clock=len(stm[0])), RamStore(layout).snapshot()
        )

    def _read(self, rows: int = 1, memory: bool = True, **inputs: Any) -> Any:
        reading = Reading(self.engine.mechanism, [self.view] * rows)
        if not memory:
            return self.model(**inputs)
        with generating(self.model, reading):
            return self.model(**inputs)

    def _error(self, a: Tensor, b: Tensor) -> float:
        difference = (a.double() - b.double()).abs() / b.double().std().clamp(min=1e-12)
        return float(difference.max() if self.engine.dtype in TOLERANCE else difference.mean())

    def _no_memory(self) -> tuple[float | None, str]:
        logits = self.model(input_ids=self.ids).logits
        return (0.0 if torch.equal(logits, self.base_logits) else max(self._error(logits, self.base_logits), 1e-12)), ""

    def _acts(self) -> tuple[float | None, str]:
        moved = self._error(self._read(input_ids=self.ids).logits, self.base_logits)
        if moved <= self.tolerance:
            return float("inf"), f"memory moves the logits by {moved:.2g} of their standard deviation only"
        return 0.0, ""

    def _steps(self) -> tuple[float | None, str]:
        error, own = (self._stepwise(memory) for memory in (True, False))
        return _judged(error, own, self.tolerance, "steps with a cache")

    def _stepwise(self, memory: bool) -> float:
        split = TOKENS - 2
        reading = Reading(self.engine.mechanism, [self.view])
        full = self._read(memory=memory, input_ids=self.ids).logits
        with generating(self.model, reading) if memory else _nothing():
            first = self.model(input_ids=self.ids[:, :split], use_cache=True)
            step = {"past_key_values": first.past_key_values, "use_cache": True}
            parts = [self.model(input_ids=token, **step).logits for token in self.ids[:, split:].split(1, 1)]
        return self._error(torch.cat([first.logits, *parts], 1), full)

    def _padded(self) -> tuple[float | None, str]:
        error, own = (self._padding(memory) for memory in (True, False))
        return _judged(error, own, self.tolerance, "left padding")

    def _padding(self, memory: bool) -> float:
        short = self.ids[:, 3:]
        padded = torch.cat([self.ids[:, :3], short], 1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([self.ids, padded]),
            "attention_mask": torch.cat([torch.ones_like(mask), mask]),
        }
        if not memory:
            inputs.update(self.engine.padded_positions(inputs["attention_mask"]))
        logits = self._read(2, memory, **inputs).logits[1:, 3:]
        return self._error(logits, self._read(memory=memory, input_ids=short).logits)

    def _techniques(self) -> tuple[float | None, str]:
        if self.engine.retrofit.technique == "cache_view":
            return None, "the cache view is in use"
        with self._as("cache_view", self.engine.retrofit.positions.offset):
            view = self._read(input_ids=self.ids).logits
        return self._error(self._read(input_ids=self.ids).logits, view), ""

    def _positions(self) -> tuple[float | None, str]:
        retrofit = self.engine.retrofit
        if retrofit.positions.offset or retrofit.anatomy.learned_positions or retrofit.anatomy.alibi:
            return (
                None,
                "positions of text never move" if not retrofit.positions.offset else "offset positions are in use",
            )
        with self._as(retrofit.technique, True):
            offset = self._read(input_ids=self.ids).logits
        return self._error(self._read(input_ids=self.ids).logits, offset), ""

    @contextmanager
    def _as(self, technique: Technique, offset: bool) -> Iterator[None]:
        """Run with another technique or other positions."""
        retrofit = self.engine.retrofit
        before = retrofit.technique, retrofit.positions
        retrofit.technique, retrofit.positions = technique, evolve(retrofit.positions, offset=offset)
        try:
            yield
        finally:
            retrofit.technique, retrofit.positions = before

    def _write(self) -> tuple[float | None, str]:
        rows = self.engine.encode([self.view.state], self.ids)
        wrong = [layer for layer, made in enumerate(rows) if not bool(torch.isfinite(made).all())]
        if len(rows) != self.engine.layout.layers or wrong:
            return float("inf"), f"rows of layers {wrong} are not finite"
        return 0.0, ""


def _judged(error: float, own: float, tolerance: float, what: str) -> tuple[float | None, str]:
    """A decoder that is inconsistent by itself cannot be expected to be consistent with memory."""
    if error > tolerance and own > tolerance:
        return None, f"not applicable: the base model itself differs by {own:.2g} with {what}"
    return error, ""


@contextmanager
def _nothing() -> Iterator[None]:
    yield
