"""Reasons why the kernels cannot run where some tensors are. Importing this module does not import triton."""

from __future__ import annotations

import functools
import importlib.util

import torch

OLDEST = (8, 0)
"""Compute capability from which on the kernels are compiled in the tests: Ampere."""


def reasons_against(device: torch.device, *, interpret: bool = False) -> list[str]:
    """Return why kernels cannot run on ``device``; empty when they can.

    Args:
        interpret: run on the CPU by Triton's interpreter, which TRITON_INTERPRET=1 turns on before triton is imported.
            For tests: it is slower than anything else.
    """
    if device.type != "cuda" and not interpret:
        return [f"device {device}: the kernels run on NVIDIA GPUs"]
    if not _installed():
        return ["triton is not installed: pip install 'mplus[triton]'"]
    if interpret:
        from mplus.backends.triton.kernels.shared import INTERPRETED

        if not INTERPRETED:
            return ["interpret=True, but triton was imported without TRITON_INTERPRET=1 in the environment"]
        return [] if device.type == "cpu" else [f"device {device}: the interpreter is for tensors on the CPU"]
    return list(_reasons_against_gpu(device.index))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _reasons_against_gpu(index: int | None) -> tuple[str, ...]:
    if torch.version.hip is not None:
        return (f"ROCm {torch.version.hip}: the kernels are compiled and tested for NVIDIA GPUs only",)
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        found, wanted = (".".join(map(str, version)) for version in (capability, OLDEST))
        return (f"compute capability {found}: the kernels need {wanted} or newer",)
    return ()
