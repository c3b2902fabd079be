"""The shape of a decoder: its sizes and abilities, and what its layers receive for the token that begins a text."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mplus.errors import NotSupported
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.model.sizes import known_positions
from mplus.hf.retrofit.copied_layers import DecoderCopies
from mplus.hf.retrofit.discovery import Anatomy
from mplus.hf.retrofit.hooks import Retrofit
from mplus.mechanisms.decoder import DecoderShape

SOME = 4096
"""Token embeddings that are looked at to know how large their numbers are."""


def first_token(decoder: nn.Module) -> int | None:
    """Return BOS, else EOS, as far as the configurations have one: text configurations need not."""
    config = cast("PreTrainedConfig", decoder.config)
    configs = (
        config.get_text_config(decoder=True),
        config,
        getattr(decoder, "generation_config", None),
    )
    for name in ("bos_token_id", "eos_token_id"):
        for one in configs:
            token = getattr(one, name, None)
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int):
                return token
    return None


def decoder_shape(decoder: PreTrainedModel, retrofit: Retrofit) -> DecoderShape:
    """Return the sizes, dtype and begin rows of a decoder that mechanisms build on; runs one pass of a token."""
    anatomy = retrofit.anatomy
    config = decoder.config.get_text_config(decoder=True)
    inputs, embedding = begin_inputs(decoder, anatomy), cast("nn.Embedding", decoder.get_input_embeddings()).weight
    # A row for each layer, of its own: they are trained apart, and an expanded view has the memory of one.
    begin = inputs[0].expand(len(anatomy.specs), -1, -1).clone()
    heads, key_heads, head_size, value_size = _attention_sizes(config, begin.shape[2])
    return DecoderShape(
        layers=len(anatomy.specs),
        depth=len(anatomy.layers),
        width=begin.shape[2],
        embedding_width=embedding.shape[1],
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        value_size=value_size,
        max_positions=known_positions(config),
        vocab_size=embedding.shape[0],
        hybrid=anatomy.hybrid,
        positions="learned" if anatomy.learned_positions else "alibi" if anatomy.alibi else "rotary",
        dtype=begin.dtype,
        device=input_device(decoder),
        begin=begin,
        begin_inputs=torch.stack([inputs[spec.layer_index].to(begin) for spec in anatomy.specs]),
        first_token=first_token(decoder),
        embedding_std=_spread(embedding),
        copies=DecoderCopies(decoder, retrofit),
    )


def _spread(embedding: Tensor) -> float:
    """Return the standard deviation of token embeddings ``[V, w]``, of 4,096 tokens at most; 1 where it is none."""
    if embedding.is_meta:  # weights that are elsewhere until a pass needs them
        return 1.0
    # Spread over the vocabulary, whose first tokens are bytes and special ones, and unlike the others.
    some = embedding.detach()[:: embedding.shape[0] // SOME + 1].float()
    found = float(some.std()) if some.numel() > 1 else 0.0
    return found if 0 < found < float("inf") else 1.0


def _attention_sizes(config: PreTrainedConfig, width: int) -> tuple[int | None, int | None, int | None, int | None]:
    """Return H, Hkv, D and Dv as far as a configuration says one number for all layers."""
    try:
        heads = getattr(config, "num_attention_heads", None)
        size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        size = size or (width // heads if heads else None)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return heads, key_heads, size, getattr(config, "v_head_dim", None) or size
    except RuntimeError:  # transformers gives no number that differs from layer to layer
        return None, None, None, None


@torch.no_grad()
def begin_inputs(decoder: PreTrainedModel, anatomy: Anatomy) -> list[Tensor]:
    """Return ``[1, d]`` for every layer, what it receives for a text of BOS, else EOS, else the mean embedding."""
    embedding = cast("nn.Embedding", decoder.get_input_embeddings())
    token = first_token(decoder)
    if token is not None and 0 <= token < embedding.weight.shape[0]:
        inputs = {"input_ids": torch.tensor([[token]], device=input_device(decoder))}
    else:
        # Without a token to begin with, the mean of all embeddings is as good a start as any.
        every = embedding(torch.arange(embedding.weight.shape[0], device=input_device(decoder)))
        inputs = {"inputs_embeds": every.float().mean(0).to(every)[None, None]}
    seen: list[Tensor] = []
    with ExitStack() as hooked, in_eval_mode(decoder):
        for layer in anatomy.layers:
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            hooked.callback(handle.remove)
        anatomy.decoder(**inputs, use_cache=False)
    if seen[0].dim() != 3:
        raise NotSupported(
            f"{type(decoder).__name__} gives its layers hidden states of shape {list(seen[0].shape)}; "
            "memory rows need [batch, tokens, hidden size]"
        )
    return [hidden[0, :1].clone() for hidden in seen]
