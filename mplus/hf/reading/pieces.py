"""A text read in pieces, each with what the text before it retrieves: as ``generate(retrieve_every=...)`` reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from attrs import evolve
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mplus.errors import InputError, NotSupported
from mplus.hf.reading.caches import TextSoFar, first_tokens, text_in
from mplus.hf.reading.inputs import ForwardInputs
from mplus.hf.reading.reading import Reading
from mplus.hf.types import DecoderOutput, ForwardArguments

_OF_TEXT = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Arguments with one entry per token, in dimension 1."""
_OF_LOSS = ("labels", "num_items_in_batch", "shift_labels", "ignore_index")
"""Arguments of the loss, which is that of the whole text."""
_OF_ALL = (*_OF_LOSS, "logits_to_keep", "attention_mask", "past_key_values", "cache_position")
"""Further tensors that a text may come with."""


def read_in_pieces(
    model: PreTrainedModel, reading: Reading, inputs: ForwardInputs, read: Callable[[ForwardInputs], DecoderOutput]
) -> DecoderOutput:
    """Return the output of a forward over a text, read piece by piece through a key/value cache.

    Args:
        model: the wrapped decoder.
        reading: with ``retrieve_every``.
        inputs: of the forward.
        read: runs one piece.

    Raises:
        NotSupported: the call asks for what pieces cannot give; the message names all of it.
    """
    named = inputs.named
    refuse(model, named)
    if reading.opened is None:
        configured = reading.mechanism.config.query_tokens
        reading.query_tokens = reading.query_tokens or configured or 1
        reading.context_tokens = reading.query_tokens
    text, mask = inputs.text, inputs.mask
    total = text.shape[1]
    so_far = text_in(inputs.cache)
    starts = piece_starts(reading, text.shape[:2], None if mask is None else mask[:, -total:].bool().cpu(), so_far)
    shared = {name: value for name, value in named.items() if name not in (*_OF_LOSS, "logits_to_keep")}
    shared.update(use_cache=True, return_dict=True)
    per_token = {name: value for name, value in named.items() if name in _OF_TEXT and isinstance(value, Tensor)}
    columns = named.get("cache_position")
    outputs: list[DecoderOutput] = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        piece = dict(shared)
        piece.update({name: tensor[:, start:end] for name, tensor in per_token.items()})
        if mask is not None:
            # It has columns for what is in the cache as well, in front, and ends with this piece.
            piece["attention_mask"] = mask[:, : mask.shape[1] - total + end]
        if columns is not None:
            piece["cache_position"] = columns[start:end]
        if outputs:
            piece["past_key_values"] = outputs[-1]["past_key_values"]
        outputs.append(read(evolve(inputs, named=cast("ForwardArguments", piece))))
        if getattr(outputs[-1], "past_key_values", None) is None:
            raise NotSupported(f"retrieve_every needs a key/value cache, and {type(model).__name__} returned none")
    return _join(model, outputs, named)


def piece_starts(
    reading: Reading, shape: Sequence[int], text: Tensor | None, so_far: TextSoFar | None = None
) -> list[int]:
    """Return the columns at which a piece begins: those in which some row has read ``retrieve_every`` tokens more.

    Args:
        reading: tells how many tokens each row has read since it last retrieved.
        shape: B and T.
        text: ``[B, T]`` bool on the CPU, False at padding; None: no padding.
        so_far: the text in front of this one, where a mechanism reopens.

    Raises:
        InputError: a row would retrieve anew while the context of another one is still being read.
    """
    every = reading.retrieve_every or 1
    if text is None:
        text = torch.ones(*shape, dtype=torch.bool)
    waiting = torch.zeros(shape[0], 1, dtype=torch.int64)
    begun = 0
    if reading.opened is None:
        context = first_tokens(text, reading.context_tokens)
        begun = int(context.any(0).nonzero().max()) + 1
        text = text & ~context
    elif reading.waiting is not None:
        waiting = reading.waiting.sum(1, keepdim=True)
    elif so_far is not None and reading.reopens:
        waiting = so_far.waiting(so_far.tokens)[:, None].cpu()
    due = (text & ((waiting + text.cumsum(1)) % every == 0)).any(0).nonzero().squeeze(1).tolist()
    if due and due[0] < begun:
        raise InputError(
            "with retrieve_every the first query_tokens of all rows must be read before a row retrieves anew, but one "
            f"does so in column {due[0]}, and those of another one end in column {begun - 1}: pad on the left, so that "
            "they end together, or put rows of equal query_tokens into a batch"
        )
    return sorted({0, *due})


def refuse(model: PreTrainedModel, inputs: ForwardArguments) -> None:
    """Raise NotSupported for what a text read in pieces cannot give."""
    reasons = []
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        reasons.append("gradient checkpointing, which keeps no key/value cache from piece to piece")
    config = model.config.get_text_config(decoder=True)
    reasons += [
        f"{name}, which is not one tensor per token"
        for name in ("output_attentions", "output_router_logits")
        if (inputs.get(name) if inputs.get(name) is not None else getattr(config, name, False))
    ]
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        reasons.append("an attention_mask other than [batch, tokens]")
    reasons += [
        f"{name}, which cannot be cut into pieces"
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in (*_OF_TEXT, *_OF_ALL)
    ]
    if reasons:
        raise NotSupported(
            "forward with retrieve_every reads a text in pieces and does not go with " + "; with ".join(reasons)
        )


def _join(model: PreTrainedModel, outputs: Sequence[DecoderOutput], inputs: ForwardArguments) -> DecoderOutput:
    """Join the outputs of all pieces into one of the decoder's type."""
    last = outputs[-1]
    joined: dict[str, Tensor | tuple[Tensor, ...] | Cache | None] = {}
    for name, value in last.items():
        parts = [output[name] for output in outputs]
        if name == "past_key_values":
            joined[name] = None if inputs.get("use_cache") is False else value
        elif name == "hidden_states":
            joined[name] = tuple(torch.cat(layer, 1) for layer in zip(*parts, strict=True))
        elif name in {"logits", "last_hidden_state"}:
            joined[name] = torch.cat(parts, 1)
        else:
            raise NotSupported(
                f"forward with retrieve_every does not know how to join {name!r} of {type(last).__name__} of its pieces"
            )
    kept = inputs.get("logits_to_keep", 0)
    logits = joined.get("logits")
    if isinstance(logits, Tensor):
        # Of 0 tokens it means all, and so does the slice: -0 is 0.
        joined["logits"] = logits[:, slice(-kept, None) if isinstance(kept, int) else kept]
    if inputs.get("labels") is not None:
        given = {name: value for name, value in inputs.items() if name in _OF_LOSS and value is not None}
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        loss = model.loss_function(logits=joined["logits"], vocab_size=vocabulary, **given)
        joined = {"loss": loss, **joined}  # in front, where a tuple of the output has it
    return type(last)(**joined)
