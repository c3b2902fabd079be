"""Greedy answers to prompts, with or without memory, every setting explicit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import flag, whole
from mplus.errors import ConfigError
from mplus.memory.memory import Memory


def _ids(ids: Any) -> tuple[int, ...]:
    return tuple(ids)


@define(frozen=True, kw_only=True)
class Generation:
    """How answers are generated: greedily, always.

    Attributes:
        tokens: generated for each answer.
        eos: end-of-sequence ids; an answer ends before the first of them.
        bos: id in front of prompts that are read without memory; None: none.
        bos_with_memory: put it in front of prompts with memory too, where the begin row stands already.
        batch: prompts at a time. Padding is on the left, and masked.
    """

    tokens: int = field(default=10, validator=whole(1))
    eos: tuple[int, ...] = field(default=(), converter=_ids)
    bos: int | None = field(default=None, validator=whole(0, optional=True))
    bos_with_memory: bool = field(default=False, validator=flag)
    batch: int = field(default=16, validator=whole(1))

    @classmethod
    def of(cls, tokenizer: Any, **settings: Any) -> Generation:
        """Make settings with the ids of ``tokenizer``, but for what ``settings`` say."""
        eos = getattr(tokenizer, "eos_token_id", None)
        known = {"eos": () if eos is None else (eos,), "bos": getattr(tokenizer, "bos_token_id", None)}
        return cls(**{**known, **settings})

    def prompt(self, ids: Sequence[int], memory: bool) -> list[int]:
        """Return ``ids`` with the begin-of-sequence id where that belongs."""
        bos = self.bos if self.bos_with_memory or not memory else None
        return [*ids] if bos is None else [bos, *ids]


@define(frozen=True, eq=False)
class Generated:
    """One answer.

    Attributes:
        text: before stop strings are looked for.
        ids: up to the first end-of-sequence id.
        entropy: of the distribution of the first token, in nats.
        top: probability of the likeliest first token.
        likelihood: mean log-probability of the tokens generated, in nats.
        cache_bytes: bytes of the key/value cache per token of text, this row's share.
    """

    text: str
    ids: tuple[int, ...]
    entropy: float
    top: float
    likelihood: float
    cache_bytes: float


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], generation: Generation, memory: Memory | None = None
) -> list[Generated]:
    """Generate one answer per prompt.

    Args:
        model: a decoder; with ``memory`` a wrapped one.
        tokenizer: turns ids back into text.
        prompts: complete ids of each prompt, none empty.
        generation: the settings.
        memory: one stream per prompt, or None.

    Raises:
        ConfigError: an empty prompt.
    """
    if not all(prompts):
        raise ConfigError("every prompt must have at least one token, one of them has none: see the prompt setting")
    found: list[Generated] = []
    for start in range(0, len(prompts), generation.batch):
        part = prompts[start : start + generation.batch]
        rows = None if memory is None else memory.select(range(start, start + len(part)))
        found += _batch(model, tokenizer, part, generation, rows)
    return found


def _batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], generation: Generation, memory: Memory | None
) -> list[Generated]:
    longest = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    # Any id will do where the mask is 0.
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=generation.tokens,
        # An id that is never generated: where an answer ends is decided afterwards, for each row by itself.
        eos_token_id=model.get_input_embeddings().weight.shape[0],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **({} if memory is None else {"memory": memory}),
    )
    logits = torch.stack(output.logits, 1).float().log_softmax(-1)  # [B, tokens, V]
    made = output.sequences[:, longest:]
    chosen = logits.gather(2, made[:, :, None])[:, :, 0]
    first = logits[:, 0]
    entropy = -(first.exp() * first.clamp(min=-1e30)).sum(-1)
    size = cache_bytes(output.past_key_values) / ids.shape[0] / (longest + generation.tokens - 1)
    found = []
    for row in range(len(prompts)):
        kept = _until(made[row].tolist(), generation.eos)
        found.append(
            Generated(
                text=tokenizer.decode(kept, skip_special_tokens=True),
                ids=tuple(kept),
                entropy=float(entropy[row]),
                top=float(first[row].max().exp()),
                likelihood=float(chosen[row, : max(len(kept), 1)].mean()),
                cache_bytes=size,
            )
        )
    return found


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    places = [place for place, token in enumerate(ids) if token in ends]
    return ids[: places[0]] if places else ids


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the tensors in a key/value cache; 0 where it is not made of layers."""
    layers = getattr(cache, "layers", None) or []
    return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))
