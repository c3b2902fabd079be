"""The page "What mplus puts on your model" names all that is on a wrapped decoder, and nothing that is not."""

from __future__ import annotations

import inspect
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mplus

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "on-your-model.md").read_text(encoding="utf-8")
CONFIG = mplus.MPlusConfig(
    chunk_tokens=16,
    memory_tokens_per_chunk=4,
    short_term_tokens=8,
    retrieved_tokens=3,
    rope_inv_freq_dtype="bfloat16",
    retriever={"name": "linear", "width": 8},
)
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
IDS = torch.arange(5, 70)[None]


def named(section: str) -> set[str]:
    """What stands in backticks in the first column of a section's table."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def what_is_on(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        path: {
            "class": type(module),
            "attributes": set(vars(module)),
            "children": set(module._modules),
            "hooks": [hook for hooks in HOOKS for hook in (vars(module)[hooks] or {}).values()],
            "training": module.training,
            "tensors": {name: (id(one), one.tolist()) for name, one in module._parameters.items() if one is not None},
            "buffers": {name: one.tolist() for name, one in module._buffers.items() if one is not None},
        }
        for path, module in model.named_modules()
    }


def decoder() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(files("mplus") / "data" / "stories260K"))


@pytest.fixture(scope="module")
def used() -> dict[str, Any]:
    """What was on a decoder before it was wrapped, while it was in use, and after it was unwrapped."""
    model = decoder()
    model(IDS)
    found: dict[str, Any] = {"before": what_is_on(model), "implementation": model.config._attn_implementation}
    mplus.wrap(model, CONFIG)
    memory = model.new_memory()
    memory.write(IDS[0], source="numbers")
    with torch.no_grad():
        found["output"] = model(IDS[:, :9], memory=memory, output_sources=True)
        with model.reading(memory):
            model(IDS[:, :9])
        model.generation_config.memory = memory
        model.generate(IDS[:, :9], max_new_tokens=2, do_sample=False)
    found.update(during=what_is_on(model), wrapped_implementation=model.config._attn_implementation)
    mplus.unwrap(model)
    found.update(after=what_is_on(model), model=model)
    return found


def test_modules_attributes_and_children(used: dict[str, Any]) -> None:
    before, during = used["before"], used["during"]
    added = [one["attributes"] - before[path]["attributes"] for path, one in during.items() if path in before]
    assert set().union(*added) == named("Attributes")
    children = [one["children"] - before[path]["children"] for path, one in during.items() if path in before]
    assert set().union(*children) == named("Submodules")
    additions = set(during["mplus"]["tensors"]) | {"retriever", "pool"}
    assert additions == {"begin", "mark", "retriever", "pool"}
    assert additions <= set(re.findall(r"`(\w+)`", PAGE.partition("## Submodules")[2].partition("lora_A")[0]))


def test_weights_stay_as_they_are(used: dict[str, Any]) -> None:
    for path, one in used["before"].items():
        assert used["during"][path]["tensors"] == one["tensors"]
        assert used["during"][path]["training"] == one["training"]


def test_classes(used: dict[str, Any]) -> None:
    changed = {
        one["class"]: used["before"][path]["class"]
        for path, one in used["during"].items()
        if path in used["before"] and one["class"] is not used["before"][path]["class"]
    }
    prefixed = get_peft_model(mplus.wrap(decoder(), CONFIG), PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    plain = type(prefixed)
    changed[type(mplus.wrap(prefixed))] = plain
    for cls, base in changed.items():
        assert (cls.__mplus_base__, cls.__name__) == (base, base.__name__)
    mixed_in = {cls.__mro__[1] for cls in changed}
    assert {cls.__name__ for cls in mixed_in} == named("Classes")
    for cls in changed:
        mixin = cls.__mro__[1]
        listed = next(re.split(r" \| ", line)[2] for line in PAGE.splitlines() if f"| `{mixin.__name__}` |" in line)
        ours = [cls, *(one for one in mixin.__mro__ if one.__module__.startswith("mplus."))]
        methods = {name for one in ours for name, value in vars(one).items() if _is_method(name, value)}
        assert methods == set(re.findall(r"`(\w+)`", listed))
        assert ("pickling" in listed) == ("__reduce_ex__" in vars(cls))
    cache = prefixed.get_prompt(1)
    assert {name for name in vars(cache) if "mplus" in name} == {"_mplus_learned"}
    mplus.unwrap(prefixed)
    assert type(prefixed) is plain
    assert not any("mplus" in name for name in vars(prefixed.get_prompt(1)))


def test_hooks_and_settings(used: dict[str, Any]) -> None:
    hooks = [type(hook) for one in used["during"].values() for hook in one["hooks"] if one["hooks"]]
    ours = {cls.__name__ for cls in hooks if cls.__module__.startswith("mplus.")}
    settings = {"config._attn_implementation", "generation_config.memory"}
    assert ours | settings == named("Hooks and settings")
    assert used["wrapped_implementation"] == f"mplus_{used['implementation']}"


def test_caches_and_outputs(used: dict[str, Any]) -> None:
    output = used["output"]
    cache = output.past_key_values
    assert {name for name in vars(cache) if "mplus" in name} == {"_mplus_reading"}
    layers = {type(layer).__name__ for layer in cache.layers if type(layer).__module__.startswith("mplus.")}
    own = set(output.keys()) - set(used["model"](IDS[:, :9]).keys()) | {"memory_sources"} & set(vars(output))
    assert layers == {"MemoryCacheLayer"}
    assert {"_mplus_reading", "_mplus_learned"} | layers | own == named("Caches and outputs")


def test_context_variables() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "mplus").rglob("*.py")]
    made = {name for text in sources for name in re.findall(r"= ContextVar\(\s*\"(\w+)\"", text)}
    assert len(made) == sum(text.count("= ContextVar(") for text in sources)
    assert made == named("Context variables")


def test_transformers() -> None:
    decoder_ = mplus.wrap(decoder(), CONFIG)
    functions = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "mplus" in name}
    assert functions == {name for name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys() if "mplus" in name}
    changed = {name for name, value in vars(GenerationConfig).items() if _is_ours(value)}
    assert AutoConfig.for_model("mplus").model_type == "mplus"
    assert functions | changed | {"mplus"} == named("In transformers")
    layer = next(module for module in decoder_.modules() if "_mplus_memory_index" in vars(module))
    passed = {name for name in inspect.signature(type(layer).forward).parameters if "mplus" in name}
    attention = inspect.signature(ALL_ATTENTION_FUNCTIONS["mplus_sdpa"]).parameters
    passed |= {name for name in attention if "mplus" in name}
    section = PAGE.partition("## Keywords on their way")[2].partition("\n## ")[0]
    assert passed == set(re.findall(r"`(mplus_\w+)`", section))


def _is_method(name: str, value: Any) -> bool:
    return (inspect.isfunction(value) or isinstance(value, property)) and name != "__reduce_ex__"


def _is_ours(value: Any) -> bool:
    code = getattr(value, "__code__", None)
    where = type(value).__module__ if code is None else inspect.getmodule(code).__name__  # type: ignore[union-attr]
    return where.startswith("mplus.")


def test_nothing_is_left(used: dict[str, Any]) -> None:
    model = used["model"]
    assert used["after"] == used["before"]
    assert model.config._attn_implementation == used["implementation"]
    assert not hasattr(model.generation_config, "memory")
    for module in model.modules():
        assert not [name for name in dir(module) if "mplus" in name]


def test_what_memories_of_text_put_on_it() -> None:
    model = decoder()
    before = what_is_on(model)
    mplus.wrap(model, mplus.MPlusConfig(mechanism="notes"))
    during = what_is_on(model)
    assert during.keys() == before.keys()
    changed = {path for path, one in during.items() if one != before[path]}
    assert changed == {""}
    mixin = during[""]["class"].__mro__[1]
    attributes = during[""]["attributes"] - before[""]["attributes"]
    assert {mixin.__name__, *attributes} == named("For memories of text")
    listed = next(line for line in PAGE.splitlines() if f"| `{mixin.__name__}` |" in line).split("overrides")[1]
    methods = {name for name, value in vars(mixin).items() if _is_method(name, value)} | {"forward"}
    assert methods == set(re.findall(r"`(\w+)`", listed))
    assert "pickling" in listed
    mplus.unwrap(model)
    assert what_is_on(model) == before
