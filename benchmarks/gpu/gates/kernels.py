"""Gates of the kernels that score and gather rows, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define
from torch import Tensor

from benchmarks.gpu.session import Session
from mplus.backends.triton.gather import gather_rotated, plain_gather_rotated
from mplus.backends.triton.score import plain_sigmoid_means, sigmoid_means

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMOID = 2.0**-12
"""The largest error of a sigmoid that is made of the GPU's ``tanh.approx.f32``: half of its relative error, 2^-11."""
MANY = 2**31
"""Numbers beyond which an offset no longer fits into 32 bits."""


@define(frozen=True)
class ScoreShape:
    """Sizes of a scoring: B texts of T tokens, m keys of width r, masked or not, the same keys for all or not."""

    batch: int
    length: int
    count: int
    width: int
    masked: bool = True
    shared: bool = False

    def build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw queries, mask and keys on the CPU."""
        generator = torch.Generator().manual_seed(self.count)
        queries = torch.randn(self.batch, self.length, self.width, generator=generator)
        keys = torch.randn(*(() if self.shared else (self.batch,)), self.count, self.width, generator=generator)
        mask = None
        if self.masked:
            mask = torch.rand(self.batch, self.length, generator=generator) > 0.3
            queries[~mask] = torch.nan
        size = self.width**-0.25 * 1.4
        return (queries * size).to(dtype), mask, (keys * size).to(dtype)


SCORES: Mapping[str, ScoreShape] = {
    "masked": ScoreShape(2, 37, 70, 20),
    "one token": ScoreShape(1, 1, 33, 64, masked=False, shared=True),
    "wide": ScoreShape(1, 65, 300, 256, masked=False, shared=True),
    "many": ScoreShape(1, 512, 20_000, 256, masked=False, shared=True),
}


@define(frozen=True)
class GatherShape:
    """Sizes of a gather: M stored rows of which n are picked, H heads, widths of keys, values and the rotated part."""

    stored: int
    count: int
    heads: int
    width: int
    value_width: int
    rotated: int

    def build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw rows, indices and tables on the CPU."""
        generator = torch.Generator().manual_seed(self.count)
        rows = torch.randn(self.stored, self.heads * (self.width + self.value_width), generator=generator).to(dtype)
        indices = torch.randint(self.stored, (self.count,), generator=generator)
        angles = 6 * torch.rand(self.count, self.rotated, generator=generator)
        return rows, indices, angles.cos(), angles.sin()


GATHERS: Mapping[str, GatherShape] = {
    "partly rotated": GatherShape(40, 21, 3, 20, 18, 12),
    "not rotated": GatherShape(40, 21, 2, 3, 5, 0),
    "heads of 128": GatherShape(5_000, 2_560, 8, 128, 128, 128),
    "heads of 256": GatherShape(300, 77, 1, 256, 256, 256),
}


def score(session: Session) -> None:
    """Open the gates of the scoring kernel."""
    for name in ("masked",) if session.few else SCORES:
        for dtype in DTYPES[: 1 if session.few else 3]:
            with session.gate(f"score/{name}/{dtype}".replace("torch.", "")) as gate:
                shape = SCORES[name]
                if session.tiny and shape.count > 1000:
                    shape = ScoreShape(1, 65, 300, shape.width, masked=False, shared=True)
                queries, mask, keys = shape.build(dtype)
                moved = [None if part is None else part.to(session.device) for part in (queries, mask, keys)]
                found = sigmoid_means(moved[0], moved[1], moved[2], interpret=session.interpret)  # type: ignore[arg-type]
                exact = plain_sigmoid_means(queries.double(), mask, keys.double())
                gate.close(found, plain_sigmoid_means(queries, mask, keys), exact, extra=SIGMOID)
    if not session.tiny:
        _score_beyond(session)


def _score_beyond(session: Session) -> None:
    """Score keys whose offsets do not fit into 32 bits, and look at the last of them."""
    with session.gate("score/more numbers than 2^31") as gate:
        width, last = 256, 100
        count = MANY // width + last
        keys = torch.zeros(count, width, dtype=torch.bfloat16, device=session.device)
        queries, _, some = ScoreShape(1, 3, last, width, masked=False, shared=True).build(torch.bfloat16)
        keys[-last:] = some.to(session.device)
        found = sigmoid_means(queries.to(session.device), None, keys)
        exact = plain_sigmoid_means(queries.double(), None, some.double())
        gate.close(found[:, -last:], plain_sigmoid_means(queries, None, some), exact, extra=SIGMOID)
        gate.holds(bool((found[:, :-last] == 0.5).all()), "keys of zeros have a score of one half")


def gather(session: Session) -> None:
    """Open the gates of the gathering kernel."""
    for name in ("partly rotated",) if session.few else GATHERS:
        for dtype in DTYPES[: 1 if session.few else 3]:
            with session.gate(f"gather/{name}/{dtype}".replace("torch.", "")) as gate:
                shape = GATHERS[name]
                if session.tiny and shape.stored > 1000:
                    shape = GatherShape(50, 33, 2, shape.width, shape.value_width, shape.rotated)
                inputs = shape.build(dtype)
                found = [part.to(session.device) for part in _buffers(shape, dtype)]
                gather_rotated(*(part.to(session.device) for part in inputs), *found, interpret=session.interpret)
                rows, indices, cos, sin = inputs
                plain, exact = _buffers(shape, dtype), _buffers(shape, torch.float64)
                plain_gather_rotated(*inputs, *plain)
                plain_gather_rotated(rows.double(), indices, cos.double(), sin.double(), *exact)
                gate.close(found[0], plain[0], exact[0])
                gate.same(found[1], plain[1], "values")
    if not session.tiny:
        _gather_beyond(session)


def _gather_beyond(session: Session) -> None:
    """Gather rows whose offsets do not fit into 32 bits."""
    with session.gate("gather/more numbers than 2^31") as gate:
        shape = GatherShape(64, 64, 8, 128, 128, 128)
        rows, _, cos, sin = shape.build(torch.bfloat16)
        wide = rows.shape[1]
        stored = torch.zeros(MANY // wide + 64, wide, dtype=torch.bfloat16, device=session.device)
        stored[-64:] = rows.to(session.device)
        indices = torch.arange(64)
        found = [part.to(session.device) for part in _buffers(shape, torch.bfloat16)]
        places = (indices + len(stored) - 64).to(session.device)
        gather_rotated(stored, places, cos.to(session.device), sin.to(session.device), *found)
        plain, exact = _buffers(shape, torch.bfloat16), _buffers(shape, torch.float64)
        plain_gather_rotated(rows, indices, cos, sin, *plain)
        plain_gather_rotated(rows.double(), indices, cos.double(), sin.double(), *exact)
        gate.close(found[0], plain[0], exact[0])
        gate.same(found[1], plain[1], "values")


def _buffers(shape: GatherShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(shape.heads, shape.count, shape.width, dtype=dtype),
        torch.zeros(shape.heads, shape.count, shape.value_width, dtype=dtype),
    )
