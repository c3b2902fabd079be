"""The gates of a run on a GPU, rehearsed with interpreted kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.part import run_part
from benchmarks.gpu.runner import read_lines
from benchmarks.gpu.session import Session

PARTS = ["attention-triton-float32", "attention-triton-float16", "score-kernel", "gather-kernel"]


@pytest.mark.parametrize("part", PARTS)
def test_the_gates_of_our_kernels_open(part, tmp_path):
    session = Session(part, tmp_path / "results.jsonl", torch.device("cpu"), tiny=True, few=True, interpret=True)
    run_part(session)
    found = {line["gate"]: (line["status"], line["reason"]) for line in read_lines(session.file)}
    assert found
    assert set(found.values()) == {("ok", None)}
