"""The README.md that is saved with a model."""

from __future__ import annotations

from typing import Any

import mplus
from mplus.hf.auto import MPlusModelConfig


def model_card(model: Any, config: MPlusModelConfig, with_base: bool) -> str:
    """A model card with Hub metadata, sizes and three lines of use."""
    memory, base = model.mplus_config, config.base_model
    added = sum(p.numel() for n, p in model.named_parameters() if n.startswith("mplus.") or ".lora_" in n)
    metadata = ["---", "library_name: mplus", "pipeline_tag: text-generation", "tags: [mplus, long-term-memory]"]
    if base:
        metadata.append(f"base_model: {base}")
    use = '"path/or/repository"' if with_base or base else '"path/or/repository", base="the decoder"'
    return "\n".join(
        [
            *metadata,
            "---",
            "",
            f"# {type(model).__name__} with an M+ memory",
            "",
            f"Memory additions for {base or 'a ' + type(model).__name__}: {added:,} parameters (adapters, begin rows, retriever)"
            + (", with the decoder itself in `base/`." if with_base else "; the decoder is loaded from where it came from."),
            "",
            "| | |",
            "|---|---|",
            f"| mechanism | {memory.mechanism.name}, variant {memory.variant} |",
            f"| read per write | {memory.chunk_tokens} text tokens |",
            f"| written per layer | {memory.memory_tokens_per_chunk} rows |",
            f"| short-term rows per layer | {memory.short_term_tokens:,} |",
            f"| long-term rows per layer | {'no limit' if memory.long_term_tokens is None else format(memory.long_term_tokens, ',')} |",
            f"| retrieved rows per layer | {memory.retrieved_tokens:,} with `{memory.retriever.name}` |",
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
            f"Made with mplus {mplus.__version__}. M+: arXiv 2502.00592.",
            "",
        ]
    )
