"""Tiny, randomly initialised causal language models of every architecture family the library is tested on.

Two or three layers, a hidden size of 32 to 64, a vocabulary of 101 tokens, float32. Default initialisations leave such
small models almost deaf to their context, which hides errors; the weights are therefore redrawn so that every module
passes on signals of order one (see `_redraw`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Mapping

VOCAB_SIZE = 101
PAD, BOS = 0, 1
WINDOW = 8
"""Width of every sliding window in the table: short enough for prompts of 11 tokens to outgrow it."""

_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
_BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: in records, tables and test ids.
        model_type: the name under which transformers knows the architecture.
        options: arguments of its config class.
        notes: what makes it worth testing.
        positions: how order enters attention: "rope", "learned" (added to the embeddings), "alibi" (bias on the
            scores), "offset" (rope whose frequencies depend on the largest position in the call) or "none".
        sdpa: the eager and the sdpa implementation compute the same function.
        stable_cache: keys cached by earlier steps are the ones a full recomputation would make. False where the
            frequencies change while a sequence grows.
        hybrid: some layers have no attention.
        refused: why no memory can be added; None where it can.
    """

    name: str
    model_type: str
    options: Mapping[str, Any] = field(repr=False)
    notes: str = ""
    positions: str = "rope"
    sdpa: bool = True
    stable_cache: bool = True
    hybrid: bool = False
    refused: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def implementations(self) -> tuple[str, ...]:
        """Attention implementations, the one the oracle needs first."""
        return ("eager", "sdpa") if self.sdpa else ("eager",)

    def build(self, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
        """Build a new model in eval mode; equal seeds give equal weights, whatever the attention implementation.

        Args:
            seed: of the random weights. The global random state is left as it was.
            attn_implementation: "eager" or "sdpa"; None takes sdpa where it computes the same function.
        """
        config = AutoConfig.for_model(self.model_type, **{**_TOKENS, **self.options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation or self.implementations[-1], dtype=torch.float32
            )
            if self.refused is None:
                _redraw(model)
        # Without an end-of-sequence token a generation has the length that was asked for.
        model.generation_config.update(eos_token_id=None, pad_token_id=PAD, bos_token_id=BOS, do_sample=False)
        return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def _redraw(model: PreTrainedModel) -> None:
    """Draw all weights anew: matrices with standard deviation ``1 / sqrt(fan in)``, vectors near their usual value."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        noise = torch.randn(parameter.shape)
        if name.endswith("A_log"):
            continue  # decay rates of state-space layers: their initial values are part of the architecture
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.add_(0.2 * noise)  # norms stay near one (or near zero where one is added), biases near zero
        elif isinstance(owner, nn.Embedding):
            # A tied embedding is the output matrix as well, so it follows the rule for matrices.
            parameter.copy_(noise * (1.5 * parameter.shape[1] ** -0.5 if tied else 1.0))
        elif parameter is model.get_output_embeddings().weight:
            parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
        else:
            fan_in = parameter.shape[0] if isinstance(owner, Conv1D) else parameter.shape[-1]
            parameter.copy_(1.3 * noise * fan_in**-0.5)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "llama", _GROUPED, "the reference family"),
    Architecture("mistral", "mistral", {**_GROUPED, "sliding_window": None}),
    Architecture(
        "mistral-sliding", "mistral", {**_GROUPED, "sliding_window": WINDOW}, "a sliding window in every layer"
    ),
    Architecture("qwen2", "qwen2", _GROUPED, "biases on q, k, v"),
    Architecture("qwen3", "qwen3", {**_GROUPED, "head_dim": 12}, "norm on queries and keys, heads wider than hidden"),
    Architecture(
        "gemma2",
        "gemma2",
        {**_GROUPED, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
        "capped scores, four norms per layer, alternating windows",
        sdpa=False,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        {**_GROUPED, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8},
        "two rotary embeddings, alternating windows",
    ),
    Architecture("phi3", "phi3", {**_GROUPED, "sliding_window": None}, "fused q, k, v"),
    Architecture("phi", "phi", _GROUPED, "partial rotary, attention and MLP in parallel"),
    Architecture(
        "gpt2",
        "gpt2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 256, **_NO_GPT2_DROPOUT},
        "transposed fused q, k, v",
        positions="learned",
    ),
    Architecture(
        "opt",
        "opt",
        {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        "norm before attention",
        positions="learned",
    ),
    Architecture(
        "opt-post-norm",
        "opt",
        {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0, "do_layer_norm_before": False},
        "norm after attention, embeddings narrower than hidden",
        positions="learned",
    ),
    Architecture("gpt-neox", "gpt_neox", _BASE, "fused q, k, v interleaved by head, partial rotary"),
    Architecture("olmo2", "olmo2", _GROUPED, "no norm before attention"),
    Architecture(
        "mixtral",
        "mixtral",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "mixture of experts",
    ),
    Architecture(
        "qwen3-moe",
        "qwen3_moe",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "mixture of experts, norm on queries and keys",
    ),
    Architecture(
        "granite",
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.8,
        },
        "multipliers everywhere",
    ),
    Architecture(
        "cohere2",
        "cohere2",
        {**_GROUPED, **_ALTERNATING, "logit_scale": 1.0},
        "one norm for attention and MLP, no rotation in full layers",
    ),
    Architecture("smollm3", "smollm3", {**_GROUPED, "no_rope_layers": [1, 0, 1]}, "a layer without rotation"),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {
            **_GROUPED,
            **_ALTERNATING,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attention sinks, alternating windows, mixture of experts",
        sdpa=False,
    ),
    Architecture(
        "deepseek-v3",
        "deepseek_v3",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.0,
            "num_mtp_layers": 0,
        },
        "latent attention: keys wider than values",
    ),
    Architecture(
        "stablelm", "stablelm", {**_GROUPED, "partial_rotary_factor": 0.5, "use_qkv_bias": True}, "partial rotary"
    ),
    Architecture(
        "falcon-new",
        "falcon",
        {**_BASE, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 48},
        "separate norms for attention and MLP, attention without a pluggable function",
    ),
    Architecture(
        "falcon-multi-query",
        "falcon",
        {**_BASE, "multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 48},
        "one key/value head, attention without a pluggable function",
    ),
    Architecture(
        "bloom",
        "bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4},
        "attention without a pluggable function",
        positions="alibi",
        sdpa=False,
    ),
    Architecture("diffllama", "diffllama", _GROUPED, "changes keys and values between the cache and attention"),
    Architecture("hunyuan", "hunyuan_v1_dense", {**_GROUPED, "head_dim": 8}, "norm on keys after rotation"),
    Architecture(
        "gptj",
        "gptj",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 256, **_NO_GPT2_DROPOUT},
        "rotates inside the attention module",
        sdpa=False,
    ),
    Architecture(
        "codegen",
        "codegen",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 256, **_NO_GPT2_DROPOUT},
        "rotates inside the attention module, negative positions wrap around",
        sdpa=False,
    ),
    Architecture(
        "phi3-longrope",
        "phi3",
        {
            **_GROUPED,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 16.0,
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        },
        "other frequencies beyond 16 positions",
        positions="offset",
        stable_cache=False,
    ),
    Architecture(
        "llama-dynamic",
        "llama",
        {
            **_GROUPED,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
        "frequencies fall as the sequence grows beyond 16 positions",
        positions="offset",
        stable_cache=False,
    ),
    Architecture(
        "jamba",
        "jamba",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "attention without positions in every second layer",
        positions="none",
        hybrid=True,
    ),
    Architecture(
        "qwen3-next",
        "qwen3_next",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        "gated attention in every second layer",
        hybrid=True,
    ),
    Architecture(
        "mpt",
        "mpt",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
        positions="alibi",
        sdpa=False,
        refused="attention does not see what the cache returns",
    ),
    Architecture(
        "falcon-alibi",
        "falcon",
        {**_BASE, "alibi": True, "new_decoder_architecture": False, "ffn_hidden_size": 48},
        positions="alibi",
        sdpa=False,
        refused="ALiBi",
    ),
    Architecture(
        "gpt-neo",
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 256,
            "window_size": 8,
        },
        positions="learned",
        sdpa=False,
        refused="local layers mask inside the attention module",
    ),
    Architecture(
        "mamba",
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        positions="none",
        sdpa=False,
        refused="no attention",
    ),
    Architecture(
        "rwkv",
        "rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48},
        positions="none",
        sdpa=False,
        refused="no attention",
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
HYBRIDS = tuple(a for a in ARCHITECTURES if a.hybrid)
REFUSED = tuple(a for a in ARCHITECTURES if a.refused is not None)
PURE = tuple(a for a in ARCHITECTURES if not a.hybrid and a.refused is None)
"""Attention in every layer: what `oracle` covers."""
