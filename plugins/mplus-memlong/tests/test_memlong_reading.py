"""What a text reads of a MemLong memory: which groups, at which positions, in which layers, with which gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mplus_memlong.state import state_of
from torch import Tensor

import mplus
from mplus.errors import InputError
from mplus.mechanisms.decoder import Text

Ids = Callable[..., Tensor]


def logits(model: Any, ids: Tensor, memory: Any = None, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, memory=memory, **options).logits
    return found


def rotated(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions written out, with tables in float32 as in transformers: ``x`` ``[H, n, D]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * (1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def written_out(
    model: Any, ids: Tensor, bank: Tensor | None, places: Callable[[int], Tensor], start: int, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A Llama with MemLong in layers 1 to 3, written out; ``bank`` ``[M, w]``, or None. Logits; inputs of layer 1."""
    decoder, size, heads, key_heads = model.model, 8, 4, 2
    x = decoder.embed_tokens(ids)
    positions = start + torch.arange(len(ids))
    kept = x
    for number, layer in enumerate(decoder.layers):
        kept = x if number == 1 else kept
        y, attention = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            projection(y).unflatten(-1, (-1, size)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotated(q, positions), rotated(k, positions)
        scores = q @ k.repeat_interleave(heads // key_heads, 0).mT / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        values = v.repeat_interleave(heads // key_heads, 0)
        if bank is not None and number >= 1:
            keys, own = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in bank.chunk(2, -1))
            keys = rotated(keys, places(number - 1))
            memory = q @ keys.repeat_interleave(heads // key_heads, 0).mT / math.sqrt(size)
            if gates is not None:
                share = gates[number - 1].sigmoid()[:, None, None]
                memory, scores = memory * share, scores * (1 - share)
            scores = torch.cat([memory, scores], -1)
            values = torch.cat([own.repeat_interleave(heads // key_heads, 0), values], 1)
        x = x + attention.o_proj((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x)), kept


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("positions", ["zero", "continual", "cumulative"])
def test_it_computes_what_the_paper_says_with_grouped_key_heads(
    wrap: Any, ids: Ids, positions: str, gate: bool
) -> None:
    model = wrap(read_layers=[1, 2, 3], positions=positions, gate=gate)
    gates = None
    if gate:
        gates = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double()
        model.mplus.gate.data.copy_(gates)
    memory, text = model.new_memory(), ids(7, 6)
    memory.write(ids(1), source="one")
    with torch.no_grad():
        _, received = written_out(model, ids(1), None, lambda turn: torch.zeros(8), 0, None)
        y = model.model.layers[1].input_layernorm(received)
        attention = model.model.layers[1].self_attn
        bank = torch.cat([attention.k_proj(y), attention.v_proj(y)], -1)
        places: dict[str, Callable[[int], Tensor]] = {
            "zero": lambda turn: torch.zeros(8),
            "continual": lambda turn: torch.arange(8),
            "cumulative": lambda turn: (turn + 1) * torch.arange(8),
        }
        start = 1 if positions == "zero" else 8
        expected, _ = written_out(model, text, bank, places[positions], start, gates)
    rows = memory.stores[0].gather(0, memory.stores[0].ids(0)).projected
    assert rows is not None
    assert (rows - bank).abs().max() < 1e-12
    assert (logits(model, text[None], memory)[0] - expected).abs().max() < 1e-10


def test_a_group_comes_back_whole_and_the_oldest_first(wrap: Any, ids: Ids) -> None:
    model = wrap(query="text")
    memory = model.new_memory()
    for seed in (1, 2, 3):
        memory.write(ids(seed), source=f"s{seed}")
    [view] = memory.streams.versioned_snapshot()[1]
    mechanism, decoder = model.mplus_engine.mechanism, model.mplus_engine.decoder
    state = state_of(view)
    assert state.group_length.tolist() == [4] * 6
    text = ids(2)[None]
    opened = mechanism.open(decoder, [view], Text(text))
    [chosen] = opened.own.chosen
    query = mechanism.encoder.queries([text[0]], decoder, None)
    scores = state.group_key @ mechanism.encoder.compared(query, state.group_key)[0]
    assert chosen.groups.tolist() == scores.topk(2).indices.sort().values.tolist()
    births = mechanism.retrieved(opened, 3)[0].rows.birth.tolist()
    assert births == [4 * group + place for group in chosen.groups.tolist() for place in range(4)]
    assert mechanism.retrieved(opened, 0) == [None]  # a layer that reads nothing
    with torch.no_grad():
        out = model(text, memory=memory, output_sources=True)
    found = out.memory_sources[0]
    assert [len(layer) for layer in found] == [0, 2, 2, 2]
    assert {one.tokens for one in found[3]} == {4}


def test_no_token_sees_what_a_later_one_chose(wrap: Any, ids: Ids) -> None:
    """In the released code the first token of a text reads what all of the text has chosen."""
    texts = torch.stack([torch.cat([ids(7, 6), ids(seed, 6)]) for seed in range(20, 26)])
    for query, causal in (("before", True), ("text", False)):
        model = wrap(query=query, config={"retrieved_tokens": 4})
        memory = model.new_memory()
        for seed in range(1, 5):
            memory.write(ids(seed), source=f"s{seed}")
        found = logits(model, texts, memory)[:, :6]
        assert ((found - found[:1]).abs().max() < 1e-12) == causal
        found = logits(model, texts, memory, retrieve_every=3)[:, :6]
        assert (found - found[:1]).abs().max() < 1e-12  # what is before each three tokens chooses for them


def test_a_call_says_what_to_ask_with(wrap: Any, ids: Ids) -> None:
    model = wrap(config={"retrieved_tokens": 4})
    memory = model.new_memory()
    for seed in range(1, 5):
        memory.write(ids(seed), source=f"s{seed}")
    text = ids(2, 6)[None]
    with torch.no_grad():
        by_text = model(text, memory=memory, output_sources=True, query_tokens=6).memory_sources[0][3]
        by_query = model(ids(9, 6)[None], memory=memory, output_sources=True, retrieval_query=tuple(text[0].tolist()))
        made = model.generate(
            text, memory=memory, max_new_tokens=1, do_sample=False, output_sources=True, return_dict_in_generate=True,
            pad_token_id=0,
        )  # fmt: skip
        plain = model(text, memory=memory, output_sources=True).memory_sources[0][3]
    assert [one.source for one in by_text] == [one.source for one in by_query.memory_sources[0][3]]
    assert [one.source for one in by_text] == [one.source for one in made.memory_sources[0][3]]
    assert [one.score for one in plain] != [one.score for one in by_text]  # it asked with what was written last


def test_streams_of_unequal_length_are_read_together_as_alone(wrap: Any, ids: Ids) -> None:
    """With a gate, at positions of their own, padded on the left, one of them empty; in the released code it fails."""
    model = wrap(positions="continual", gate=True, query="text")
    model.mplus.gate.data.normal_(generator=torch.Generator().manual_seed(1))
    memory = model.new_memory(3)
    memory.write([ids(1, 3), ids(2), None], source="s")
    text = torch.stack([ids(seed, 6) for seed in (7, 8, 9)])
    mask = torch.ones_like(text)
    text[0, :2], mask[0, :2] = 0, 0
    found = logits(model, text, memory, attention_mask=mask)
    for row in range(3):
        own = text[row, mask[row].bool()][None]
        alone = logits(model, own, memory.select([row]))
        assert (found[row, -own.shape[1] :] - alone[0]).abs().max() < 1e-12
    assert torch.equal(alone, logits(model, own))  # nothing was written to it: bit for bit the decoder


def test_the_published_variant_reads_as_much_as_its_poorest_stream_holds(wrap: Any, ids: Ids) -> None:
    model = wrap(config={"variant": "published"})
    memory = model.new_memory(2)
    memory.write([ids(1, 4), ids(2)], source="s")
    views = memory.streams.versioned_snapshot()[1]
    engine = model.mplus_engine
    opened = engine.mechanism.open(engine.decoder, views, Text(torch.stack([ids(7), ids(8)])))
    assert opened.own.lengths == [4, 4]
    assert memory.stores[0].layout.dtype == torch.bfloat16


def test_it_decodes_with_beams_and_asks_anew_for_every_token(wrap: Any, ids: Ids) -> None:
    model = wrap(config={"retrieved_tokens": 4})
    memory = model.new_memory()
    for seed in range(1, 5):
        memory.write(ids(seed), source=f"s{seed}")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids(7)[None]
    every = model.generate(prompt, memory=memory, retrieve_every=1, **options)
    assert every.shape == (1, 13)
    beams = model.generate(prompt, memory=memory, retrieve_every=1, num_beams=2, **options)
    assert beams.shape == (1, 13)
    with torch.no_grad():  # by hand
        text, cache = prompt, None
        for _ in range(5):
            new = text if cache is None else text[:, -1:]
            asked = {"query_tokens": 8} if cache is None else {"retrieve_every": 1}
            out = model(new, memory=memory, past_key_values=cache, use_cache=True, **asked)
            cache, text = out.past_key_values, torch.cat([text, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, every)


def test_a_decoder_with_learned_positions_keeps_its_text_where_it_is(wrap: Any, ids: Ids) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=97, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=4, num_attention_heads=4,
            ffn_dim=48, max_position_embeddings=16,
        )  # fmt: skip
        decoder = OPTForCausalLM(config).eval()
    model = wrap(decoder, check=True)
    memory, text = model.new_memory(), ids(7, 14)[None]
    memory.write(ids(1), source="s")
    assert not torch.equal(logits(model, text, memory), logits(model, text))  # 14 tokens and 8 rows in 16 positions
    mplus.unwrap(decoder)


def test_reading_embeddings_needs_ids_only_to_ask_with_them(wrap: Any, ids: Ids) -> None:
    model = wrap()
    memory, text = model.new_memory(), ids(7)[None]
    memory.write(ids(1), source="s")
    embedded = model.get_input_embeddings()(text)
    with torch.no_grad():
        found = model(inputs_embeds=embedded, memory=memory).logits
    assert (found - logits(model, text, memory)).abs().max() < 1e-12
    with pytest.raises(InputError, match="needs the ids"):
        model(inputs_embeds=embedded, memory=memory, query_tokens=3)
