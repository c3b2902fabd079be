"""What a replay compares, and what it found."""

from __future__ import annotations

from attrs import define, field
from torch import Tensor

from mplus.interop.replay import Found, Replay
from mplus.interop.trace import Recorded, RecordedRetrieval

TOLERANCE = 2e-5
"""Largest absolute error that passes; the traces themselves are float32."""
MEASURED = ("logits", "hidden states", "new tokens", "memory", "LTM", "ages", "keys", "scores")
EQUAL = ("retrieved ids", "generated tokens", "counters", "recall frequencies", "permutations")


@define(eq=False)
class CaseReport:
    """How one case compares with its trace.

    Attributes:
        name: folder name of the case.
        model: "mplus" or "memoryllm".
        backend, dtype: what it was replayed with.
        steps: steps replayed.
        errors: largest absolute error by quantity (``MEASURED``; waiting rows count as LTM); infinite where shapes
            differ or a number is NaN; a quantity is absent where the case has nothing of it.
        equal: whether everything that must be equal is, by quantity (``EQUAL``).
        differences: for each quantity that is off, where its largest or first difference is.
    """

    name: str
    model: str
    backend: str
    dtype: str
    steps: int = 0
    errors: dict[str, float] = field(factory=dict)
    equal: dict[str, bool] = field(factory=dict)
    differences: dict[str, str] = field(factory=dict)

    @property
    def worst(self) -> float:
        """The largest of all errors."""
        return max(self.errors.values(), default=0.0)

    def passed(self, tolerance: float = TOLERANCE) -> bool:
        """Whether every error is within ``tolerance`` and everything that must be equal is."""
        return self.steps > 0 and self.worst <= tolerance and all(self.equal.values())

    def measure(self, quantity: str, where: str, ours: Tensor, recorded: Tensor) -> None:
        """Note the largest absolute difference of two tensors."""
        error = _error(ours, recorded)
        if error > self.errors.setdefault(quantity, 0.0):
            self.errors[quantity] = error
            shapes = "" if ours.shape == recorded.shape else f", shape {list(ours.shape)} for {list(recorded.shape)}"
            self.differences[quantity] = where + shapes

    def demand(self, quantity: str, where: str, ours: object, recorded: object) -> None:
        """Note whether two values, or tensors of whole numbers, are equal."""
        same = _same(ours, recorded)
        self.equal[quantity] = self.equal.get(quantity, True) and same
        if not same:
            self.differences.setdefault(quantity, where)

    def state(self, where: str, player: Replay, recorded: Recorded) -> None:
        """Compare a whole memory."""
        state = player.state
        if recorded.memory_ages is None:
            self.demand("counters", where, len(state.stm[0]) > 0, recorded.initialized)
        if not recorded.initialized:
            return
        writes = int(state.counters["writes_since_merge"]) if state.counters else 0
        self.demand("counters", where, writes * player.engine.config.memory_tokens_per_chunk, recorded.update_step)
        for layer in player.layers:
            place = f"{where}, layer {layer}"
            self.measure("memory", place, state.stm[layer].need_hidden(), recorded.memory[layer])
            if recorded.memory_ages is not None:
                self.measure("ages", f"{place}, pool", -1 - state.stm[layer].birth, recorded.memory_ages[layer])
                self._long_term(place, player, layer, recorded)
                self._pending(f"{place}, waiting", player, layer, recorded)

    def _long_term(self, place: str, player: Replay, layer: int, recorded: Recorded) -> None:
        rows = player.store.gather(layer, player.store.ids(layer))
        self.measure("LTM", place, rows.need_hidden(), recorded.ltm[layer])
        self.measure("ages", place, player.state.clock - 1 - rows.birth, recorded.ltm_ages[layer])
        if rows.key is not None:
            self.measure("keys", place, rows.key, recorded.ltm_keys[layer])
        if rows.expiry is not None:
            frequencies = recorded.ltm_recall_frequencies[layer]
            left = rows.expiry - player.state.counters["decayed"][layer]
            self.demand("recall frequencies", place, left.to(frequencies.dtype), frequencies)

    def _pending(self, place: str, player: Replay, layer: int, recorded: Recorded) -> None:
        rows = player.state.pending[layer]
        if recorded.pending is None or recorded.pending_keys is None or recorded.pending_ages is None:
            self.demand("counters", place, len(rows), 0)
            return
        self.measure("LTM", place, rows.need_hidden(), recorded.pending[layer])
        self.measure("ages", place, player.state.clock - 1 - rows.birth, recorded.pending_ages[layer])
        if rows.key is not None:
            self.measure("keys", place, rows.key, recorded.pending_keys[layer])

    def retrieval(self, where: str, found: tuple[Found, ...], recorded: RecordedRetrieval | None) -> None:
        """Compare what every layer fetched."""
        if recorded is None and not found:
            return
        self.demand(
            "retrieved ids", where, tuple(one.mode for one in found), () if recorded is None else recorded.modes
        )
        if recorded is None or len(found) != len(recorded.modes):
            return
        for layer, one in enumerate(found):
            place = f"{where}, layer {layer}"
            self.demand("retrieved ids", place, one.ids, recorded.ids[layer])
            self.measure("LTM", f"{place}, retrieved", one.retrieved.rows.need_hidden(), recorded.values[layer])
            self.measure("ages", f"{place}, retrieved", one.ages, recorded.ages[layer])
            scores = recorded.scores[layer]
            if scores is not None and len(one.retrieved.scores) and int(one.ids.max()) < len(scores):
                self.measure("scores", place, one.retrieved.scores, scores[one.ids])


def _error(ours: Tensor, recorded: Tensor) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    error = float((ours.detach().cpu().double() - recorded.double()).abs().max())
    return float("inf") if error != error else error  # noqa: PLR0124 - NaN is the number that differs from itself


def _same(ours: object, recorded: object) -> bool:
    if isinstance(ours, Tensor) and isinstance(recorded, Tensor):
        return ours.shape == recorded.shape and bool((ours.cpu() == recorded).all())
    return ours == recorded
