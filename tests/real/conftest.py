"""A chat model that people have: the tests run where `mplus get smollm2` was run before; `make test-real` does that."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mplus.hf.pretrained.smollm2 import smollm2_folder


@pytest.fixture(scope="session")
def folder():
    found = smollm2_folder()
    if not found.is_dir():
        pytest.skip("SmolLM2 is not in the cache folder: `mplus get smollm2` brings it, `make test-real` does both")
    return found


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def decoder(folder):
    """The decoder as it comes, never wrapped."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
