"""Correctness before speed: what is measured must first compute what it claims to, on a smaller case.

The tolerance is a comparison: at most twice the error that plain PyTorch makes in the same dtype, and a few units in
the last place of the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends import BACKENDS
from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.choose import choose
from mplus.backends.reference import ReferenceBackend
from mplus.bench.baselines.variants import VARIANTS
from mplus.bench.fixtures.presets import Preset
from mplus.bench.fixtures.setup import Bed
from mplus.errors import MPlusError, NotSupported

ULPS = 8
CASES = ((1, 96, 1), (1, 96, 5), (16, 130, 16), (7, 33, 12))
"""Queries, memory rows and text keys of the requests that a backend is tried with."""

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@define
class Verdict:
    """What was found about one arm.

    Attributes:
        status: "ok"; "skipped": it cannot run here; "failed": it computes something else, and gets no speed.
        reason: why it is not ok.
        checks: error and what was allowed, of every check.
    """

    status: str = OK
    reason: str | None = None
    checks: list[dict[str, Any]] = field(factory=list)

    def plain(self) -> dict[str, Any]:
        """For a record."""
        return {"status": self.status, **({"reason": self.reason} if self.reason else {}), "checks": self.checks}

    def compare(self, what: str, found: Tensor, truth: Tensor, plain: Tensor) -> None:
        """Add a check of ``found`` against ``truth`` (float64), with ``plain`` in the dtype of ``found``."""
        error, usual = (float((part.double() - truth).abs().max()) for part in (found, plain))
        allowed = 2 * usual + ULPS * torch.finfo(found.dtype).eps * float(truth.abs().max())
        self.checks.append({"check": what, "error": error, "allowed": allowed})
        if not error <= allowed and self.status == OK:  # NaN is no number below anything
            self.status = FAILED
            self.reason = f"{what}: differs from float64 by {error:.3g}, allowed are {allowed:.3g}"

    def attempt(self, what: str, run: Callable[[], Tensor], truth: Tensor, plain: Tensor) -> None:
        """Add a check of what ``run`` returns; whatever it raises is recorded."""
        if self.status != OK:
            return
        try:
            found = run()
            if found.shape != truth.shape:
                raise ValueError(f"returns {list(found.shape)} where {list(truth.shape)} is due")  # noqa: TRY301
            self.compare(what, found, truth, plain)
        except NotSupported as error:
            self.status, self.reason = SKIPPED, f"{error}"
        except Exception as error:  # noqa: BLE001 - a backend may fail in any way; that is what is asked
            self.status, self.reason = FAILED, f"{what}: {type(error).__name__}: {error}"


ASKED = (ReferenceBackend.name, "flex")
"""Measured only when named: the specification, and what without a GPU takes a second for a tiny request."""


def backend_names(wanted: Iterable[str] | None) -> list[str]:
    """Backends to measure: those named, or all registered but those in ``ASKED``. Raises UnknownNameError."""
    if wanted is None:
        return [name for name in BACKENDS.names() if name not in ASKED]
    names = list(dict.fromkeys(wanted))
    for name in names:
        if name not in BACKENDS.names():
            BACKENDS.get(name)  # raises, naming near ones
    return names


def request_of(preset: Preset, device: torch.device, case: tuple[int, int, int], seed: int) -> AttentionRequest:
    """A request of a layer's shapes: queries, memory rows and text keys as in ``CASES``."""
    length, rows, text = case
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, count: int) -> Tensor:
        return torch.randn(1, heads, count, preset.head_dim, generator=generator).to(device, preset.torch_dtype)

    return AttentionRequest(
        queries=draw(preset.heads, length),
        keys=draw(preset.key_heads, text),
        values=draw(preset.key_heads, text),
        scale=preset.head_dim**-0.5,
        segments=(Segment(draw(preset.key_heads, rows), draw(preset.key_heads, rows)),),
    )


def plain_attention(request: AttentionRequest) -> Tensor:
    """A causal request with ordinary operations in its own dtype: how much precision one may expect."""
    keys = torch.cat([*(segment.keys for segment in request.segments), request.keys], 2)
    values = torch.cat([*(segment.values for segment in request.segments), request.values], 2)
    groups, length = request.queries.shape[1] // keys.shape[1], request.queries.shape[2]
    keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scores = request.queries @ keys.mT * request.scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(keys.shape[2] - length)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def exact_attention(request: AttentionRequest) -> Tensor:
    """The request by the reference backend in float64."""
    segments = tuple(Segment(part.keys.double(), part.values.double()) for part in request.segments)
    queries, keys, values = request.queries.double(), request.keys.double(), request.values.double()
    return (
        ReferenceBackend().attend(evolve(request, queries=queries, keys=keys, values=values, segments=segments)).output
    )


@torch.no_grad()
def check_backend(name: str, preset: Preset, device: torch.device) -> Verdict:
    """Try a backend with the requests of ``CASES``."""
    verdict = Verdict()
    for seed, case in enumerate(CASES):
        request = request_of(preset, device, case, seed)

        def run(request: AttentionRequest = request) -> Tensor:
            return choose(name, request).attend(request).output

        what = "attention of {} queries over {} rows and {} text keys".format(*case)
        try:
            verdict.attempt(what, run, exact_attention(request), plain_attention(request))
        except MPlusError as error:
            verdict.status, verdict.reason = SKIPPED, str(error)
    return verdict


@torch.no_grad()
def check_variant(name: str, preset: Preset, device: torch.device) -> Verdict:
    """The same for one of PyTorch's own ways."""
    verdict = Verdict()
    for seed, case in enumerate(CASES):
        request = request_of(preset, device, case, seed)
        (memory,) = request.segments
        keys, values = torch.cat([memory.keys, request.keys], 2), torch.cat([memory.values, request.values], 2)
        what = "attention of {} queries over {} rows and {} text keys".format(*case)
        verdict.attempt(
            what,
            lambda keys=keys, values=values, request=request: VARIANTS[name](request.queries, keys, values),  # type: ignore[misc]
            exact_attention(request),
            plain_attention(request),
        )
    return verdict


@define(eq=False)
class ReadGate:
    """A smaller decoder of the same shapes, read in every way; float64 in the published way is the truth.

    ``all_rows`` memories hold as many long-term rows as a read retrieves: then every way reads the same. Otherwise, in
    float32, the memory holds more, and the ways that retrieve must pick the same rows.
    """

    preset: Preset
    device: torch.device
    beds: dict[bool, Bed] = field(factory=dict)
    known: dict[tuple[bool, int], tuple[Tensor, Tensor, Tensor]] = field(factory=dict)

    def bed(self, all_rows: bool) -> Bed:
        """The decoder with one of the two memories."""
        if all_rows not in self.beds:
            reduced = self.preset.reduced()
            rows = reduced.retrieved_tokens if all_rows else reduced.long_term_rows
            self.beds[all_rows] = Bed(evolve(reduced, long_term_rows=rows), self.device, seed=1)
        return self.beds[all_rows]

    def check(self, read: Callable[[Bed], Callable[[Tensor], Tensor]], retrieves: bool, verdict: Verdict) -> Verdict:
        """Check a way to read: ``read(bed)`` gives a function of ids ``[1, T]`` to logits ``[1, 1, V]``."""
        memories = [True, False] if retrieves and self.preset.torch_dtype == torch.float32 else [True]
        for all_rows in memories:
            bed = self.bed(all_rows)
            for length in (1, 9):
                ids, truth, plain = self._expected(bed, all_rows, length)
                what = f"logits of {length} tokens, {'all' if all_rows else 'the best'} long-term rows"
                verdict.attempt(what, lambda bed=bed, ids=ids: read(bed)(ids), truth, plain)  # type: ignore[misc]
        return verdict

    def _expected(self, bed: Bed, all_rows: bool, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, and what the published way makes of them in float64 and in the dtype of the preset."""
        if (all_rows, length) not in self.known:
            ids = bed.prompts(length, 1)[0]
            self.known[all_rows, length] = ids, bed.in_float64().read(ids), bed.published().read(ids)
        return self.known[all_rows, length]
