"""What is recalled stands in the prompt as if it had been put there by hand, and is not part of what comes back."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import mplus
from mplus.errors import ConfigError, InputError, MechanismError, MemoryMismatchError, NotSupported
from mplus.mechanisms import Recalled
from tests.mechanisms.text.decoders import (
    CAT,
    KEY,
    by_hand,
    continued,
    ids_of,
    logits,
    mamba,
    noted,
    prompt,
    rwkv,
    tokenizer,
    with_notes,
    wrapped,
)

CLOSE = 1e-9
"""Logits of two ways to compute them, in float64."""


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request: pytest.FixtureRequest) -> Any:
    return with_notes() if request.param == "llama" else wrapped(mamba())


class TestForward:
    def test_logits_are_those_of_the_prompt_made_by_hand(self, model: Any) -> None:
        ids, memory = prompt(), noted(model, KEY)
        expected = logits(model, by_hand(f"{KEY}\n", ids))
        found = logits(model, ids, memory)
        assert found.shape[1] == ids.shape[1]
        assert torch.equal(found[:, 1:], expected[:, -(ids.shape[1] - 1) :])
        assert torch.equal(found[:, 0], expected[:, 0])  # BOS, which stands before what is recalled

    def test_nothing_recalled_leaves_the_decoder_as_it_is(self, model: Any) -> None:
        ids = prompt("Hello")
        assert torch.equal(logits(model, ids, noted(model, KEY)), logits(model, ids))

    def test_rows_get_texts_of_different_lengths(self, model: Any) -> None:
        memory = model.new_memory(3, tokenizer=tokenizer())
        memory.write([KEY, None, f"{CAT} {KEY}"], source="all")
        ids = prompt().expand(3, -1)
        found = logits(model, ids, memory)
        for row in range(3):
            alone = logits(model, ids[:1], memory.fork(row))
            assert (found[row] - alone[0]).abs().max() < CLOSE

    def test_padding_on_either_side(self, model: Any) -> None:
        memory, ids = noted(model, KEY), prompt()
        alone = logits(model, ids, memory)
        for left, right in ((4, 0), (0, 3)):
            padded = torch.nn.functional.pad(ids, (left, right), value=0)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right), value=0)
            found = logits(model, padded, memory, attention_mask=mask)[:, left : left + ids.shape[1]]
            assert (found - alone).abs().max() < CLOSE

    def test_the_loss_is_that_of_the_given_tokens(self, model: Any) -> None:
        ids, memory = prompt(), noted(model, KEY)
        labels, whole = ids.clone(), by_hand(f"{KEY}\n", ids)
        labels[:, :3] = -100
        of_whole = torch.full_like(whole, -100)
        of_whole[:, -ids.shape[1] + 3 :] = ids[:, 3:]
        assert torch.equal(model(ids, memory=memory, labels=labels).loss, model(whole, labels=of_whole).loss)

    def test_hidden_states_and_last_logits_are_those_of_the_given_tokens(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        found = model(ids, memory=memory, output_hidden_states=True)
        assert {one.shape[1] for one in found.hidden_states} == {ids.shape[1]}
        assert torch.equal(model(ids, memory=memory, logits_to_keep=2).logits, found.logits[:, -2:])

    def test_a_tuple_and_its_sources(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        assert torch.equal(model(ids, memory=memory, return_dict=False)[0], logits(model, ids, memory))
        with pytest.raises(ConfigError, match="output_sources needs return_dict=True"):
            model(ids, memory=memory, return_dict=False, output_sources=True)

    def test_positions_that_are_given_move_with_the_text(self) -> None:
        model, ids = with_notes(), prompt()
        memory, positions = noted(model, KEY), torch.arange(5, 5 + ids.shape[1])[None]
        whole = by_hand(f"{KEY}\n", ids)
        expected = logits(model, whole, position_ids=torch.arange(5, 5 + whole.shape[1])[None])
        found = logits(model, ids, memory, position_ids=positions)
        assert torch.equal(found[:, 1:], expected[:, -(ids.shape[1] - 1) :])

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_cache_goes_on(self, padded: bool) -> None:
        model, ids = with_notes(), prompt("Where is the key? Lily said it is")
        memory, first = noted(model, KEY), 12 + 3 * padded
        mask = torch.ones_like(ids)
        if padded:
            ids, mask = (torch.nn.functional.pad(one, (3, 0), value=0) for one in (ids, mask))
        whole = logits(model, ids, memory, attention_mask=mask, query_tokens=12)
        with torch.no_grad():
            out = model(ids[:, :first], memory=memory, attention_mask=mask[:, :first], output_sources=True)
            parts = [out.logits]
            assert out.memory_sources != [[[]]]
            for end in range(first + 1, ids.shape[1] + 1):
                step = {"attention_mask": mask[:, :end]} if end % 2 else {}
                out = model(ids[:, end - 1 : end], memory=memory, past_key_values=out.past_key_values, **step)
                parts.append(out.logits)
        assert (torch.cat(parts, 1) - whole)[:, 3 * padded :].abs().max() < CLOSE

    def test_a_cache_of_another_state_is_refused(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        cache = model(ids, memory=memory).past_key_values
        with pytest.raises(MemoryMismatchError, match="past_key_values was made with version"):
            model(ids[:, :1], past_key_values=cache)
        memory.write(CAT)
        with pytest.raises(MemoryMismatchError, match="past_key_values was made with version"):
            model(ids[:, :1], memory=memory, past_key_values=cache)
        assert model(ids[:, :1], memory=memory, past_key_values=cache, reuse_memory_cache=True).logits.shape[1] == 1

    def test_a_cache_of_a_mamba_goes_on(self) -> None:
        model, ids = wrapped(mamba()), prompt("Where is the key? Lily said")
        memory = noted(model, KEY)
        whole = logits(model, ids, memory, query_tokens=12)
        with torch.no_grad():
            out = model(ids[:, :12], memory=memory, use_cache=True)
            parts = [out.logits]
            for place in range(12, ids.shape[1]):
                out = model(ids[:, place : place + 1], memory=memory, cache_params=out.cache_params, use_cache=True)
                parts.append(out.logits)
        assert (torch.cat(parts, 1) - whole).abs().max() < CLOSE
        with pytest.raises(MemoryMismatchError, match="past_key_values was made with version"):
            model(ids[:, :1], cache_params=out.cache_params)

    def test_what_does_not_go_is_refused_by_name(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        with pytest.raises(InputError, match="pass input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids), memory=memory)
        with pytest.raises(NotSupported, match="retrieve_every does not go with the mechanism 'notes'"):
            model(ids, memory=memory, retrieve_every=2)
        with pytest.raises(InputError, match="attention_mask must be"):
            model(ids, memory=memory, attention_mask=torch.ones(1, 3))
        with pytest.raises(NotSupported, match="does not go with token_type_ids of each token"):
            model(ids, memory=memory, token_type_ids=torch.zeros_like(ids))
        without_tokenizer = mplus.Memory(memory.fork().streams)
        with pytest.raises(InputError, match="pass tokenizer="):
            model(ids, memory=without_tokenizer)


class TestGenerate:
    def test_it_is_the_continuation_of_the_prompt_made_by_hand(self, model: Any) -> None:
        ids, memory = prompt(), noted(model, KEY)
        whole = by_hand(f"{KEY}\n", ids)
        expected = continued(model, whole)[:, whole.shape[1] :]
        found = continued(model, ids, memory)
        assert torch.equal(found, torch.cat([ids, expected], 1))

    def test_left_padded_batches_of_streams(self, model: Any) -> None:
        memory = model.new_memory(2, tokenizer=tokenizer())
        memory.write([KEY, f"{CAT} {KEY}"], source="all")
        short, long = ids_of("Where is the key?"), ids_of("Tom and Lily ask: where is the key?")
        filler = len(long) - len(short)
        ids = torch.tensor([[0] * filler + short, long])
        mask = torch.tensor([[0] * filler + [1] * len(short), [1] * len(long)])
        found = continued(model, ids, memory, attention_mask=mask)
        for row, given in enumerate((short, long)):
            alone = continued(model, torch.tensor([given]), memory.fork(row))[0, len(given) :]
            assert torch.equal(found[row, len(long) :][: len(alone)], alone)
        assert torch.equal(continued(model, ids, memory), found)  # transformers takes the padding for padding, too

    def test_beams_and_samples(self) -> None:
        model, ids = with_notes(), prompt()
        memory, whole = noted(model, KEY), by_hand(f"{KEY}\n", ids)
        settings = {"num_beams": 3, "num_return_sequences": 2}
        expected = continued(model, whole, **settings)[:, whole.shape[1] :]
        assert torch.equal(continued(model, ids, memory, **settings)[:, ids.shape[1] :], expected)
        settings = {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True}
        torch.manual_seed(0)
        expected = continued(model, whole, **settings).sequences[:, whole.shape[1] :]
        torch.manual_seed(0)
        assert torch.equal(continued(model, ids, memory, **settings).sequences[:, ids.shape[1] :], expected)

    def test_lengths_count_the_prompt_as_it_was_given(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        settings = {"max_new_tokens": None, "eos_token_id": None}
        assert continued(model, ids, memory, max_length=ids.shape[1] + 3, **settings).shape[1] == ids.shape[1] + 3
        assert continued(model, ids, memory, **settings).shape[1] == continued(model, ids, **settings).shape[1]

    def test_a_streamer_sees_no_recalled_text(self) -> None:
        model, ids = with_notes(), prompt()
        streamer = TextIteratorStreamer(tokenizer())
        found = continued(model, ids, noted(model, KEY), streamer=streamer)
        assert "".join(streamer).strip() == tokenizer().decode(found[0]).strip()

    def test_sources_are_reported_with_their_scores(self) -> None:
        model = with_notes()
        memory = noted(model, KEY, CAT, "Nothing of that kind.")
        settings = {"output_sources": True, "return_dict_in_generate": True}
        [[recalled]] = continued(
            model, prompt("Where is the blue stone, in Lily's house?"), memory, **settings
        ).memory_sources
        assert [(one.source, one.age) for one in recalled] == [("s1", 1), ("s0", 2)]
        assert recalled[0].score < recalled[1].score
        with pytest.raises(ConfigError, match="output_sources needs return_dict_in_generate=True"):
            continued(model, prompt(), memory, output_sources=True)

    def test_a_block_of_reading_and_a_generation_config(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        expected = continued(model, ids, memory)
        with model.reading(memory):
            assert torch.equal(continued(model, ids), expected)
            assert torch.equal(model(ids).logits, logits(model, ids, memory))
        model.generation_config.memory = memory
        try:
            assert torch.equal(continued(model, ids), expected)
        finally:
            del model.generation_config.memory

    def test_what_does_not_go_is_refused_by_name(self) -> None:
        model, ids = with_notes(), prompt()
        memory = noted(model, KEY)
        with pytest.raises(InputError, match="pass input_ids"):
            continued(model, None, memory, inputs_embeds=model.get_input_embeddings()(ids))
        cache = model(ids, memory=memory).past_key_values
        with pytest.raises(NotSupported, match="begins with the whole prompt"):
            continued(model, ids, memory, past_key_values=cache)
        with pytest.raises(NotSupported, match="retrieve_every does not go with the mechanism 'notes'"):
            continued(model, ids, memory, retrieve_every=2)
        with pytest.raises(NotSupported, match="prefill_chunk_size"):
            continued(model, ids, memory, prefill_chunk_size=2)
        with pytest.raises(MemoryMismatchError, match="the batch has 2 rows and the memory 3"):
            continued(model, ids.expand(2, -1), noted(model, KEY, rows=3))


class TestDecodersThatSeePadding:
    def test_prompts_that_get_equally_much_are_read(self) -> None:
        model, ids = wrapped(rwkv()), prompt().expand(2, -1)
        memory = noted(model, KEY)
        whole = by_hand(f"{KEY}\n", ids[:1])
        expected = logits(model, whole)[:, -ids.shape[1] + 1 :]
        assert torch.equal(logits(model, ids[:1], memory)[:, 1:], expected)
        assert logits(model, ids, memory).shape[:2] == ids.shape
        assert continued(model, ids, memory).shape == (2, ids.shape[1] + 8)

    def test_others_are_refused(self) -> None:
        model, ids = wrapped(rwkv()), prompt().expand(2, -1)
        memory = model.new_memory(2, tokenizer=tokenizer())
        memory.write([KEY, CAT], source="all")
        with pytest.raises(NotSupported, match="RwkvForCausalLM sees padding that a mask hides"):
            continued(model, ids, memory)
        with pytest.raises(NotSupported, match="use generate"):
            model(ids[:1], memory=memory.fork(0), state=[torch.zeros(1)])


class TestPlace:
    def chat(self, *contents: str) -> torch.Tensor:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        text = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return torch.tensor([ids_of(text, special=False)])

    def front(self, model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
        """What the decoder sees, before and behind the recalled text."""
        seen: list[str] = []
        base = type(model).__mplus_base__
        forward = base.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(tokenizer().decode(kwargs["input_ids"][0]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(base, "forward", watched)
        logits(model, ids, noted(model, KEY))
        before, _, behind = seen[0].partition(f"{KEY}\n")
        return before, behind

    def test_the_last_user_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = self.chat("Hello!", "Hello, Tom.", "Where is the key?")
        before, behind = self.front(with_notes(place="turn"), ids, monkeypatch)
        assert before.endswith("<|assistant|>\nHello, Tom.\n<|user|>\n")
        assert behind == "Where is the key?\n<|assistant|>\n"

    def test_a_prompt_without_turns_gets_it_behind_bos(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before, behind = self.front(with_notes(place="turn"), prompt(), monkeypatch)
        assert (before.strip(), behind.strip()) == ("<s>", "Where is the key?")

    def test_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before, behind = self.front(with_notes(), self.chat("Where is the key?"), monkeypatch)
        assert before.strip() == "<s>"
        assert behind.strip().startswith("<|user|>\nWhere is the key?")

    def test_only_the_last_turn_asks(self) -> None:
        ids = self.chat("Where is the key?", "Here.", "Hello")
        recalled = with_notes(place="turn")(ids, memory=noted(with_notes(place="turn"), KEY), output_sources=True)
        assert recalled.memory_sources == [[[]]]


class TestPositions:
    def test_what_is_recalled_and_generated_fits_into_the_positions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = with_notes(passages=100, budget_tokens=10_000)
        given = []
        recall = type(model.mplus_engine.mechanism).recall

        def watched(mechanism: Any, entries: Any, text: str, ask: Any, budget: Any) -> Recalled:
            given.append(budget)
            return recall(mechanism, entries, text, ask, budget)

        monkeypatch.setattr(type(model.mplus_engine.mechanism), "recall", watched)
        memory = noted(model, *(f"The key number {number} is under stone {number}." for number in range(60)))
        found = continued(model, prompt(), memory, output_sources=True, return_dict_in_generate=True)
        (budget,) = given
        assert budget.tokens == 512 - prompt().shape[1] - 8
        [[recalled]] = found.memory_sources
        assert 10 < len(recalled) < 60

    def test_a_mechanism_that_recalls_too_much_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = with_notes()
        kind = type(model.mplus_engine.mechanism)
        monkeypatch.setattr(kind, "recall", lambda self, entries, *given: Recalled("stone " * 600, entries[:1]))
        with pytest.raises(MechanismError, match=r"'notes': recall must return at most \d+ tokens"):
            continued(model, prompt(), noted(model, KEY))

    def test_a_prompt_that_fills_the_positions_is_read_alone(self) -> None:
        model = with_notes()
        ids = prompt("the key " * 300)[:, :512]
        assert torch.equal(logits(model, ids, noted(model, KEY)), logits(model, ids))
