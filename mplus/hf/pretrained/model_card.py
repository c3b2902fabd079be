"""The README.md that is saved with a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mplus
from mplus.hf.adapters.lora import is_addition
from mplus.hf.model.installed import WrappedModel
from mplus.hf.pretrained.config import MPlusModelConfig


def model_card(
    model: WrappedModel, config: MPlusModelConfig, with_base: bool, tags: Sequence[str] | None = None
) -> str:
    """Return a model card with Hub metadata, sizes and three lines of use."""
    name, base = type(model).__name__, config.base_model
    added = sum(parameter.numel() for key, parameter in model.named_parameters() if is_addition(key))
    labels = json.dumps(["mplus", "long-term-memory", *(tags or ())])  # JSON is YAML
    metadata = ["---", "library_name: mplus", "pipeline_tag: text-generation", f"tags: {labels}"]
    if base and not Path(base).exists():  # the Hub wants a repository here
        metadata.append(f"base_model: {base}")
    where = "with the decoder itself in `base/`" if with_base else "the decoder is loaded from where it came from"
    use = '"path/or/repository"' if with_base or base else '"path/or/repository", base="the decoder"'
    elsewhere = "" if with_base else " Where it has been moved since, pass `base=` with its place."
    return "\n".join(
        [
            *metadata,
            "---",
            "",
            f"# {name} with an M+ memory",
            "",
            f"Memory additions for {base or 'a ' + name}: {added:,} parameters; {where}.{elsewhere}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {value} |" for label, value in _sizes(model).items()),
            "",
            "```python",
            "import mplus",
            "",
            f"model = mplus.from_pretrained({use})",
            "memory = model.new_memory(tokenizer=tokenizer)",
            'memory.write("text to remember")',
            "model.generate(**inputs, memory=memory)",
            "```",
            "",
            "`AutoModelForCausalLM` and `pipeline` load it too, after `import mplus.hf`: that registers the model type",
            "`mplus`, which transformers does not know by itself.",
            "",
            f"Made with mplus {mplus.__version__}. M+: arXiv 2502.00592.",
            "",
        ]
    )


def _sizes(model: WrappedModel) -> dict[str, str]:
    config = model.mplus_config
    sizes = {
        "mechanism": f"{config.mechanism.name}, variant {config.variant}",
        "read per write": f"{config.chunk_tokens:,} text tokens",
        "written per layer": f"{config.memory_tokens_per_chunk:,} rows",
    }
    mechanism = model.mplus_engine.mechanism
    if "short_term_tokens" in mechanism.sizes:
        sizes["short-term rows per layer"] = f"{config.short_term_tokens:,}"
    if mechanism.long_term:
        limit, how = config.long_term_tokens, f" with `{config.retriever.name}`" if mechanism.uses_retriever else ""
        sizes["long-term rows per layer"] = "no limit" if limit is None else f"{limit:,}"
        sizes["retrieved rows per layer"] = f"{config.retrieved_tokens:,}{how}"
    return sizes
