"""Golden traces on disk: what was done with a published model, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import CheckpointError
from mplus.interop.golden import STEPS, read_json

TENSORS = "trace.safetensors"
WEIGHTS = "state_dict.safetensors"
FORMAT = 1
KINDS = ("decode", "forward", "generate", "inject", "merge")


@define(frozen=True, eq=False, kw_only=True)
class Recorded:
    """State of one memory at one moment of a trace, as the published code keeps it.

    Attributes:
        memory: ``[L, N, d]`` short-term pool.
        initialized: whether the pool holds memory.
        memory_ages: ``[L, N]``, or None (MemoryLLM).
        update_step: rows written since the last merge; 0 for MemoryLLM.
        ltm, ltm_keys, ltm_ages, ltm_recall_frequencies: per layer ``[m, d]``, ``[m, r]``, ``[m]``, ``[m]``; empty for
            MemoryLLM.
        pending, pending_keys, pending_ages: what waits, ``[L, p, d]``, ``[L, p, r]``, ``[L, p]``; None where empty.
    """

    memory: Tensor
    initialized: bool = True
    memory_ages: Tensor | None = None
    update_step: int = 0
    ltm: tuple[Tensor, ...] = ()
    ltm_keys: tuple[Tensor, ...] = ()
    ltm_ages: tuple[Tensor, ...] = ()
    ltm_recall_frequencies: tuple[Tensor, ...] = ()
    pending: Tensor | None = None
    pending_keys: Tensor | None = None
    pending_ages: Tensor | None = None


@define(frozen=True, eq=False)
class RecordedRetrieval:
    """Long-term rows that a read fetched.

    Attributes:
        modes: per layer "topk" or "tile".
        ids, ages: ``[L, R]``, in the order of use.
        values: ``[L, R, d]`` the rows.
        scores: per layer ``[candidates]``, or None where nothing was scored.
    """

    modes: tuple[str, ...]
    ids: Tensor
    values: Tensor
    ages: Tensor
    scores: tuple[Tensor | None, ...]


@define(frozen=True, eq=False)
class Step:
    """One thing that was done.

    Attributes:
        index, kind: its place and what it is (``KINDS``).
        inputs, outputs: tensors by name.
        args: settings by name.
        randperm: ``[calls, n]`` the permutations drawn, or None.
        retrieval: what was fetched from long-term memory, or None.
        after: the state it left.
    """

    index: int
    kind: str
    inputs: Mapping[str, Tensor]
    args: Mapping[str, JsonValue]
    outputs: Mapping[str, Tensor]
    randperm: Tensor | None
    retrieval: RecordedRetrieval | None
    after: Recorded


class Permutations:
    """Hands out recorded permutations in the place of random ones."""

    def __init__(self, recorded: Tensor | None) -> None:
        """``recorded`` is ``[calls, n]`` or None."""
        self._left: list[Tensor] = [] if recorded is None else list(recorded)

    def __len__(self) -> int:
        """Return how many were not asked for yet."""
        return len(self._left)

    def __call__(self, n: int) -> Tensor:
        """Return the next one. Raises CheckpointError when there is none, or one of another length."""
        if not self._left or len(self._left[0]) != n:
            have = f"one of {len(self._left[0])}" if self._left else "no further one"
            raise CheckpointError(f"randperm must hold a permutation of {n} rows at this point, the trace has {have}")
        return self._left.pop(0).to(torch.int64)


class Trace:
    """The trace of one case.

    Attributes:
        folder: where it lies.
        model: "mplus" or "memoryllm".
        initial: the state before the first step.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when a file is missing, damaged or of another format."""
        self.folder = folder
        self._plain = read_json(folder / STEPS)
        if self._plain.get("format") != FORMAT:
            raise CheckpointError(f"format in {folder / STEPS} must be {FORMAT}, got {self._plain.get('format')!r}")
        try:
            self._tensors = load_file(folder / TENSORS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / TENSORS} must be a complete safetensors file: {error}") from error
        self.model: str = self._entry(self._plain, "model")
        if self.model not in ("mplus", "memoryllm"):
            raise CheckpointError(f"model in {folder / STEPS} must be 'mplus' or 'memoryllm', got {self.model!r}")
        self.initial = self._state(self._entry(self._plain, "initial_state"))

    def __len__(self) -> int:
        return len(self._entry(self._plain, "steps"))

    def __iter__(self) -> Iterator[Step]:
        for index, plain in enumerate(self._entry(self._plain, "steps")):
            kind = self._entry(plain, "kind")
            if kind not in KINDS:
                raise CheckpointError(
                    f"kind of step {index} in {self.folder / STEPS} must be one of {', '.join(KINDS)}, got {kind!r}"
                )
            retrieval = plain.get("retrieval")
            yield Step(
                index=index,
                kind=kind,
                inputs=self._named(plain, "inputs"),
                args=self._entry(plain, "args"),
                outputs=self._named(plain, "outputs"),
                randperm=self._tensor(plain.get("randperm")),
                retrieval=None if retrieval is None else self._retrieval(retrieval),
                after=self._state(self._entry(plain, "state_after")),
            )

    def _state(self, plain: Mapping[str, JsonValue]) -> Recorded:
        memory = self._required(self._entry(plain, "memory"))
        if self.model == "memoryllm":
            return Recorded(memory=memory, initialized=bool(self._entry(plain, "initialized")))
        return Recorded(
            memory=memory,
            memory_ages=self._required(self._entry(plain, "memory_ages")),
            update_step=self._entry(plain, "update_step"),
            ltm=self._per_layer(plain, "ltm"),
            ltm_keys=self._per_layer(plain, "ltm_keys"),
            ltm_ages=self._per_layer(plain, "ltm_ages"),
            ltm_recall_frequencies=self._per_layer(plain, "ltm_recall_frequencies"),
            pending=self._tensor(self._entry(plain, "cached_dropped_memories")),
            pending_keys=self._tensor(self._entry(plain, "cached_dropped_keys")),
            pending_ages=self._tensor(self._entry(plain, "cached_dropped_memory_ages")),
        )

    def _per_layer(self, plain: Mapping[str, JsonValue], name: str) -> tuple[Tensor, ...]:
        return tuple(map(self._required, self._entry(plain, name)))

    def _retrieval(self, plain: Mapping[str, JsonValue]) -> RecordedRetrieval:
        ids, values, ages = (self._required(self._entry(plain, name)) for name in ("ids", "values", "ages"))
        scores = tuple(map(self._tensor, self._entry(plain, "scores")))
        return RecordedRetrieval(tuple(self._entry(plain, "mode")), ids, values, ages, scores)

    def _named(self, plain: Mapping[str, JsonValue], entry: str) -> dict[str, Tensor]:
        return {name: self._required(reference) for name, reference in self._entry(plain, entry).items()}

    def _entry(self, plain: Mapping[str, JsonValue], name: str) -> Any:
        if not isinstance(plain, Mapping) or name not in plain:
            raise CheckpointError(f"{self.folder / STEPS} must have {name!r} in every step and state, one lacks it")
        return plain[name]

    def _required(self, reference: JsonValue) -> Tensor:
        tensor = self._tensor(reference)
        if tensor is None:
            raise CheckpointError(f"{self.folder / STEPS} must name a tensor where it has null")
        return tensor

    def _tensor(self, reference: JsonValue) -> Tensor | None:
        """Resolve a name, or a table with a name and how many entries of dimension 1 are meant."""
        if reference is None:
            return None
        name, rows = (reference["tensor"], reference["rows"]) if isinstance(reference, Mapping) else (reference, None)
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder / TENSORS} must have a tensor {name!r}, which {STEPS} refers to")
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[:, :rows]
