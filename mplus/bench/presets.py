"""The decoders and memories that are measured."""

from __future__ import annotations

import os
from typing import Any

import torch
from attrs import define, evolve

from mplus.errors import ConfigError, NotSupported

SPARE = 1.25
"""Room a measurement needs beyond what ``Preset.nbytes`` counts: what a forward computes, caches, allocator."""


@define(frozen=True, kw_only=True)
class Preset:
    """A Llama with random weights and a memory of random rows. Sizes of memory are rows per layer.

    Attributes:
        layers, hidden_size, intermediate_size, vocab_size, heads, key_heads, head_dim, rope_theta: of the decoder.
        dtype: of weights and rows.
        device: where it is measured unless said otherwise.
        short_term_tokens, retrieved_tokens, long_term_rows, retriever_width, chunk_tokens, memory_tokens_per_chunk:
            of the memory.
        lengths: tokens of the prompts that are read.
        prompt: tokens of the prompt in front of single steps.
        streams: memories written at a time.
        score_rows: numbers of keys that are scored.
        repeats: rounds, unless said otherwise.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    key_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    dtype: str = "float32"
    device: str = "cpu"
    short_term_tokens: int = 10_240
    retrieved_tokens: int = 2_560
    long_term_rows: int = 10_240
    retriever_width: int = 64
    chunk_tokens: int = 512
    memory_tokens_per_chunk: int = 256
    lengths: tuple[int, ...] = (16, 64, 512)
    prompt: int = 16
    streams: int = 4
    score_rows: tuple[int, ...] = (10_000, 150_000)
    repeats: int = 9

    @property
    def prefix_rows(self) -> int:
        """P: the begin row, what is retrieved, and short-term memory."""
        return 1 + min(self.retrieved_tokens, self.long_term_rows) + self.short_term_tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def fields(self) -> dict[str, Any]:
        """Of the configuration of a Llama."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 2 * self.prefix_rows,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }

    @property
    def memory(self) -> dict[str, Any]:
        """Of an ``MPlusConfig``; adapters are left out, since the plain implementations have none."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "min_chunk_tokens": min(16, self.chunk_tokens),
            "memory_tokens_per_chunk": self.memory_tokens_per_chunk,
            "short_term_tokens": self.short_term_tokens,
            "retrieved_tokens": self.retrieved_tokens,
            "long_term_tokens": None,
            "adapters": None,
        }

    def reduced(self) -> Preset:
        """Layers of the same shape, but few, over few rows: for checks of correctness in float64."""
        rows = min(self.short_term_tokens, 192)
        return evolve(
            self,
            layers=min(self.layers, 2),
            vocab_size=min(self.vocab_size, 512),
            short_term_tokens=rows,
            retrieved_tokens=min(self.retrieved_tokens, 32),
            long_term_rows=128,
            memory_tokens_per_chunk=min(self.memory_tokens_per_chunk, rows),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights, rows with their keys (twice: the published way keeps its own), and prefixes as keys."""
        linear = self.hidden_size * self.head_dim * 2 * (self.heads + self.key_heads)
        linear += 3 * self.hidden_size * self.intermediate_size
        rows = self.hidden_size + self.retriever_width
        memory = 2 * self.long_term_rows * rows + 3 * self.short_term_tokens * self.hidden_size
        prefixes = 4 * 2 * self.prefix_rows * self.key_heads * self.head_dim
        numbers = self.layers * (linear + memory + prefixes) + 2 * self.vocab_size * self.hidden_size
        return numbers * self.torch_dtype.itemsize


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="cpu",
            layers=4,
            hidden_size=512,
            intermediate_size=1408,
            vocab_size=8192,
            heads=8,
            key_heads=2,
            head_dim=64,
        ),
        Preset(
            name="llama3-8b",
            layers=32,
            hidden_size=4096,
            intermediate_size=14_336,
            vocab_size=128_256,
            heads=32,
            key_heads=8,
            head_dim=128,
            rope_theta=500_000.0,
            dtype="bfloat16",
            device="cuda",
            long_term_rows=150_000,
            retriever_width=256,
            lengths=(16, 512, 2048),
            streams=8,
            repeats=20,
        ),
        Preset(
            name="tiny",
            layers=2,
            hidden_size=32,
            intermediate_size=64,
            vocab_size=64,
            heads=4,
            key_heads=2,
            head_dim=8,
            short_term_tokens=48,
            retrieved_tokens=16,
            long_term_rows=64,
            retriever_width=8,
            chunk_tokens=16,
            memory_tokens_per_chunk=8,
            lengths=(4, 8),
            prompt=4,
            streams=2,
            score_rows=(64,),
            repeats=2,
        ),
    )
}
SHOWN = ("cpu", "llama3-8b")
"""Presets that are named to people; the other one is for tests."""


def preset(name: str) -> Preset:
    """A preset by name. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(SHOWN)}, got {name!r}")
    return PRESETS[name]


def device_for(chosen: Preset, wanted: str | None) -> torch.device:
    """The device to measure on.

    Raises:
        ConfigError: there is no such device.
        NotSupported: it is not there, or the preset does not fit into its memory.
    """
    try:
        device = torch.device(wanted or chosen.device)
    except RuntimeError as error:
        raise ConfigError(f"device must be one that torch knows, such as cpu or cuda, got {wanted!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        advice = "; --device cpu measures it on the CPU" if wanted is None else ""
        raise NotSupported(f"preset {chosen.name!r} on {device} needs a GPU, and torch sees none{advice}")
    if device.type not in {"cpu", "cuda"}:
        raise NotSupported(f"device must be cpu or cuda, got {device}: times on others are not measured")
    check_room(chosen, device)
    return device


def check_room(chosen: Preset, device: torch.device) -> None:
    """Raise NotSupported when a preset does not fit into what is free on a device."""
    free = free_bytes(device)
    # On a GPU the copy of long-term memory that the published way reads stays on the host.
    copies = chosen.long_term_rows * (chosen.hidden_size + chosen.retriever_width) * chosen.layers
    needed = chosen.nbytes - (copies * chosen.torch_dtype.itemsize if device.type == "cuda" else 0)
    if free is not None and needed * SPARE > free:
        raise NotSupported(
            f"preset {chosen.name!r} with {chosen.long_term_rows:,} long-term rows needs about "
            f"{needed * SPARE / 2**30:.1f} GiB on {device}, of which {free / 2**30:.1f} GiB are free: take "
            "fewer long-term rows"
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on a device, where that can be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
