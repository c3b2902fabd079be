"""The golden traces of the published code, replayed through the attention kernel."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mplus.backends import BACKENDS
from mplus.backends.reference import ReferenceBackend
from mplus.backends.triton.backend import TritonBackend
from mplus.interop import replay
from mplus.interop.trace import Trace

GOLDENS = Path(__file__).parent.parent / "goldens"


class Interpreted(TritonBackend):
    """The kernel where it can; what has a mask goes to the reference, and is counted."""

    name = "interpreted"
    by_kernel = by_reference = 0

    def __init__(self):
        super().__init__(interpret=True)

    def unsupported_reasons(self, request):
        return [] if request.mask is not None else super().unsupported_reasons(request)

    def attend(self, request):
        if request.mask is not None:
            type(self).by_reference += 1
            return ReferenceBackend().attend(request)
        type(self).by_kernel += 1
        return super().attend(request)


@pytest.fixture
def backend():
    BACKENDS.register("interpreted", Interpreted)
    Interpreted.by_kernel = Interpreted.by_reference = 0
    yield Interpreted
    BACKENDS.unregister("interpreted")


@pytest.mark.parametrize(
    "case",
    [
        "memoryllm_b",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("memoryllm_a", "mplus_a", "mplus_b")),
    ],
)
def test_replays(case, backend):
    """Writes and reads go through the kernel; only steps of several tokens behind others come with masks."""
    masked = []
    (report,) = replay(GOLDENS / case, "interpreted", progress=lambda *_: masked.append(backend.by_reference))
    assert report.passed(2e-5), report
    kinds = [step.kind for step in Trace(GOLDENS / case)]
    with_masks = {kind for kind, (before, after) in zip(kinds[1:], pairwise(masked), strict=True) if after > before}
    assert with_masks <= {"decode"}
    assert backend.by_kernel > 2 * report.steps > backend.by_reference
