"""Sizes that a config leaves open are chosen for the decoder, and sizes that do not fit it are named."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from mplus.config import PUBLISHED
from mplus.errors import ConfigError, MemorySizeWarning
from mplus.hf.model.sizes import Room, resolve
from mplus.hf.pretrained.shipped import load_decoder
from mplus.hf.retrofit.positions import MemoryPositions
from tests.hf.references import ids


def resolved(positions: int | None, layout: MemoryPositions | None = None, **fields: Any) -> mplus.MPlusConfig:
    return resolve(mplus.MPlusConfig(**fields), Room(positions, layout or MemoryPositions(), "X"))


def rows(config: mplus.MPlusConfig) -> int:
    return 1 + config.retrieved_tokens + config.short_term_tokens


def sizes(config: mplus.MPlusConfig) -> list[int]:
    return [getattr(config, name) for name in (*PUBLISHED, "min_chunk_tokens")]


@pytest.mark.parametrize("positions", [None, 25_602, 32_768, 131_072])
def test_published_sizes_where_half_of_the_positions_hold_them(positions: int | None) -> None:
    assert sizes(resolved(positions)) == [512, 256, 10_240, 2_560, 16]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (8192, [163, 81, 3276, 819, 16]),
        (2048, [40, 20, 819, 204, 16]),
        (512, [10, 5, 204, 51, 5]),
        (64, [2, 1, 25, 6, 1]),
        (1, [1, 1, 1, 1, 1]),
    ],
)
def test_smaller_ones_elsewhere(positions: int, expected: list[int]) -> None:
    assert sizes(resolved(positions)) == expected


@given(
    positions=st.integers(16, 40_000),
    chosen=st.sets(st.sampled_from(sorted(PUBLISHED))),
    number=st.integers(1, 3),
)
def test_what_is_chosen_fits_and_what_is_given_stays(positions: int, chosen: set[str], number: int) -> None:
    given_sizes = dict.fromkeys(chosen, number)
    config = resolved(positions, **given_sizes)
    assert {name: getattr(config, name) for name in chosen} == given_sizes
    assert rows(config) <= positions // 2
    assert 1 <= config.memory_tokens_per_chunk <= config.short_term_tokens
    assert 2 * config.min_chunk_tokens <= config.chunk_tokens + 1
    if not chosen & {"short_term_tokens", "retrieved_tokens"} and positions < 25_602:
        assert rows(config) >= positions // 2 - 5, "as much as fits"


def test_some_sizes_are_given() -> None:
    assert sizes(resolved(512, chunk_tokens=128, memory_tokens_per_chunk=16, short_term_tokens=64)) == [
        128,
        16,
        64,
        191,
        16,
    ]
    assert resolved(None, short_term_tokens=64).memory_tokens_per_chunk == 64
    assert resolved(512, memory_tokens_per_chunk=64).chunk_tokens == 128
    assert resolved(512, retrieved_tokens=0).short_term_tokens == 255


def test_compressed_and_constant_positions_hold_more() -> None:
    compressed = resolved(512, MemoryPositions("compressed", 128), memory_positions="compressed", position_span=128)
    assert (compressed.short_term_tokens, compressed.retrieved_tokens) == (10_240, 2_560)
    assert compressed.chunk_tokens == 512 - 128


def test_a_short_chunk_can_be_written() -> None:
    """16 tokens a chunk, and at least 16: only multiples of 16 could be written."""
    model = mplus.wrap(BY_NAME["llama"].build(), {"chunk_tokens": 16}, check=False)
    assert model.mplus_config.min_chunk_tokens == 8
    memory = model.new_memory()
    assert memory.write(ids(1, 120)[0]).chunks == [8]


def test_sizes_are_chosen_said_and_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with caplog.at_level(logging.WARNING, logger="mplus"):
            model = mplus.wrap(load_decoder())
    assert sizes(model.mplus_config) == [10, 5, 204, 51, 5]
    assert "short_term_tokens=204, retrieved_tokens=51" in caplog.text
    assert model.mplus_installed.asked == mplus.MPlusConfig()
    memory = model.new_memory()
    memory.write(ids(1, 100)[0])
    with torch.no_grad():
        model(ids(1, 5), memory=memory)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).memory_config == model.mplus_config
    loaded = mplus.from_pretrained(tmp_path, base=load_decoder())
    assert loaded.mplus_config == model.mplus_config
    assert mplus.wrap(load_decoder(), tmp_path).mplus_config == model.mplus_config
    model.mplus_config.to_json(tmp_path / "memory.json")
    assert mplus.wrap(load_decoder(), str(tmp_path / "memory.json"), check=False).mplus_config == model.mplus_config


@pytest.mark.parametrize("config", [17, "nowhere.json", ["chunk_tokens"]])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="config must be"):
        mplus.wrap(BY_NAME["llama"].build(), config)


def test_sizes_that_do_not_fit_warn_with_the_numbers_and_the_ways_out() -> None:
    given_sizes = {"memory_tokens_per_chunk": 64, "short_term_tokens": 2048, "retrieved_tokens": 512}
    with pytest.warns(MemorySizeWarning, match=r"= 2,561 memory rows .* knows 512 positions") as caught:
        mplus.wrap(load_decoder(), given_sizes, check=False)
    assert caught[0].filename == __file__
    for way in ("retrieved_tokens \\+ short_term_tokens of at most 255", "memory_positions='compressed'"):
        assert caught[0].message.args[0].find(way.replace("\\", "")) > 0
    with pytest.warns(MemorySizeWarning, match=r"a write of chunk_tokens \(600\) .* knows 512 positions"):
        mplus.wrap(load_decoder(), {**dict.fromkeys(given_sizes, 8), "chunk_tokens": 600}, check=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed = {"memory_positions": "compressed", "position_span": 128}
        mplus.wrap(load_decoder(), {**given_sizes, **compressed}, check=False)


def built(model_type: str, **options: Any) -> Any:
    tiny = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model(model_type, **{**tiny, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    return AutoModelForCausalLM.from_config(config)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("decoder", "positions"),
    [
        (lambda: built("llama", max_position_embeddings=512), 512),
        (lambda: built("llama", max_position_embeddings=512, rope_parameters=YARN), 2048),
        (lambda: built("mistral", max_position_embeddings=512, sliding_window=128), 512),
        (lambda: built("mistral", max_position_embeddings=512, sliding_window=None), 512),
        (BY_NAME["llama-dynamic"].build, 32),
        (BY_NAME["gpt2"].build, 256),
        (BY_NAME["bloom"].build, None),
        (BY_NAME["jamba"].build, 256),
    ],
    ids=["llama", "yarn", "window", "no window", "dynamic", "learned", "ALiBi", "hybrid"],
)
def test_how_many_positions_a_decoder_knows(decoder: Any, positions: int | None) -> None:
    assert Room.of(decoder(), MemoryPositions()).positions == positions
