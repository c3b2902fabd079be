"""The rows that stand in front of all memory: what every layer receives for the token that begins a text."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mplus.errors import NotSupported
from mplus.hf.model.modes import in_eval_mode, input_device
from mplus.hf.retrofit.discovery import Anatomy


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


@torch.no_grad()
def begin_rows(decoder: PreTrainedModel, anatomy: Anatomy) -> Tensor:
    """Return ``[L, 1, d]``, what the first layer gets for BOS, else EOS, else the mean embedding, for every layer."""
    embedding = cast("nn.Embedding", decoder.get_input_embeddings())
    token = first_token(decoder)
    if token is not None and 0 <= token < embedding.weight.shape[0]:
        inputs = {"input_ids": torch.tensor([[token]], device=input_device(decoder))}
    else:
        every = embedding(torch.arange(embedding.weight.shape[0], device=input_device(decoder)))
        inputs = {"inputs_embeds": every.float().mean(0).to(every)[None, None]}
    seen: list[Tensor] = []
    handle = anatomy.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        with in_eval_mode(decoder):
            anatomy.decoder(**inputs, use_cache=False)
    finally:
        handle.remove()
    if seen[0].dim() != 3:
        raise NotSupported(
            f"{type(decoder).__name__} gives its layers hidden states of shape {list(seen[0].shape)}; "
            "memory rows need [batch, tokens, hidden size]"
        )
    return seen[0][:1, :1].expand(len(anatomy.specs), -1, -1).reshape(len(anatomy.specs), 1, -1).clone()
