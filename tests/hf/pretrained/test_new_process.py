"""What a new process has to import, and what it does with a decoder that another one wrapped: one process for all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, retrofit
from tests.hf.references import TOLERANCE, error, ids, stir

pytestmark = pytest.mark.two_computations

TEXT, CHUNKS = ids(1, 9), ids(1, 6 * CHUNK, seed=1)[0]
SCRIPT = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
import mplus
assert "transformers" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained(folder / "saved")
except (ValueError, KeyError):
    (folder / "refused").touch()
import torch
inputs = torch.load(folder / "inputs.pt")

def remembering(model):
    memory = model.new_memory()
    memory.write(inputs["chunks"])
    with torch.no_grad():
        return model(inputs["text"], memory=memory).logits

torch.save(remembering(torch.load(folder / "model.pt", weights_only=False)), folder / "unpickled.pt")
import mplus.hf
torch.save(remembering(AutoModelForCausalLM.from_pretrained(folder / "saved")), folder / "auto.pt")
"""


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return torch.load(folder / "expected.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the process left."""
    folder = tmp_path_factory.mktemp("process")
    model = stir(retrofit(BY_NAME["llama"]).wrapped)
    model.save_pretrained(folder / "saved", save_base=True)
    torch.save(model, folder / "model.pt")
    torch.save({"text": TEXT, "chunks": CHUNKS}, folder / "inputs.pt")
    memory = model.new_memory()
    memory.write(CHUNKS)
    with torch.no_grad():
        torch.save(model(TEXT, memory=memory).logits, folder / "expected.pt")
    root = Path(mplus.__file__).parent.parent
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True, cwd=root)
    return folder


def test_importing_mplus_alone_registers_nothing(folder: Path) -> None:
    assert (folder / "refused").exists()


def test_importing_mplus_hf_registers_the_auto_classes(folder: Path, expected: torch.Tensor) -> None:
    assert error(torch.load(folder / "auto.pt"), expected) < TOLERANCE


def test_a_saved_model_works_in_a_process_that_never_wrapped_one(folder: Path, expected: torch.Tensor) -> None:
    assert error(torch.load(folder / "unpickled.pt"), expected) < TOLERANCE
