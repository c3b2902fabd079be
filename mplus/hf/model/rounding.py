"""Measure how far rounding alone moves the results of a decoder, to tell errors and effects from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mplus.hf.retrofit.attention import ModuleCall
from mplus.hf.retrofit.discovery import Anatomy
from mplus.hf.types import Argument

DRAWS = 3
"""Forwards with rounding errors of their own; of what they show the median counts."""
MARGIN = 4.0
"""How many times the measured noise two computations of the same numbers may differ.

The noise is what one unit per layer does. A decoder layer is some 16 roundings in a row, each off by ``1 / sqrt(12)``
of a unit in the mean square, so together by ``sqrt(16 / 12) = 1.15`` units, and by ``1.15 * sqrt(2) = 1.6`` where both
sides are rounded. Over 35 tiny and two trained decoders in three dtypes the largest ratio was 1.6; the smallest of a
computation that is wrong (keys changed behind the cache, positions that wrap around) was 10.
"""
LAYER_MARGIN = 10.0
"""The same for what attention gives in one layer. There the largest ratio was 4, in a trained decoder with heads that
give little; the smallest of a computation that is wrong was 20."""
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Least tolerance: parts of a wide decoder may be narrower than its hidden states (TF32, quantised weights, rotary
frequencies), which no rounding of hidden states shows. Real mistakes are above 1e-2."""
MATMUL_UNITS = {"high": 2.0**-10, "medium": 2.0**-7}
"""Rounding units of float32 matrix products by ``torch.get_float32_matmul_precision``."""


def observe(anatomy: Anatomy, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return ``run()``, the logits ``[B, T, V]`` of a forward, and then the attention outputs of layers with memory."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            found[index] = output[0] if isinstance(output, tuple | list) else output

        return hook

    handles = [spec.attention.register_forward_hook(keep(spec.memory_index)) for spec in anatomy.specs]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    return [logits, *(found[index] for index in sorted(found))]


def token_errors(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Return the mean error of each token by the standard deviation, ``[n, T]``, for n tensors ``[B, T, ...]``."""
    found = []
    for value, true in zip(values, reference, strict=True):
        difference = (value.double() - true.double()).abs() / true.double().std().clamp(min=1e-12)
        found.append(difference.transpose(0, 1).flatten(1).mean(1).cpu())
    return torch.stack(found)


def exceeds(errors: Tensor, noise: Tensor, dtype: torch.dtype) -> bool:
    """Return whether errors ``[n, T]`` are more than rounding: the worst token's, the second worst's and so on.

    Token by token, since rounding can turn a decision (the expert that a token goes to) for a few of them.
    """
    worst = errors.sort(descending=True).values
    margins = torch.tensor([[MARGIN], *[[LAYER_MARGIN]] * (len(noise) - 1)])
    allowed = (margins * noise).clamp(min=FLOOR.get(dtype, 0.0))
    return not bool((worst <= allowed[:, : worst.shape[1]]).all())  # NaN exceeds everything


@torch.no_grad()
def measure_noise(anatomy: Anatomy, run: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """Measure how far rounding alone moves each token of the tensors of ``observe``: ``[n, T]``, descending.

    The decoder is compared with itself where the input of each layer is off by one unit of ``dtype``.
    """
    generator = torch.Generator().manual_seed(0)
    # The largest relative step between neighbours; norms and rotary angles are in float32 always.
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if dtype == torch.float32:
        step = max(step, MATMUL_UNITS.get(torch.get_float32_matmul_precision(), 0.0))

    def rounded(
        module: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        hidden = ModuleCall(args, kwargs).hidden
        signs = torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) * 2 - 1
        moved = hidden * (1 + step * signs)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    plain = observe(anatomy, run)
    draws = []
    for _ in range(DRAWS):
        handles = [layer.register_forward_pre_hook(rounded, with_kwargs=True) for layer in anatomy.layers]
        try:
            moved = observe(anatomy, run)
        finally:
            for handle in handles:
                handle.remove()
        draws.append(token_errors(moved, plain).sort(descending=True).values)
    return torch.stack(draws).median(0).values
