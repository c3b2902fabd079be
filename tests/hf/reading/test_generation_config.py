"""A memory among the settings of a ``GenerationConfig``: read as it is, never copied and never written."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import mplus
from mplus.errors import ConfigError, MemoryMismatchError, MemoryPickleError, NotSupported
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory import Memory

TEXT = tiny.prompts(2)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a generation config of the test's own."""
    shared = tiny.variant("paper")
    monkeypatch.setattr(shared, "generation_config", copy.deepcopy(shared.generation_config))
    return shared


def written(model: Any, seed: int = 0, **options: Any) -> Memory:
    memory: Memory = model.new_memory(**options)
    memory.write(tiny.ids(150, seed), source=f"text {seed}")
    return memory


@pytest.fixture
def no_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(self: Memory, *args: Any) -> Memory:
        raise AssertionError("the memory was forked")

    for name in ("fork", "select", "to", "__copy__", "__deepcopy__"):
        monkeypatch.setattr(mplus.Memory, name, fork)


@pytest.mark.usefixtures("no_forks")
def test_it_is_read_as_it_is(model: Any) -> None:
    memory = written(model, eviction="lru", memory_rows="projected")
    config = GenerationConfig(memory=memory, **GREEDY)
    assert config.memory is memory
    expected, plain = model.generate(TEXT, memory=memory, **GREEDY), model.generate(TEXT, **GREEDY)
    assert not torch.equal(expected, plain)
    memory.streams.access_logs[0]._layers.clear()
    prepared = model.mplus_engine._prepared[memory]
    assert torch.equal(model.generate(TEXT, generation_config=config), expected)
    assert torch.equal(model.generate(TEXT, config), expected)
    assert len(memory.streams.access_logs[0].layer(0).ids), "reads are noted in the memory itself"
    assert model.mplus_engine._prepared[memory] is prepared
    assert config.memory is memory
    memory.write(tiny.ids(60, 5))
    assert torch.equal(model.generate(TEXT, config), model.generate(TEXT, memory=memory, **GREEDY))


def test_all_our_settings_are_taken_and_arguments_go_first(model: Any) -> None:
    memory, other = written(model), written(model, 1)
    config = GenerationConfig(
        memory=memory, retrieve_every=2, output_sources=True, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    found = model.generate(TEXT, config)
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    expected = model.generate(TEXT, memory=memory, retrieve_every=2, output_sources=True, **options)
    once = model.generate(TEXT, memory=memory, **options)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert not torch.equal(torch.stack(found.logits), torch.stack(once.logits))
    assert found.memory_sources == expected.memory_sources
    assert not hasattr(model.generate(TEXT, config, output_sources=False), "memory_sources")
    found = model.generate(TEXT, config, memory=other, retrieve_every=6)
    assert torch.equal(torch.stack(found.logits), torch.stack(model.generate(TEXT, memory=other, **options).logits))
    assert {one.source for rows in found.memory_sources for layer in rows for one in layer} == {"text 1"}
    config.retrieve_every = 0
    with pytest.raises(ConfigError, match="retrieve_every must be a whole number"):
        model.generate(TEXT, config)
    config.retrieve_every, config.num_beams = 2, 2
    with pytest.raises(NotSupported, match="num_beams"):
        model.generate(TEXT, config)


@pytest.mark.usefixtures("no_forks")
def test_that_of_the_decoder_is_read_where_the_call_names_none(model: Any) -> None:
    memory, other = written(model), written(model, 1)
    plain = model.generate(TEXT, **GREEDY)
    model.generation_config.memory = memory
    expected = model.generate(TEXT, memory=memory, **GREEDY)
    assert torch.equal(model.generate(TEXT, **GREEDY), expected)
    assert torch.equal(model.generate(TEXT, GenerationConfig(**GREEDY)), expected)
    from_call = model.generate(TEXT, GenerationConfig(memory=other, **GREEDY))
    assert torch.equal(from_call, model.generate(TEXT, memory=other, **GREEDY))
    with pytest.raises(NotSupported, match="generate_batch"):
        model.generate_batch([[5, 6]])
    model.generation_config.memory = None
    assert torch.equal(model.generate(TEXT, **GREEDY), plain)
    with pytest.raises(NotSupported, match="generate_batch"):
        model.generate_batch([[5, 6]], GenerationConfig(memory=memory))


def test_a_draft_by_the_decoder_itself_reads_what_the_generation_reads(model: Any) -> None:
    memory = written(model)
    expected = model.generate(TEXT[:1], memory=memory, **GREEDY)
    model.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    model.generation_config.memory = memory
    assert torch.equal(model.generate(TEXT[:1], assistant_early_exit=2, **GREEDY), expected)


@pytest.mark.usefixtures("no_forks")
def test_it_is_never_written(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = written(model)
    config, without = GenerationConfig(memory=memory, **GREEDY), GenerationConfig(**GREEDY)
    for made in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string(use_diff=False))):
        assert "memory" not in made
        assert made["max_new_tokens"] == 6
    assert "memory" not in repr(config)
    assert repr(config) == repr(without)
    assert config == without
    assert hash(config) == hash(without)
    config.validate(strict=True)
    config.save_pretrained(tmp_path)
    assert not hasattr(GenerationConfig.from_pretrained(tmp_path), "memory")
    assert GenerationConfig.from_dict(vars(config)).memory is memory
    model.generation_config.memory, model.generation_config.retrieve_every = memory, 4
    model.save_pretrained(tmp_path / "saved", save_base=True)
    for path in tmp_path.rglob("*.json"):
        assert '"memory"' not in path.read_text(encoding="utf-8"), path
    with pytest.raises(MemoryPickleError):
        pickle.dumps(config)


def test_copies_of_a_config_refer_to_the_same_memory(model: Any) -> None:
    memory = written(model)
    config = GenerationConfig(memory=memory, **GREEDY)
    assert copy.deepcopy(config).memory is copy.copy(config).memory is memory
    twin = copy.deepcopy(config)
    del twin.memory
    assert not hasattr(twin, "memory")
    with pytest.raises(AttributeError):
        del twin.memory
    assert config.memory is memory


def test_values_that_are_no_memory_stay_what_they_were(model: Any, tmp_path: Path) -> None:
    config = GenerationConfig(memory={"somebody": "else's"}, **GREEDY)
    assert config.to_dict()["memory"] == {"somebody": "else's"}
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).memory == {"somebody": "else's"}
    with pytest.raises(MemoryMismatchError, match=r"memory must be an mplus\.Memory, got dict"):
        model.generate(TEXT, config)


def test_a_copied_decoder_has_a_memory_of_its_own(model: Any) -> None:
    memory = written(model)
    model.generation_config.memory = memory
    expected = model.generate(TEXT, **GREEDY)
    twin = copy.deepcopy(model)
    assert twin.generation_config.memory is not memory
    assert twin.generation_config.memory.engine is twin.mplus_engine
    assert torch.equal(twin.generate(TEXT, **GREEDY), expected)
    twin.generation_config.memory.write(tiny.ids(90, 7))
    assert torch.equal(model.generate(TEXT, **GREEDY), expected)


def test_decoders_without_memory() -> None:
    """Unwrapped, or never wrapped: they know no such setting, and pass it over as they pass over others."""
    model = tiny.build()
    memory = written(model)
    config = GenerationConfig(memory=memory, **GREEDY)
    other = tiny.variant("memoryllm")
    with pytest.raises(MemoryMismatchError, match="another model"):
        other.generate(TEXT, config)
    model.generation_config.memory = memory
    mplus.unwrap(model)
    assert not hasattr(model.generation_config, "memory")
    assert torch.equal(model.generate(TEXT, config), model.generate(TEXT, **GREEDY))


def test_a_peft_model_around_the_decoder() -> None:
    inner = tiny.BY_NAME["llama"].build()
    outer = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))
    mplus.wrap(outer, mplus.MPlusConfig.from_dict(tiny.SIZES), check=False)
    memory = written(outer.get_base_model())
    expected = outer.generate(input_ids=TEXT, memory=memory, **GREEDY)
    found = outer.generate(input_ids=TEXT, generation_config=GenerationConfig(memory=memory, **GREEDY))
    assert torch.equal(found, expected)
    outer.generation_config.memory = memory
    assert torch.equal(outer.generate(input_ids=TEXT, **GREEDY), expected)


@pytest.mark.usefixtures("no_forks")
def test_a_pipeline() -> None:
    name = str(files("mplus") / "data" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    sizes = {"chunk_tokens": 32, "memory_tokens_per_chunk": 4, "short_term_tokens": 12, "retrieved_tokens": 6}
    model = mplus.wrap(AutoModelForCausalLM.from_pretrained(name).eval(), mplus.MPlusConfig(**sizes), check=False)
    memory = model.new_memory(tokenizer=tokenizer, eviction="lru")
    memory.write("Once upon a time a girl named Lily found a red stone in the garden. " * 8)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts, options = ["Lily was", "One day a small dog", "The stone"], {"max_new_tokens": 8, "do_sample": False}
    expected = write(texts, batch_size=2, memory=memory, **options)
    memory.streams.access_logs[0]._layers.clear()
    assert write(texts, batch_size=2, generation_config=GenerationConfig(memory=memory, **options)) == expected
    assert len(memory.streams.access_logs[0].layer(0).ids), "reads are noted in the memory itself"
