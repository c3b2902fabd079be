"""A reader that chooses anew for every token and gates its memory, as MemLong does, against plain torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

import mplus
from mplus.errors import NotSupported
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.mechanisms import MECHANISMS
from mplus.testing.rounding import InFloat64, allowed, error
from tests.mechanisms.reading.gated_reader import BANK_LAYER, READING, GatedReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CHUNK = 16
TOLD = (
    "Lily found a small key under the blue stone in the garden. Her dog Max barked at the red bird in the big tree. "
    "Mom made a cake with milk and sugar. Tom lost his ball in the lake and he was very sad."
)
ASKED = "She was sad. He had a ball. Her dog Max barked at the red bird in"
BEGUN = "One day, Lily wanted to find the key."
PROMPT = 9


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    MECHANISMS.register("gated", GatedReader)
    yield
    MECHANISMS.unregister("gated")


@functools.cache
def wrapped(dtype: torch.dtype = torch.float32, rank: int | None = None) -> Any:
    sizes = {"chunk_tokens": CHUNK, "min_chunk_tokens": 1, "retrieved_tokens": CHUNK}
    chosen = {"mechanism": {"name": "gated", "min_score": 0, "rerank": 0}, "retriever": {"name": "words", "pairs": 0.0}}
    model = mplus.wrap(load_decoder().to(dtype), {**chosen, "adapters": rank and {"rank": rank}, **sizes})
    model.mplus_engine.mechanism.chunk_retriever.near = 0.0  # the newer goes before its equals only
    with torch.no_grad():
        model.mplus.gates.copy_(torch.tensor([1.5, -1.0, 0.5, 2.0]) + torch.arange(5)[:, None] / 4)
    return model


@functools.cache
def ids(text: str) -> Tensor:
    return load_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def written(model: Any, rows: int = 1) -> mplus.Memory:
    memory = model.new_memory(rows)
    memory.write([ids(TOLD)[0, 5 * row :] for row in range(rows)])
    return memory


@torch.no_grad()
def read(model: Any, text: Tensor, memory: Any, **options: Any) -> Tensor:
    settings = {"query_tokens": PROMPT, "retrieve_every": 1, **options}
    found: Tensor = model(text, memory=memory, **settings).logits
    return found


def best_chunk(chunks: list[list[int]], query: list[int]) -> int:
    """The newest of the best by BM25, of those that do not stand in the query."""
    average = sum(map(len, chunks)) / len(chunks)
    scores = [0.0] * len(chunks)
    for word in set(query):
        among = sum(word in chunk for chunk in chunks)
        rarity = math.log(1 + (len(chunks) - among + 0.5) / (among + 0.5))
        for number, chunk in enumerate(chunks):
            count = Counter(chunk)[word]
            scores[number] += rarity * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(chunk) / average))
    able = [number for number, chunk in enumerate(chunks) if f" {chunk} "[2:-2] not in str(query)]
    return max(able, key=lambda number: (scores[number], number))


@torch.no_grad()
def reference(plain: Any, gates: Tensor, told: Tensor, text: Tensor, prompt: int) -> tuple[Tensor, list[int]]:
    """``[T, V]``: each token is behind the chunk that the text up to it brings back, and earlier ones are as they were.

    Returns which chunk that is, too.
    """
    first = torch.tensor([[plain.config.bos_token_id]])
    chunks = list(told.split(CHUNK, 1))
    inputs: dict[int, Tensor] = {}
    bank_norm = plain.model.layers[BANK_LAYER].input_layernorm
    kept = []
    for chunk in (first, *(torch.cat([first, chunk], 1) for chunk in chunks)):
        hook = bank_norm.register_forward_hook(lambda _, __, output: inputs.update({0: output[0]}))
        plain(chunk)
        hook.remove()
        kept.append(inputs[0][1:] if chunk.shape[1] > 1 else inputs[0])
    told_ids, said = [chunk[0].tolist() for chunk in chunks], text[0].tolist()
    chosen = [best_chunk(told_ids, said[: max(t + 1, prompt)]) for t in range(len(said))]
    hidden = plain.model.embed_tokens(text)[0]
    tokens = len(said)
    for number, layer in enumerate(plain.model.layers):
        own, inside = layer.self_attn, layer.input_layernorm(hidden)
        queries = turned(plain, own.q_proj(inside).view(tokens, 8, 8), torch.arange(tokens))
        keys = turned(plain, own.k_proj(inside).view(tokens, 4, 8), torch.arange(tokens)).repeat_interleave(2, 1)
        values = own.v_proj(inside).view(tokens, 4, 8).repeat_interleave(2, 1)
        share = gates[number].sigmoid().repeat_interleave(2)[:, None]
        rows = []
        for t in range(tokens):
            text_scores = torch.einsum("hd,shd->hs", queries[t], keys[: t + 1]) / math.sqrt(8)
            seen = values[: t + 1]
            if number in READING:
                bank = torch.cat([kept[0], kept[1 + chosen[t]]])
                at = torch.arange(-len(bank), 0)
                attention = plain.model.layers[BANK_LAYER].self_attn
                far = turned(plain, attention.k_proj(bank).view(-1, 4, 8), at).repeat_interleave(2, 1)
                scores = torch.einsum("hd,shd->hs", queries[t], far) / math.sqrt(8)
                text_scores = torch.cat([share * scores, (1 - share) * text_scores], 1)
                seen = torch.cat([attention.v_proj(bank).view(-1, 4, 8).repeat_interleave(2, 1), seen])
            rows.append(torch.einsum("hs,shd->hd", text_scores.softmax(1), seen))
        hidden = hidden + own.o_proj(torch.stack(rows).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return plain.lm_head(plain.model.norm(hidden)), chosen


def turned(plain: Any, rows: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[n, H, D]`` to positions ``[n]``."""
    cos, sin = (table[0, :, None] for table in plain.model.rotary_emb(rows, positions[None]))
    found: Tensor = rows * cos + rotate_half(rows) * sin
    return found


def expected(model: Any, dtype: torch.dtype, text: Tensor, prompt: int = PROMPT) -> tuple[Tensor, list[int]]:
    """The reference with the weights of ``model``, in ``dtype``."""
    plain = load_decoder().to(model.dtype).to(dtype)
    return reference(plain, model.mplus.gates.detach().to(dtype), ids(TOLD), text, prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_token_reads_what_the_text_up_to_it_brings_back(dtype: torch.dtype) -> None:
    model, text = wrapped(dtype), ids(ASKED)
    with InFloat64():
        exact, chosen = expected(model, torch.float64, text)
    assert len(set(chosen)) >= 3
    allow = allowed(expected(model, dtype, text)[0], exact)
    memory = written(model)
    assert error(read(model, text, memory)[0], exact) <= allow
    assert error(read(model, text, memory, retrieve_every=None)[0], exact) > allow
    assert error(read(model, text, None, query_tokens=None, retrieve_every=None)[0], exact) > allow


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_generation_reads_as_a_forward_over_all_of_it(options: dict[str, Any]) -> None:
    model, memory = wrapped(), written(wrapped())
    text = ids(BEGUN)[:, :PROMPT]
    steps: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "memory": memory, "retrieve_every": 1, **options}
    made = model.generate(text, output_scores=True, return_dict_in_generate=True, **steps)
    whole = read(model, made.sequences, memory).log_softmax(-1)
    said = whole[:, PROMPT - 1 : -1].gather(2, made.sequences[:, PROMPT:, None])[0, :, 0]
    if options:  # of the best beam, all its tokens read what they would have read by themselves
        wanted = made.sequences_scores[0] * 14
        assert float((said.sum() - wanted).abs()) < 1e-4
    else:
        scores = torch.stack(made.scores, 1).log_softmax(-1)[0].gather(1, made.sequences[0, PROMPT:, None])[:, 0]
        assert float((said - scores).abs().max()) < 1e-4
    assert len(set(expected(model, torch.float32, made.sequences)[1])) > 1


def test_beams_that_choose_anew_now_and_then_keep_what_is_theirs() -> None:
    model, memory = wrapped(), written(wrapped())
    text = ids(BEGUN)[:, :PROMPT]
    steps: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "memory": memory, "retrieve_every": 3}
    made = model.generate(text, num_beams=4, output_scores=True, return_dict_in_generate=True, **steps)
    whole = read(model, made.sequences, memory, retrieve_every=3).log_softmax(-1)
    said = whole[:, PROMPT - 1 : -1].gather(2, made.sequences[:, PROMPT:, None]).sum()
    assert float((said - made.sequences_scores[0] * 12).abs()) < 1e-4


def test_rows_of_a_batch_are_as_alone_with_padding_on_the_left() -> None:
    model, memory = wrapped(), written(wrapped(), 2)
    text = ids(ASKED)
    padded = torch.cat([text, text.roll(4, 1)])
    padded[1, :4] = 0
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    found = read(model, padded, memory, attention_mask=mask, query_tokens=[PROMPT, PROMPT - 4])
    assert error(found[:1], read(model, text, memory.select([0]))) < 1e-3
    alone = read(model, padded[1:, 4:], memory.select([1]), query_tokens=PROMPT - 4)
    assert error(found[1:, 4:], alone) < 1e-3
    steps: dict[str, Any] = {"memory": memory, "max_new_tokens": 8, "do_sample": False, "retrieve_every": 2}
    made = model.generate(padded, attention_mask=mask, **steps)
    steps["memory"] = memory.select([1])
    assert made[1, text.shape[1] :].tolist() == model.generate(padded[1:, 4:], **steps)[0, text.shape[1] - 4 :].tolist()


def test_a_cache_that_is_copied_cut_or_repeated_goes_on_as_the_text_it_holds() -> None:
    model, memory, text = wrapped(), written(wrapped()), ids(ASKED)
    whole = read(model, text, memory)
    options: dict[str, Any] = {"memory": memory, "retrieve_every": 1}
    with torch.no_grad():
        cache = model(text[:, :PROMPT], query_tokens=PROMPT, **options).past_key_values
        model(text[:, PROMPT:], past_key_values=cache, **options)
        cache.crop(PROMPT + 2 - text.shape[1])
        cache.batch_repeat_interleave(2)
        other = text[:, PROMPT + 2 :].flip(1)
        both = model(torch.cat([text[:, PROMPT + 2 :], other]), past_key_values=cache, **options).logits
        cache.batch_select_indices(torch.tensor([1]))
        further = model(text[:, :1], past_key_values=cache, **options).logits
    assert error(both[:1], whole[:, PROMPT + 2 :]) < 1e-3
    changed = read(model, torch.cat([text[:, : PROMPT + 2], other, text[:, :1]], 1), memory)
    assert error(both[1:], changed[:, PROMPT + 2 : -1]) < 1e-3
    assert error(further, changed[:, -1:]) < 1e-3


def test_gates_of_the_layers_that_read_and_adapters_get_gradients() -> None:
    model, text = wrapped(rank=2), ids(ASKED)
    memory = written(model)
    for options in ({}, {"query_tokens": PROMPT, "retrieve_every": 5}):
        model.zero_grad()
        for name, one in model.named_parameters():
            one.requires_grad_("lora" in name or "gates" in name)
        model.train()
        model(text, labels=text, memory=memory, **options).loss.backward()
        model.eval()
        gates = model.mplus.gates.grad
        assert gates is not None
        assert [layer for layer in range(5) if bool(gates[layer].any())] == list(READING)
        trained = {name for name, one in model.named_parameters() if one.grad is not None and bool(one.grad.any())}
        assert any("lora" in name for name in trained)


def test_guessed_tokens_and_decoders_that_attend_by_themselves_are_refused() -> None:
    model, memory, text = wrapped(), written(wrapped()), ids(ASKED)
    with pytest.raises(NotSupported, match="guessed tokens would retrieve as well"):
        model.generate(text, memory=memory, retrieve_every=1, prompt_lookup_num_tokens=3, max_new_tokens=4)
