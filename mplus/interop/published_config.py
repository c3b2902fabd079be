"""``config.json`` of a published M+ or MemoryLLM checkpoint, checked and translated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from attrs import define

from mplus.config import PUBLISHED, AdapterConfig, JsonValue, MPlusConfig
from mplus.errors import CheckpointError, ConfigError

RopeDtype = Literal["default", "bfloat16", "float16"] | None
OPEN_FIELDS = (
    "backend",
    "chunk_tokens",
    "eviction",
    "long_term_tokens",
    "memory_positions",
    "min_chunk_tokens",
    "position_span",
    "query_tokens",
    "store",
)
"""Fields of ``MPlusConfig`` that a checkpoint does not decide."""
ALTERING = (
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)
"""LoRA settings that would change what the adapters compute; published checkpoints leave them off."""


@define(frozen=True, kw_only=True)
class PublishedConfig:
    """Settings of the memory in a published checkpoint, from its configuration.

    Attributes:
        kind: "mplus", or "memoryllm" where there is no long-term memory.
        decoder: the whole file as plain data; the decoder's own keys are among it.
        layers, hidden_size: L and d.
        tokens: K, rows per write.
        pool: N, rows of short-term memory per layer.
        retrieved: K0, long-term rows per read; 0 for MemoryLLM.
        drop_per_layer: each layer draws the rows it drops.
        adapters: the LoRA adapters; ``shared`` where there is one for writing and reading.
        merge_every, lifetime, decay: writes between two merges, merges a row lives, and how fast that runs out (M+).
        selector_width, selector_layers: size of the retriever's projectors (M+).
        ltm_initial_size: long-term rows per layer in the file, or None where the file does not say (M+).
    """

    kind: Literal["mplus", "memoryllm"]
    decoder: Mapping[str, JsonValue]
    layers: int
    hidden_size: int
    tokens: int
    pool: int
    retrieved: int = 0
    drop_per_layer: bool
    adapters: AdapterConfig
    merge_every: int = 0
    lifetime: float = 0.0
    decay: float = 0.0
    selector_width: int = 0
    selector_layers: int = 0
    ltm_initial_size: int | None = None

    @staticmethod
    def from_file(path: Path) -> PublishedConfig:
        """Read and check ``config.json``. Raises CheckpointError naming the key, its rule and its value."""
        if not path.is_file():
            raise CheckpointError(
                f"{path} must exist: a published checkpoint is a folder with a config.json and its weights"
            )
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} must be valid JSON: {error}") from error
        if not isinstance(plain, dict):
            raise CheckpointError(f"{path} must be a JSON object, got {plain!r:.40}")
        keys = _Keys(path, plain)
        if "num_ltm_blocks" in plain:
            return _with_ltm(keys)
        return PublishedConfig(kind="memoryllm", drop_per_layer=keys.flag("drop_memory_per_layer"), **_common(keys, 0))

    def memory_config(self, rope: RopeDtype = "default", extra: Mapping[str, JsonValue] | None = None) -> MPlusConfig:
        """Return the configuration to wrap the decoder with.

        Args:
            rope: dtype that rotary frequencies are rounded to, None for no rounding; "default": bfloat16 for M+, whose
                numbers come from rounded frequencies, and None for MemoryLLM.
            extra: values of ``OPEN_FIELDS``.

        Raises:
            ConfigError: ``extra`` names a field that the checkpoint decides, or breaks a rule.
        """
        fixed = sorted((extra or {}).keys() - set(OPEN_FIELDS))
        if fixed:
            raise ConfigError(
                f"{fixed[0]!r} is decided by the checkpoint; fields that are open: {', '.join(OPEN_FIELDS)}"
            )
        with_ltm = self.kind == "mplus"
        mechanism: JsonValue = "memoryllm"
        if with_ltm:
            mechanism = {
                "name": "mplus",
                "merge_every": self.merge_every,
                "lifetime": self.lifetime,
                "decay": self.decay,
            }
        values: dict[str, Any] = {
            "mechanism": mechanism,
            "variant": "published",
            "chunk_tokens": PUBLISHED["chunk_tokens"],
            "memory_tokens_per_chunk": self.tokens,
            "short_term_tokens": self.pool,
            "retrieved_tokens": self.retrieved,
            "long_term_tokens": None if with_ltm else 0,
            "drop_per_layer": self.drop_per_layer,
            "adapters": self.adapters,
            "rope_inv_freq_dtype": ("bfloat16" if with_ltm else None) if rope == "default" else rope,
        }
        if with_ltm:
            values["retriever"] = {
                "name": "linear",
                "width": self.selector_width,
                "layers": self.selector_layers,
                "score": "sigmoid_mean",
            }
        return MPlusConfig.from_dict({**values, **(extra or {})})


class _Keys:
    """Access to the keys of one file, with errors that name them."""

    def __init__(self, path: Path, plain: Mapping[str, JsonValue], prefix: str = "") -> None:
        self.path, self.plain, self.prefix = path, plain, prefix

    def error(self, key: str, rule: str) -> CheckpointError:
        got = f"got {self.plain[key]!r}" if key in self.plain else "which is missing"
        return CheckpointError(f"{self.path}: {self.prefix}{key} must be {rule}, {got}")

    def whole(self, key: str, minimum: int = 1) -> int:
        value = self.plain.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"a whole number of at least {minimum}")
        return value

    def number(self, key: str, minimum: float = 0.0) -> float:
        value = self.plain.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < float("inf"):
            raise self.error(key, f"a number of at least {minimum:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.plain.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def table(self, key: str) -> _Keys:
        value = self.plain.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, "a table")
        return _Keys(self.path, value, f"{key}.")

    def only(self, key: str, wanted: JsonValue, optional: bool = False) -> None:
        if (key in self.plain or not optional) and self.plain.get(key) != wanted:
            raise self.error(key, json.dumps(wanted))


class _Common(TypedDict):
    decoder: Mapping[str, JsonValue]
    layers: int
    hidden_size: int
    tokens: int
    pool: int
    adapters: AdapterConfig


def _common(keys: _Keys, ltm_blocks: int) -> _Common:
    """Return the settings that M+ and MemoryLLM share."""
    keys.only("model_type", "llama")
    for key in ("vocab_size", "intermediate_size", "num_attention_heads"):
        keys.whole(key)
    keys.number("rms_norm_eps")
    if "rope_parameters" not in keys.plain:
        keys.number("rope_theta")
    tokens, blocks = keys.whole("num_tokens"), keys.whole("num_blocks")
    if blocks <= ltm_blocks:
        raise keys.error("num_blocks", f"more than num_ltm_blocks ({ltm_blocks})")
    # Without begin rows the released code lays out memory in another way.
    keys.only("add_bos_embedding", wanted=True)
    keys.only("num_memory_tokens", tokens * blocks, optional=True)
    return {
        "decoder": keys.plain,
        "layers": keys.whole("num_hidden_layers"),
        "hidden_size": keys.whole("hidden_size"),
        "tokens": tokens,
        "pool": tokens * (blocks - ltm_blocks),
        "adapters": _adapters(keys.table("lora_config"), shared=not keys.flag("add_decoder_lora")),
    }


def _with_ltm(keys: _Keys) -> PublishedConfig:
    ltm_blocks = keys.whole("num_ltm_blocks")
    keys.only("update_ltm_mode", "immediate")
    keys.only("map_from_hidden_states", wanted=True, optional=True)
    keys.flag("drop_memory_per_layer")
    common = _common(keys, ltm_blocks)
    selector_layers = keys.whole("num_selector_layers")
    if selector_layers > 2:
        raise keys.error("num_selector_layers", "1 or 2")
    return PublishedConfig(
        kind="mplus",
        retrieved=common["tokens"] * ltm_blocks,
        drop_per_layer=True,  # whatever drop_memory_per_layer says: the released code of M+ does not look at it
        merge_every=keys.whole("update_ltm_frequency"),
        lifetime=keys.number("initial_rf_when_moving_stm_to_ltm"),
        decay=keys.number("decay_frequency"),
        selector_width=keys.whole("selector_hidden_dim"),
        selector_layers=selector_layers,
        ltm_initial_size=keys.whole("ltm_initial_size", 0) if "ltm_initial_size" in keys.plain else None,
        **common,
    )


def _adapters(keys: _Keys, shared: bool) -> AdapterConfig:
    for key in ALTERING:
        if keys.plain.get(key) not in (None, False, "none", {}, []):
            raise keys.error(key, "off: the loader knows plain LoRA only")
    targets = keys.plain.get("target_modules")
    if (
        not isinstance(targets, list)
        or not targets
        or not all(isinstance(name, str) and "." not in name for name in targets)
    ):
        raise keys.error("target_modules", "a list of names of projections")
    dropout = keys.number("lora_dropout")
    if dropout >= 1:
        raise keys.error("lora_dropout", "below 1")
    rank, alpha = keys.whole("r"), keys.number("lora_alpha")
    return AdapterConfig(rank=rank, alpha=alpha, dropout=dropout, target_modules=tuple(targets), shared=shared)
