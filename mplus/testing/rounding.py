"""How far apart two computations of the same numbers may be: as far as rounding takes them, which is measured.

Sums round differently with the width of vectors, the number of threads, the company of a row in a batch and the version
of a library. So numbers that come from two computations are held to a third, in float64: its distance from one of the
two in their own dtype is what rounding does here, on this machine. Numbers of one computation (same kernel, same
shapes, same order) are the same bits, and are compared as such. Where only the order of a sum differs, ``after`` says
how far that can take it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FACTOR = 4
"""How many times the measured error another computation may be off; errors of one size differ by chance by so much."""
ULPS = 8
"""Units in the last place, of the largest number, that are allowed where the measured error is smaller by chance."""


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference, taken in float64; infinite where only one is infinite, or one is NaN."""
    if actual.shape != exact.shape:
        raise ValueError(f"cannot compare shapes {list(actual.shape)} and {list(exact.shape)}")
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    difference = (actual - exact).abs().masked_fill(actual == exact, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def allowed(plain: Tensor, exact: Tensor, *moved: Tensor, factor: float = FACTOR) -> float:
    """Return how far another computation in the dtype of ``plain`` may be from ``exact``.

    Args:
        plain: a computation of the numbers in the dtype that is used.
        exact: the same computation in float64.
        *moved: as ``exact``, from inputs that were ``nudged``: for few numbers, and for other ways to compute them.
        factor: times the largest error of these.
    """
    found = exact.detach().double().abs()
    found = found[found.isfinite()]
    largest = float(found.max()) if found.numel() else 0.0
    worst = max(error(other, exact) for other in (plain, *moved))
    return factor * worst + ULPS * torch.finfo(plain.dtype).eps * largest


def nudged(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Return ``values`` in float64, each moved up or down by a unit in the last place that it would have in ``dtype``.

    A computation that is as good as can be moves its result by about as much as moving its inputs so does. That tells
    how far computations may be apart that go different ways to the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, values.shape, generator=generator, dtype=torch.float64) - 1
    return values.detach().double() * (1 + torch.finfo(dtype).eps * signs.to(values.device))


def check_close(actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = FACTOR, name: str = "") -> None:
    """Raise AssertionError unless ``actual`` is as near to ``exact`` as another computation may be: see ``allowed``."""
    found, most = error(actual, exact), allowed(plain, exact, factor=factor)
    assert found <= most, f"{name + ': ' if name else ''}error {found:.3g}, allowed {most:.3g}"


def after(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest relative error of a number after so many roundings, each by half a unit in the last place.

    Of a product of vectors of width n it holds for every order of summation and for fused products, with n roundings
    and times the sum of the products' sizes: what Higham (Accuracy and Stability of Numerical Algorithms, 2002, lemma
    3.1) calls gamma.
    """
    unit = torch.finfo(dtype).eps / 2
    return roundings * unit / (1 - roundings * unit)


def check_ranking(ids: Sequence[int], scores: Mapping[int, float], tolerance: float) -> None:
    """Raise AssertionError unless ``ids`` are the best of ``scores``, best first, but for ties within ``tolerance``.

    Args:
        ids: of rows, without repetition.
        scores: id -> score of every row there is, by another computation.
        tolerance: how far the scores of the two computations may be apart, as ``allowed`` says.
    """
    best = sorted(scores.values(), reverse=True)[: len(ids)]
    for place, (row_id, wanted) in enumerate(zip(ids, best, strict=True)):
        assert abs(scores[row_id] - wanted) <= 2 * tolerance, (
            f"row {row_id} is ranked {place} with a score of {scores[row_id]!r}; the best row there has {wanted!r}"
        )
    assert len(set(ids)) == len(ids), "a row comes twice"


T = TypeVar("T")
_DRAWING = frozenset((torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.bernoulli, torch.multinomial))


class InFloat64(TorchFunctionMode):
    """A context in which what a decoder takes to float32 on the way (norms, softmax, the loss) stays in float64.

    Weights and inputs are the caller's to widen: ``model.double()``. What is drawn at random stays as it would be.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING:
            return func(*args, **kwargs)
        if func is Tensor.float:
            return args[0].double()
        if func is torch._grouped_mm:  # noqa: SLF001 - what torch.nn.functional.grouped_mm calls; it has no float64
            return _grouped(args[0], args[1], kwargs["offs"])
        return func(*(_wide(value) for value in args), **{name: _wide(value) for name, value in kwargs.items()})


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply ``[n, k] @ [g, k, m]`` where ``ends`` ``[g]`` says up to which row each of the g matrices is meant."""
    parts = rows.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def _wide(value: T) -> T | torch.dtype:
    return torch.float64 if value is torch.float32 else value
