"""A decoder whose every attention over memory goes through the interpreted kernel."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import retrofit
from mplus.backends import BACKENDS
from mplus.backends.triton.backend import TritonBackend
from mplus.backends.triton.gather import gather_rotated, reasons_against_gathering
from mplus.hf.retrofit import projection
from tests.hf.references import ids, stir


class Interpreted(TritonBackend):
    """The kernel alone."""

    name = "interpreted-alone"

    def __init__(self):
        super().__init__(interpret=True)


@pytest.fixture(autouse=True)
def _registered():
    BACKENDS.register(Interpreted.name, Interpreted)
    yield
    BACKENDS.unregister(Interpreted.name)


def test_retrieved_rows_are_picked_by_the_kernel(monkeypatch):
    pair = retrofit(BY_NAME["llama"])
    stir(pair.wrapped)
    memory = pair.wrapped.new_memory(memory_rows="projected")
    memory.write(ids(1, 100, seed=5))
    prompt, calls = ids(1, 7, seed=3), []

    def gather(*args):
        calls.append(args)
        gather_rotated(*args, interpret=True)

    with torch.no_grad():
        plain = pair.wrapped(prompt, memory=memory).logits
        reasons = functools.partial(reasons_against_gathering, interpret=True)
        monkeypatch.setattr(projection, "reasons_against_gathering", reasons)
        monkeypatch.setattr(projection, "gather_rotated", gather)
        found = pair.wrapped(prompt, memory=memory.fork()).logits
    assert len(calls) == len(pair.wrapped.mplus_engine.retrofit.anatomy.specs)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


def test_a_decoder_passes_its_self_check_and_reads_padded_prompts():
    """Wrapping checks left-padded against single prompts, which come with masks."""
    kernel, plain = (retrofit(BY_NAME["llama"], backend=name) for name in (Interpreted.name, "reference"))
    for pair in (kernel, plain):
        stir(pair.wrapped)
    prompts, mask = ids(2, 7, seed=3), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    found = []
    for pair in (kernel, plain):
        memory = pair.new_memory(batch_size=2)
        memory.write(ids(2, 36, seed=5))
        with torch.no_grad():
            found.append(pair.wrapped(prompts, attention_mask=mask, memory=memory).logits)
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], atol=2e-5, rtol=1e-4)
