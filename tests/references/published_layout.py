"""Checkpoints in the layout of the published M+ and MemoryLLM models, tiny and random."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LAYERS, WIDTH, INNER, VOCABULARY = 3, 32, 56, 97
K, POOL_BLOCKS, LTM_BLOCKS = 4, 4, 2
TARGETS = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"}


def config(kind: str, *, decoder_lora: bool = True, selector_layers: int = 2, ltm_rows: int = 20) -> dict[str, Any]:
    """``config.json``, with keys of the training code that mean nothing here among it."""
    blocks = POOL_BLOCKS + (LTM_BLOCKS if kind == "mplus" else 0)
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.2",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "max_length": 512,
        "num_tokens": K,
        "num_blocks": blocks,
        "num_memory_tokens": K * blocks,
        "add_bos_embedding": True,
        "add_decoder_lora": decoder_lora,
        "drop_memory_per_layer": kind == "mplus",
        "lora_config": {
            "inference_mode": False,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "r": 2,
            "target_modules": sorted(TARGETS),
        },
    }
    if kind == "memoryllm":
        return common
    return {
        **common,
        "num_ltm_blocks": LTM_BLOCKS,
        "update_ltm_mode": "immediate",
        "update_ltm_frequency": 3,
        "initial_rf_when_moving_stm_to_ltm": 10,
        "decay_frequency": 1,
        "ltm_initial_size": ltm_rows,
        "selector_hidden_dim": 8,
        "num_selector_layers": selector_layers,
        "map_from_hidden_states": True,
        "put_cached_dropped_memory_on_cpu": True,
        "wrap_memory": False,
    }


def state_dict(plain: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names; nothing is left at a neutral value."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    rank, kv = plain["lora_config"]["r"], WIDTH * 2 // 4
    adapters = ["default", "decoder_adapter"] if plain["add_decoder_lora"] else ["default"]
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (kv, WIDTH),
        "self_attn.v_proj": (kv, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    pool = K * (plain["num_blocks"] - plain.get("num_ltm_blocks", 0))
    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, WIDTH),
        "model.norm.weight": 1 + normal(WIDTH, scale=0.2),
        "lm_head.weight": normal(VOCABULARY, WIDTH, scale=0.2),
        "memory": normal(LAYERS, pool, WIDTH),
        "bos_embedding": normal(LAYERS, 1, WIDTH),
        "new_memory_positional_emb": normal(1, 1, WIDTH, scale=0.5),
    }
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{path}.{norm}.weight"] = 1 + normal(WIDTH, scale=0.2)
        for name, (out, into) in shapes.items():
            adapted = name.rpartition(".")[2] in TARGETS
            tensors[f"{path}.{name}.{'base_layer.' if adapted else ''}weight"] = normal(out, into, scale=into**-0.5)
            for adapter in adapters if adapted else ():
                tensors[f"{path}.{name}.lora_A.{adapter}.weight"] = normal(rank, into, scale=into**-0.5)
                tensors[f"{path}.{name}.lora_B.{adapter}.weight"] = normal(out, rank, scale=0.3)
        if "num_ltm_blocks" in plain:
            tensors.update(_long_term(plain, layer, normal))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if "num_ltm_blocks" not in plain:
        tensors["initialized"] = torch.ones((), dtype=torch.uint8)
    return tensors


def _long_term(plain: dict[str, Any], layer: int, normal: Any) -> dict[str, Tensor]:
    """Retriever and long-term memory of a layer. Keys are no projections of the rows; ages repeat."""
    r, rows = plain["selector_hidden_dim"], plain["ltm_initial_size"]
    tensors = {}
    for projector in ("query_proj", "key_proj", "encoder_query_proj"):
        path = f"model.layers.{layer}.self_attn.{projector}"
        if plain["num_selector_layers"] == 1:
            tensors[f"{path}.weight"] = normal(r, WIDTH, scale=WIDTH**-0.5)
        else:
            tensors[f"{path}.0.weight"] = normal(2 * r, WIDTH, scale=WIDTH**-0.5)
            tensors[f"{path}.2.weight"] = normal(r, 2 * r, scale=r**-0.5)
    tensors[f"ltm.{layer}"] = normal(rows, WIDTH)
    tensors[f"ltm_keys.{layer}"] = normal(rows, r)
    tensors[f"ltm_ages.{layer}"] = (normal(rows).abs() * 4).floor() + 3
    tensors[f"ltm_recall_frequencies.{layer}"] = (normal(rows).abs() * 4).floor()
    return tensors


def write_folder(folder: Path, plain: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write ``config.json`` and the weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
