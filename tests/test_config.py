"""The configuration says what is wrong with it, and survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, validators
from hypothesis import given
from hypothesis import strategies as st

import mplus
from mplus.config import AdapterConfig, Component, MPlusConfig, structure
from mplus.errors import CheckpointError, ConfigError
from tests.helpers.docstrings import run_examples

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"chunk_tokens": 0}, "chunk_tokens must be a whole number of at least 1, got 0"),
    ({"short_term_tokens": -5}, "short_term_tokens must be a whole number of at least 1, got -5"),
    ({"memory_tokens_per_chunk": 2.0}, "memory_tokens_per_chunk must be a whole number of at least 1, got 2.0"),
    ({"retrieved_tokens": True}, "retrieved_tokens must be a whole number of at least 0, got True"),
    ({"long_term_tokens": -1}, "long_term_tokens must be a whole number of at least 0, or None, got -1"),
    ({"variant": "mine"}, "variant must be one of 'paper', 'published', got 'mine'"),
    ({"drop_per_layer": 1}, "drop_per_layer must be True or False, got 1"),
    (
        {"memory_tokens_per_chunk": 20_000, "short_term_tokens": 10_240},
        "must not exceed short_term_tokens \\(10240\\), got 20000",
    ),
    (
        {"min_chunk_tokens": 600, "chunk_tokens": 512},
        "min_chunk_tokens must not exceed chunk_tokens \\(512\\), got 600",
    ),
    ({"memory_positions": "compressed"}, "position_span must be given exactly when memory_positions is 'compressed'"),
    ({"position_span": 4}, "position_span must be given exactly when memory_positions is 'compressed'"),
    ({"store": 3}, "an implementation must be a name or a table with a 'name' and its options, got 3"),
    ({"store": {"capacity": 3}}, "a table with a 'name'"),
    ({"adapters": {"rank": 0}}, "rank must be a whole number of at least 1, got 0"),
    ({"adapters": {"dropout": 1}}, "dropout must be a number of at least 0 and below 1, got 1"),
    ({"adapters": {"ranks": 2}}, "'ranks' is not a field of AdapterConfig; did you mean 'rank'\\?"),
    ({"retreived_tokens": 5}, "'retreived_tokens' is not a field of MPlusConfig; did you mean 'retrieved_tokens'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[next(iter(fields)) for fields, _ in WRONG])
def test_a_wrong_field_is_named_with_its_rule_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MPlusConfig.from_dict(fields)


configs = st.builds(
    MPlusConfig,
    variant=st.sampled_from(["paper", "published"]),
    chunk_tokens=st.integers(16, 5000),
    memory_tokens_per_chunk=st.integers(1, 50),
    short_term_tokens=st.integers(50, 5000),
    long_term_tokens=st.none() | st.integers(0, 10**7),
    query_tokens=st.none() | st.integers(1, 100),
    retriever=st.sampled_from(["linear", {"name": "linear", "width": 7, "layers": 1}, Component("random")]),
    adapters=st.none() | st.builds(AdapterConfig, rank=st.integers(1, 64), target_modules=st.none() | st.just(["q"])),
)


@given(config=configs)
def test_plain_data_gives_the_same_config_back(config: MPlusConfig) -> None:
    assert MPlusConfig.from_dict(config.to_dict()) == config


def test_json_and_toml_files(tmp_path: Path) -> None:
    config = MPlusConfig(chunk_tokens=64, retriever={"name": "linear", "width": 8}, adapters={"rank": 4})
    config.to_json(tmp_path / "memory.json")
    assert MPlusConfig.from_file(tmp_path / "memory.json") == config
    toml = 'chunk_tokens = 64\n[retriever]\nname = "linear"\nwidth = 8\n[adapters]\nrank = 4\n'
    (tmp_path / "memory.toml").write_text(toml)
    assert MPlusConfig.from_file(tmp_path / "memory.toml") == config
    (tmp_path / "broken.toml").write_text("chunk_tokens =")
    with pytest.raises(ConfigError, match=r"broken\.toml must be valid TOML"):
        MPlusConfig.from_file(tmp_path / "broken.toml")


def test_the_example_of_the_class_does_what_it_says() -> None:
    run_examples(MPlusConfig)


def test_sizes_are_left_open_for_the_decoder() -> None:
    config = mplus.MPlusConfig()
    sizes = ("chunk_tokens", "min_chunk_tokens", "memory_tokens_per_chunk", "short_term_tokens", "retrieved_tokens")
    assert [getattr(config, name) for name in sizes] == [None] * 5
    assert mplus.MPlusConfig.from_dict(config.to_dict()) == config
    assert config.long_term_tokens == 150_000
    assert config.adapters == AdapterConfig(rank=16, alpha=32.0)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"\xff{}", b"a = " + b"[" * 100_000])
def test_files_that_are_too_deep_or_no_text(tmp_path: Path, content: bytes) -> None:
    """Everything that reads somebody's configuration says which file it cannot read."""
    from mplus.hf.pretrained.config import read_config
    from mplus.interop.published_config import PublishedConfig
    from mplus.training.recipe.files import read_recipe

    for name in ("config.json", "config.toml"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            MPlusConfig.from_file(tmp_path / name)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        read_recipe(tmp_path / "config.toml")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        PublishedConfig.from_file(tmp_path / "config.json")


def test_a_rule_of_a_foreign_validator_is_named_with_the_class() -> None:
    @define
    class Options:
        step: int = field(default=1, validator=validators.ge(1))

    with pytest.raises(ConfigError, match=r"^.*Options: 'step' must be >= 1: 0$"):
        structure(Options, {"step": 0})
