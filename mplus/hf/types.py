"""The types of what goes into decoders of transformers and comes out of them, where transformers itself says ``Any``.

Rooms above this one, which do not import transformers, take its classes from here for their annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateOutput
from transformers.utils.generic import ModelOutput

__all__ = [
    "Argument",
    "BaseStreamer",
    "Cache",
    "DecoderOutput",
    "ForwardArguments",
    "Generated",
    "GenerationConfig",
    "LogitsProcessorList",
    "ModelOutput",
    "Output",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "StoppingCriteriaList",
]

Argument: TypeAlias = (
    "bool | int | float | str | torch.dtype | torch.device | Tensor | Cache | nn.Module | PreTrainedConfig"
    " | GenerationConfig | PreTrainedTokenizerBase | BaseStreamer | Callable[..., Tensor | list[int] | bool]"
    " | Sequence[Argument] | Mapping[str, Argument] | None"
)
"""An argument of a method of transformers or PEFT that is handed on as it came."""

Generated: TypeAlias = GenerateOutput | Tensor
"""What ``generate`` returns: ids ``[B, T]`` int64, or with ``return_dict_in_generate`` an output that has them."""

if TYPE_CHECKING:

    class DecoderOutput(ModelOutput):
        """The fields of a decoder's output that are looked at here; a decoder has those that the call asks for.

        Attributes:
            logits: ``[B, T, V]``.
            last_hidden_state: ``[B, T, d]``, of the layers without the head.
            loss: a scalar.
            hidden_states: ``[B, T, d]`` each: the embeddings, and what each layer gives.
            past_key_values: the cache of the text so far.
        """

        logits: Tensor
        last_hidden_state: Tensor
        loss: Tensor | None
        hidden_states: tuple[Tensor, ...] | None
        past_key_values: Cache | None

        def to_tuple(self) -> tuple[Tensor, ...]: ...

else:
    DecoderOutput = ModelOutput  # a decoder's output is of a class of its own, which has these fields

Output: TypeAlias = DecoderOutput | tuple[Tensor, ...]
"""What a forward of a decoder returns; a tuple with ``return_dict=False``."""


class ForwardArguments(TypedDict, total=False):
    """The arguments of a decoder's ``forward`` that are looked at here, by name; a decoder may take others.

    Ids and masks are ``[B, T]`` int64, embeddings ``[B, T, w]``; a mask in another form is one that attention takes.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | Mapping[str, Tensor] | None
    position_ids: Tensor | None
    past_key_values: Cache | None
    cache_params: Cache | None
    state: Sequence[Tensor] | None
    cache_position: Tensor | None
    labels: Tensor | None
    logits_to_keep: int | Tensor
    use_cache: bool | None
    return_dict: bool | None
