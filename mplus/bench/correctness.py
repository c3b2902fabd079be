"""Check that what is timed computes the right thing, on a smaller case of the same shapes.

The truth is computed in float64. An error may be at most twice the one that plain PyTorch makes in the same dtype, and
a few units in the last place of the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NotRequired, TypedDict

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends import BACKENDS
from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.choose import choose
from mplus.backends.reference import ReferenceBackend
from mplus.bench.attention_variants import VARIANTS
from mplus.bench.fixture import BenchmarkFixture
from mplus.bench.presets import Preset
from mplus.errors import MPlusError, NotSupported

ULPS = 8
CASES = ((1, 96, 1), (1, 96, 5), (16, 130, 16), (7, 33, 12))
"""Queries, memory rows and text keys of the requests that attention is checked with."""

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


class Check(TypedDict):
    """The error of one check, and the allowed one."""

    check: str
    error: float
    allowed: float


class CheckFacts(TypedDict):
    """A ``CheckResult`` as records have it."""

    status: str
    reason: NotRequired[str]
    checks: list[Check]


@define
class CheckResult:
    """The outcome of the checks of one variant.

    Attributes:
        status: "ok"; "skipped": it cannot run here; "failed": it computes something else, and gets no speed.
        reason: why it is not ok.
        checks: error and allowed error of every check.
    """

    status: str = OK
    reason: str | None = None
    checks: list[Check] = field(factory=list)

    def to_dict(self) -> CheckFacts:
        """Return the result as records have it."""
        if not self.reason:
            return {"status": self.status, "checks": self.checks}
        return {"status": self.status, "reason": self.reason, "checks": self.checks}

    def compare(self, what: str, found: Tensor, truth: Tensor, plain: Tensor) -> None:
        """Add a check of ``found`` against ``truth`` (float64), with ``plain`` in the dtype of ``found``."""
        error, usual = (float((part.double() - truth).abs().max()) for part in (found, plain))
        allowed = 2 * usual + ULPS * torch.finfo(found.dtype).eps * float(truth.abs().max())
        self.checks.append({"check": what, "error": error, "allowed": allowed})
        if not error <= allowed and self.status == OK:  # NaN is no number below anything
            self.status = FAILED
            self.reason = f"{what}: differs from float64 by {error:.3g}, allowed are {allowed:.3g}"

    def check(self, what: str, run: Callable[[], Tensor], truth: Tensor, plain: Tensor) -> None:
        """Add a check of what ``run`` returns, unless an earlier one failed; whatever it raises becomes the reason."""
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


ONLY_BY_NAME = (ReferenceBackend.name, "flex")
"""Measured only when named: the specification, and what without a GPU takes a second for a tiny request."""


def backend_names(wanted: Iterable[str] | None) -> list[str]:
    """Return the backends to measure: those named, or all registered but ``ONLY_BY_NAME``. Raises UnknownNameError."""
    if wanted is None:
        return [name for name in BACKENDS.names() if name not in ONLY_BY_NAME]
    names = list(dict.fromkeys(wanted))
    for name in names:
        if name not in BACKENDS.names():
            BACKENDS.get(name)  # raises, naming near ones
    return names


def random_request(preset: Preset, device: torch.device, case: tuple[int, int, int], seed: int) -> AttentionRequest:
    """Draw a request of a layer's shapes; ``case`` has queries, memory rows and text keys, as in ``CASES``."""
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
    """Return attention ``[B, H, T, Dv]`` by ordinary operations in the request's dtype: the precision to expect."""
    keys = torch.cat([*(segment.keys for segment in request.segments), request.keys], 2)
    values = torch.cat([*(segment.values for segment in request.segments), request.values], 2)
    groups, length = request.queries.shape[1] // keys.shape[1], request.queries.shape[2]
    keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scores = request.queries @ keys.mT * request.scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(keys.shape[2] - length)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def exact_attention(request: AttentionRequest) -> Tensor:
    """Return attention ``[B, H, T, Dv]`` by the reference backend in float64."""
    segments = tuple(Segment(part.keys.double(), part.values.double()) for part in request.segments)
    queries, keys, values = request.queries.double(), request.keys.double(), request.values.double()
    double = evolve(request, queries=queries, keys=keys, values=values, segments=segments)
    return ReferenceBackend().attend(double).output


def check_backend(name: str, preset: Preset, device: torch.device) -> CheckResult:
    """Check a backend with requests of the shapes in ``CASES``."""
    return _check_attention(lambda request: choose(name, request).attend(request).output, preset, device)


def check_attention_variant(name: str, preset: Preset, device: torch.device) -> CheckResult:
    """Check one of PyTorch's own functions, which gets memory and text joined, in the same way."""

    def attend(request: AttentionRequest) -> Tensor:
        (memory,) = request.segments
        keys, values = torch.cat([memory.keys, request.keys], 2), torch.cat([memory.values, request.values], 2)
        return VARIANTS[name](request.queries, keys, values)

    return _check_attention(attend, preset, device)


@torch.no_grad()
def _check_attention(attend: Callable[[AttentionRequest], Tensor], preset: Preset, device: torch.device) -> CheckResult:
    result = CheckResult()
    for seed, case in enumerate(CASES):
        request = random_request(preset, device, case, seed)
        what = "attention of {} queries over {} rows and {} text keys".format(*case)
        try:
            result.check(
                what,
                lambda request=request: attend(request),  # type: ignore[misc]
                exact_attention(request),
                plain_attention(request),
            )
        except MPlusError as error:
            result.status, result.reason = SKIPPED, str(error)
    return result


@define(eq=False)
class ReadCheck:
    """A smaller decoder of the preset's shapes, by which reads are checked; the published read in float64 is the truth.

    Its memory holds as many long-term rows as a read retrieves, so that every variant reads the same rows. In float32
    there is a second memory which holds more, where variants that retrieve must pick the same rows.

    Attributes:
        preset: of the measurement; ``preset.reduced()`` is checked.
        device: where.
    """

    preset: Preset
    device: torch.device
    _fixtures: dict[bool, BenchmarkFixture] = field(factory=dict)
    _expected: dict[tuple[bool, int], tuple[Tensor, Tensor, Tensor]] = field(factory=dict)

    def check(
        self,
        read: Callable[[BenchmarkFixture], Callable[[Tensor], Tensor]],
        retrieves: bool,
        result: CheckResult,
    ) -> CheckResult:
        """Check reads of two lengths.

        Args:
            read: ``read(fixture)`` gives a function of ids ``[1, T]`` to logits ``[1, 1, V]``.
            retrieves: it must retrieve what the published read does.
            result: the checks are added to it.
        """
        memories = [True, False] if retrieves and self.preset.torch_dtype == torch.float32 else [True]
        for all_rows in memories:
            fixture = self._fixture(all_rows)
            for length in (1, 9):
                ids, truth, plain = self._expect(fixture, all_rows, length)
                what = f"logits of {length} tokens, {'all' if all_rows else 'the best'} long-term rows"
                result.check(what, lambda fixture=fixture, ids=ids: read(fixture)(ids), truth, plain)  # type: ignore[misc]
        return result

    def _fixture(self, all_rows: bool) -> BenchmarkFixture:
        """Return the decoder with one of the two memories."""
        if all_rows not in self._fixtures:
            reduced = self.preset.reduced()
            rows = reduced.retrieved_tokens if all_rows else reduced.long_term_rows
            self._fixtures[all_rows] = BenchmarkFixture(evolve(reduced, long_term_rows=rows), self.device, seed=1)
        return self._fixtures[all_rows]

    def _expect(self, fixture: BenchmarkFixture, all_rows: bool, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, and what the published read makes of them in float64 and in the dtype of the preset."""
        if (all_rows, length) not in self._expected:
            ids = fixture.prompts(length, 1)[0]
            self._expected[all_rows, length] = ids, fixture.in_float64().read(ids), fixture.published().read(ids)
        return self._expected[all_rows, length]
