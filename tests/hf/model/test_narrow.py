"""Decoders in bfloat16 and float16: what works is accepted, what is wrong by more than rounding is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import mplus
import mplus.hf
from benchmarks.quality.architectures.decoders import ARCHITECTURES, BY_NAME
from benchmarks.quality.architectures.retrofitted import config_for
from mplus.errors import NotSupported
from mplus.hf.model import rounding
from mplus.hf.model.self_check import self_check
from mplus.hf.pretrained.shipped import RECALL_TINY, STORIES260K
from mplus.hf.retrofit.hooks import AttentionHook, Retrofit
from mplus.hf.retrofit.positions import MemoryPositions
from tests.hf.references import ids

NARROW = (torch.bfloat16, torch.float16)
FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "falcon-new")
"""Rotary, learned positions, capped scores, a router, and attention without a pluggable function."""
SIZES = {"chunk_tokens": 64, "memory_tokens_per_chunk": 8, "short_term_tokens": 32, "retrieved_tokens": 16}

in_narrow = pytest.mark.parametrize("dtype", NARROW, ids=["bfloat16", "float16"])


def stories(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES260K, dtype=dtype).eval()


def remembers(model: Any) -> None:
    memory = model.new_memory()
    memory.write(ids(1, 200)[0])
    with torch.no_grad():
        behind, without = (model(ids(1, 9), memory=one).logits for one in (memory, None))
    assert behind.dtype == memory.dtype == model.dtype
    assert bool(torch.isfinite(behind).all())
    assert not torch.equal(behind, without)


@in_narrow
def test_the_decoder_of_the_readme_is_wrapped_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """Refused before: "memory moves the logits by 0.037 of their standard deviation only"."""
    model = mplus.wrap(stories(dtype), SIZES)
    assert model.mplus_engine.retrofit.technique == "attention"
    assert all(check.passed for check in model.mplus_installed.checks)
    remembers(model)
    model.save_pretrained(tmp_path, save_base=True)
    for load, wanted in ((mplus.from_pretrained, dtype), (AutoModelForCausalLM.from_pretrained, "auto")):
        loaded = load(tmp_path, dtype=wanted)
        assert loaded.dtype == dtype
        remembers(loaded)


@in_narrow
def test_the_trained_decoder_with_memory_is_loaded(dtype: torch.dtype) -> None:
    remembers(mplus.from_pretrained(RECALL_TINY, dtype=dtype))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(a.name, marks=() if a.name in FAMILIES else pytest.mark.nightly)
        for a in ARCHITECTURES
        if a.refused is None
    ],
)
def test_a_decoder_gets_the_technique_that_it_has_in_float32(name: str) -> None:
    architecture = BY_NAME[name]
    chosen = {}
    for dtype in (torch.float32, *NARROW):
        model = mplus.wrap(architecture.build().to(dtype), config_for(architecture))
        retrofit = model.mplus_engine.retrofit
        chosen[dtype] = (retrofit.technique, retrofit.positions, isinstance(model.mplus_engine.projection, str))
        if dtype in NARROW:
            assert chosen[dtype] == chosen[torch.float32], dtype
            remembers(model)


@pytest.mark.parametrize(("name", "found"), [("gpt-neo", "left-padded row = row alone"), ("mpt", "memory acts")])
def test_what_is_refused_in_float32_is_refused(name: str, found: str) -> None:
    with pytest.raises(NotSupported, match=found):
        mplus.wrap(BY_NAME[name].build().to(torch.bfloat16), config_for(BY_NAME[name]))


def test_memory_that_rounding_nearly_hides_is_seen() -> None:
    """Bloom's attention gives its input besides, which is large in a new decoder, and rounded to bfloat16."""
    config = BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)
    model = mplus.wrap(BloomForCausalLM(config).to(torch.bfloat16).eval(), SIZES)
    (found,) = (check for check in model.mplus_installed.checks if check.name == "memory acts")
    assert "about as much as rounding does" in str(found)


# ---------------------------------------------------------------- planted mistakes


@pytest.fixture
def proved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proved before the mistake was planted does not count."""
    monkeypatch.setattr(sys.modules["mplus.hf.model.wrapping"], "self_check", self_check)


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not seen."""
    monkeypatch.setattr(AttentionHook, "_with_memory", lambda self, active, call: None)


def unseen_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not seen by a token that is read alone."""
    true = AttentionHook._with_memory

    def broken(self: Any, active: Any, call: Any) -> Any:
        return None if call.hidden.shape[1] == 1 else true(self, active, call)

    monkeypatch.setattr(AttentionHook, "_with_memory", broken)


def misplaced_behind_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch memory sits three positions off."""
    true = Retrofit.project

    def broken(self: Any, spec: Any, prefix: Any, text_offset: Any, call: Any) -> Any:
        return true(self, spec, prefix, text_offset - (3 if prefix.hidden.shape[0] > 1 else 0), call)

    monkeypatch.setattr(Retrofit, "project", broken)


@pytest.mark.usefixtures("proved_anew")
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (unseen, "memory acts: memory moves the logits by .* only"),
        (unseen_by_steps, "prefill and steps = full forward: relative error"),
        (misplaced_behind_padding, "left-padded row = row alone: relative error"),
    ],
    ids=["unseen", "unseen by steps", "misplaced"],
)
@pytest.mark.parametrize("decoder", ["stories in bfloat16", "llama in float16"])
def test_a_broken_technique_is_refused(mistake: Any, found: str, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stories(torch.bfloat16) if "stories" in decoder else BY_NAME["llama"].build().to(torch.float16)
    mistake(monkeypatch)
    with pytest.raises(NotSupported, match=found) as caught:
        mplus.wrap(model, SIZES)
    assert len(str(caught.value)) < 400
    assert len(caught.value.details) >= 2


@pytest.mark.usefixtures("proved_anew")
@pytest.mark.parametrize("decoder", ["stories in bfloat16", "llama in float16"])
def test_positions_that_are_one_off_are_not_used(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = MemoryPositions.of_rows

    def broken(self: Any, *args: Any) -> Any:
        return true(self, *args) - (0 if self.offset else 1)

    monkeypatch.setattr(MemoryPositions, "of_rows", broken)
    base = stories(torch.bfloat16) if "stories" in decoder else BY_NAME["llama"].build().to(torch.float16)
    model = mplus.wrap(base, SIZES)
    assert model.mplus_engine.retrofit.positions.offset
    assert any("negative positions = offset positions" in reason for reason in model.mplus_installed.rejected)


def test_noise_is_as_large_as_the_dtype_makes_it() -> None:
    model = mplus.wrap(BY_NAME["llama"].build(), SIZES)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        run = lambda: model(input_ids=ids(1, 8)).logits  # noqa: E731
        noise = rounding.measure_noise(model.mplus_engine.retrofit.anatomy, run, dtype)
        found[dtype] = float(noise[0].median()) / torch.finfo(dtype).eps
    assert all(1 < ratio < 16 for ratio in found.values()), found  # three layers amplify a unit a few times


def test_errors_are_compared_token_by_token() -> None:
    noise = torch.tensor([[0.5, 0.01, 0.01]])
    for errors, more in (([0.03, 0.03, 1.9], False), ([0.05, 0.05, 0.05], True), ([0.0, float("nan"), 0.0], True)):
        assert rounding.exceeds(torch.tensor([errors]), noise, torch.bfloat16) is more
    assert not rounding.exceeds(torch.tensor([[9e-4]]), torch.zeros(1, 3), torch.float32)
