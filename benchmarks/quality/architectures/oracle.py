"""What a memory has to do to a language model, computed the slow way with the unmodified model.

The sequence gets one placeholder per memory row in front of its text. Before every decoder layer, the placeholders are
overwritten with the memory of that layer, so that the model's own code computes keys, values, positions and scores.
What the layer makes of the memory rows is discarded: the next layer overwrites them again. All of the memory passes
through all of the layer; this is the reference for everything faster.

Works for decoders with attention in every layer; one sequence at a time; gradients flow. Shapes: ``T`` text tokens,
``P`` memory rows, ``d`` the hidden size, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PrefixFn = Callable[[int, Tensor], Tensor]
"""Makes the memory ``[P, d]`` of a layer from its index and the text ``[1, T, d]`` its attention receives."""

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_LEARNED_POSITIONS = ("gpt2", "opt")


def read(model: PreTrainedModel, ids: Tensor, memory: Sequence[Tensor], place: Tensor | None = None) -> Tensor:
    """Logits ``[1, T, V]`` of ``ids`` ``[1, T]`` with ``memory[l]`` ``[P_l, d]`` in front of the text in layer ``l``.

    The memory ends right before the text in every layer, also where the layers have unequally many rows. ``place``
    ``[P]``: positions of the memory rows, for text at 0, 1, ...; by default they are all different, in order.
    """
    rows = max(len(m) for m in memory)
    return _run(model, ids, rows, lambda layer, _: memory[layer], place=place)[0]


def read_with_retrieval(model: PreTrainedModel, ids: Tensor, prefix_fn: PrefixFn, rows: int) -> Tensor:
    """Like `read`, with the memory of each layer made when its text is known.

    Args:
        model: in eager attention.
        ids: ``[1, T]``.
        prefix_fn: called once per layer, in order, with the text rows after the norm in front of the attention.
        rows: the largest number of rows that ``prefix_fn`` returns.
    """
    return _run(model, ids, rows, lambda layer, attention_input: prefix_fn(layer, attention_input()))[0]


def write(
    model: PreTrainedModel,
    ids: Tensor,
    begin: Sequence[Tensor],
    context: Sequence[Tensor],
    *,
    mark: Tensor,
    k: int,
) -> list[Tensor]:
    """The rows that the chunk ``ids`` ``[1, n]`` leaves in memory: one tensor ``[min(k, c + n), d]`` per layer.

    Layer ``l`` runs over ``[begin[l]; context[l]; text]`` with ``mark`` ``[d]`` added to the last ``k`` rows, ``begin``
    excepted, and its outputs at those rows are the new memory. A chunk shorter than ``k`` thereby draws in the end of
    the context; these rows are transformed by the layer, so a sliding window applies among them and the text, while all
    earlier rows are seen by all of them.

    Args:
        model: in eager attention.
        ids: ``[1, n]``.
        begin: ``[1, d]`` per layer.
        context: ``[c, d]`` per layer, equally many in all, oldest first.
        mark: ``[d]``.
        k: rows to write per chunk.
    """
    rows = len(begin[0]) + len(context[0])
    new = min(k, len(context[0]) + ids.shape[1])
    _, outputs = _run(
        model,
        ids,
        rows,
        lambda layer, _: torch.cat([begin[layer], context[layer]]),
        transformed=max(0, new - ids.shape[1]),
        mark=mark,
        marked=new,
    )
    return [output[0, -new:] for output in outputs]


def generate_greedy(model: PreTrainedModel, ids: Tensor, memory: Sequence[Tensor], steps: int) -> Tensor:
    """``ids`` ``[1, T]`` continued by ``steps`` most likely tokens, each from a full `read`: ``[1, T + steps]``."""
    for _ in range(steps):
        ids = torch.cat([ids, read(model, ids, memory)[:, -1:].argmax(-1)], dim=1)
    return ids


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers.

    Raises:
        ValueError: a layer has no attention; such models are outside what the oracle covers.
    """
    count = model.config.num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    for layer in stack:
        _attention_of(layer)
    return stack


def _run(
    model: PreTrainedModel,
    ids: Tensor,
    rows: int,
    memory: Callable[[int, Callable[[], Tensor]], Tensor],
    *,
    transformed: int = 0,
    mark: Tensor | None = None,
    marked: int = 0,
    place: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run ``rows`` placeholders and the text; return the logits of the text and all layers' outputs ``[1, P + T, d]``.

    Args:
        memory: called with the layer's index and a function that computes its attention input; gives up to ``rows``
            rows, which take the last placeholders.
        transformed: how many of the last placeholders take part like text.
        mark: added to the last ``marked`` rows of every layer's input.
        place: positions of the placeholders, relative to the text.
    """
    if model.config._attn_implementation != "eager":  # noqa: SLF001 - transformers says it nowhere else
        raise ValueError("the oracle rewrites attention masks, which needs a model with attn_implementation='eager'")
    outputs: list[Tensor] = []

    def before(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = signature(layer.forward).bind(*args, **kwargs)
        hidden = call.arguments["hidden_states"]
        given = memory(index, lambda: _attention_input(layer, call)[:, rows:])
        unused = rows - len(given)
        hidden = torch.cat([hidden[:, :unused], given[None], hidden[:, rows:]], dim=1)
        if mark is not None:
            hidden = torch.cat([hidden[:, :-marked], hidden[:, -marked:] + mark], dim=1)
        call.arguments["hidden_states"] = hidden
        call.arguments["attention_mask"] = _show(call.arguments["attention_mask"], unused, rows - transformed)
        return call.args, call.kwargs

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    _forget_longest_sequence(model, ids)
    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_pre_hook(partial(before, index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        text = model.get_input_embeddings()(ids)
        embeddings = torch.cat([text.new_zeros(1, rows, text.shape[-1]), text], dim=1)
        positions = torch.arange(embeddings.shape[1])[None]
        if place is not None:
            positions = torch.cat([place, torch.arange(ids.shape[1])])[None]
        if model.config.model_type in _LEARNED_POSITIONS:
            # A position embedding is part of the text's hidden states: memory in front must not change it.
            positions = (positions - rows).clamp(min=0)
        # Bloom takes no positions, it counts the ones of the mask.
        extra = {"position_ids": positions} if "position_ids" in signature(model.forward).parameters else {}
        # The mask keeps transformers from reading the repeated positions as several packed sequences.
        ones = torch.ones_like(positions)
        logits = model(inputs_embeds=embeddings, attention_mask=ones, use_cache=False, **extra).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[:, rows:], outputs


def _show(mask: Tensor, unused: int, seen: int) -> Tensor:
    """Let all rows from ``seen`` on see the rows ``unused .. seen - 1``, sliding window or not, and none before."""
    if mask.dim() != 4 or not mask.is_floating_point():
        raise ValueError(
            f"expected an additive mask [1, 1, P + T, P + T] at every layer, got {mask.dtype} {mask.shape}"
        )
    mask = mask.clone()
    mask[:, :, seen:, unused:seen] = 0
    mask[:, :, seen:, :unused] = torch.finfo(mask.dtype).min
    return mask


class _AttentionReachedError(Exception):
    """Carries what an attention module was called with out of its layer."""


def _attention_input(layer: nn.Module, call: BoundArguments) -> Tensor:
    """The hidden states that the attention of ``layer`` receives when the layer is called with ``call``."""
    attention = _attention_of(layer)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _AttentionReachedError(signature(attention.forward).bind(*args, **kwargs).arguments["hidden_states"])

    handle = attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        layer.forward(*call.args, **call.kwargs)
    except _AttentionReachedError as reached:
        return reached.args[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()
    raise ValueError(f"{type(layer).__name__} did not call its attention")


def _attention_of(layer: nn.Module) -> nn.Module:
    found = [module for name, module in layer.named_children() if name in _ATTENTION_NAMES]
    if len(found) != 1:
        raise ValueError(f"{type(layer).__name__} has {len(found)} attention modules, the oracle needs exactly one")
    return found[0]


@torch.no_grad()
def _forget_longest_sequence(model: PreTrainedModel, ids: Tensor) -> None:
    """Dynamically scaled rotary embeddings remember the longest sequence of the past; a short one resets them."""
    model(input_ids=ids[:, :1], use_cache=False)
