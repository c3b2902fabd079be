"""A tokenizer that is given to ``wrap``: of all memories that are given none, and calibrated with at once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

import mplus
from mplus.errors import ConfigError, InputError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.mechanisms.kv.mechanism import KvMechanism

if TYPE_CHECKING:
    from pathlib import Path

KV: dict[str, Any] = {"mechanism": "kv", "chunk_tokens": 32, "retrieved_tokens": 64}
KEY = "The key is under the blue stone in the garden."


@pytest.mark.parametrize("mechanism", ["kv", "notes"])
def test_memories_have_it(tmp_path: Path, mechanism: str) -> None:
    config = KV if mechanism == "kv" else {"mechanism": mechanism}
    model, own = mplus.wrap(load_decoder(), config, tokenizer=load_tokenizer()), load_tokenizer()
    memory = model.new_memory()
    memory.write(KEY, source="key")
    memory.save(tmp_path / "saved")
    with mplus.Memory.open(tmp_path / "live", model) as live:
        live.write(KEY, source="key")
    found = [
        mplus.Memory.load(tmp_path / "saved", model),
        mplus.Memory.open(tmp_path / "live", model, read_only=True),
    ]
    for one in found:
        assert one.text("key").strip() == KEY
        assert one.search("Where is the key?")[0].source == "key"
    assert model.new_memory(tokenizer=own).tokenizer is own, "one that is given goes before it"
    assert copy.deepcopy(model).new_memory().tokenizer is not None
    with pytest.raises(InputError, match="needs a tokenizer"):
        mplus.wrap(mplus.unwrap(model), config).new_memory().write(KEY)


def test_what_it_finds_out_is_found_out_by_wrap() -> None:
    model = mplus.wrap(load_decoder(), KV, tokenizer=load_tokenizer())
    known = dict(model.mplus_engine.mechanism.calibrations_known())
    assert known
    model.new_memory().write(KEY)
    assert model.mplus_engine.mechanism.calibrations_known().keys() == known.keys()


def test_what_is_none_is_refused() -> None:
    decoder = load_decoder()
    with pytest.raises(ConfigError, match="tokenizer must be one of transformers, got str"):
        mplus.wrap(decoder, KV, tokenizer="gpt2")
    assert not hasattr(decoder, "mplus_engine")


def test_a_failure_leaves_the_decoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(KvMechanism, "calibrate", fail)
    decoder = load_decoder()
    with pytest.raises(KeyboardInterrupt):
        mplus.wrap(decoder, KV, tokenizer=load_tokenizer())
    assert not hasattr(decoder, "mplus_engine")
