"""A decoder whose every attention over memory goes through the interpreted kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mplus.backends import BACKENDS
from mplus.backends.triton.backend import TritonBackend
from tests.architectures import BY_NAME
from tests.hf.references import ids, stir
from tests.retrofitted import retrofit


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
