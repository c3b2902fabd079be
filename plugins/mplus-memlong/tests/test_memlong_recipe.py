"""The recipe of the package trains what it says, and nothing of the bank."""

from __future__ import annotations

import torch
from mplus_memlong import MemLongMechanism

from mplus.hf.decoders.train_model import choose_trained
from mplus.training import train


def test_the_recipe_trains_adapters_above_the_memory_layers_inputs() -> None:
    """Every stage runs; layers below the bank are frozen, and the bank has no graph."""
    done = train("memlong-tiny", dry_run=True, progress=False)
    assert isinstance(done.model.mplus_engine.mechanism, MemLongMechanism)
    trained = choose_trained(done.model, "adapters")
    assert trained
    assert all(".layers.1." in name for name in trained)
    read = [name for name in trained if ".read." in name and "lora_B" in name]
    assert any(bool(trained[name].abs().sum() > 0) for name in read)
    write = [name for name in trained if ".write." in name and "lora_B" in name]
    assert torch.equal(torch.cat([trained[name].flatten() for name in write]).abs().sum(), torch.tensor(0.0))
