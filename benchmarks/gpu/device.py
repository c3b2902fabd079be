"""The device of a run: what it is, how much of it is free, and whether it computes at all."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.packages import commit
from mplus.environment import run_info

if TYPE_CHECKING:
    from benchmarks.gpu.session import Session

OPTIONAL = ("faiss", "flash_attn", "pytest", "hypothesis", "bitsandbytes")


def describe(session: Session) -> None:
    """Write the line that says where everything else of this run comes from."""
    facts = {**run_info(), **commit(), "cuda": torch.version.cuda, "rehearsal": session.device.type != "cuda"}
    facts["optional"] = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    if session.device.type == "cuda":
        about = torch.cuda.get_device_properties(session.device)
        free, total = torch.cuda.mem_get_info(session.device)
        facts |= {"device": about.name, "capability": f"{about.major}.{about.minor}", "free_bytes": free}
        facts |= {"total_bytes": total, "processors": about.multi_processor_count}
    session.write("device", **facts)
    with session.gate("products") as gate:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
        exact = left.double() @ right.double()
        gate.close(left.to(session.device) @ right.to(session.device), left @ right, exact)
