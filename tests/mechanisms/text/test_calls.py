"""Calls that a decoder makes of its memory while it generates: answered, taken back, counted; asking the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TextStreamer

from mplus.errors import InputError, MechanismError, NotSupported
from mplus.hf.text.decoding import Trie
from mplus.hf.text.encoding import encoded
from mplus.mechanisms import MECHANISMS, Recalled
from mplus.testing.mechanisms import TextMechanismConformance
from tests.mechanisms.text.decoders import KEY, ids_of, mamba, noted, prompt, tokenizer, with_notes, wrapped
from tests.mechanisms.text.phonebook import Script, Triples

if TYPE_CHECKING:
    from collections.abc import Iterator

END = 2
LIST = "Ada|office|room 12\nBen|office|room 3"


class TestTriples(TextMechanismConformance):
    implementation = Triples

    def text(self, seed: int) -> str:
        return f"{super().text(seed).split()[0]}|office|room {seed}"


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    MECHANISMS.register("triples", Triples)
    yield wrapped(None if request.param == "llama" else mamba(), "triples")
    MECHANISMS.unregister("triples")


def said(model: Any, text: str, memory: Any, **options: Any) -> tuple[str, str, Any]:
    """What comes back behind the prompt, and what the decoder saw at the end, when it says ``text``; the output."""
    script, ids = Script([*encoded(tokenizer(), text, inside=True), END], END), prompt("Where is Ada?")
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    out = model.generate(ids, memory=memory, logits_processor=[script], output_sources=True, **settings)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    found = tokenizer().decode(out.sequences[0, ids.shape[1] :])
    return found, tokenizer().decode(script.seen[-1]), out


class TestAnswers:
    def test_an_answer_goes_behind_the_call_and_neither_comes_back(self, model: Any) -> None:
        found, seen, out = said(model, " She is [find Ada|office] there.", noted(model, LIST))
        assert found == "She is  there.</s>"
        assert seen.endswith("She is [find Ada|office] room 12. there.")
        assert [[[one.source for one in layer] for layer in row] for row in out.memory_sources] == [[["s0"]]]

    def test_several_calls(self, model: Any) -> None:
        found, seen, out = said(model, "[find Ada|office][find Ben|office] both.", noted(model, LIST))
        assert found == "both.</s>"
        assert "[find Ada|office] room 12.[find Ben|office] room 3. both." in seen
        assert len(out.memory_sources[0][0]) == 2

    @pytest.mark.parametrize(
        "call",
        ["[find Ada|phone]", "[find Ada]", "[find [find Ada|office]", "[find ]"],
        ids=["none", "short", "nested", "empty"],
    )
    def test_a_call_without_answer_is_taken_back(self, model: Any, call: str) -> None:
        found, seen, out = said(model, f" She is {call} there.", noted(model, LIST))
        assert found.split() == ["She", "is", "there.</s>"]
        assert "[find" not in seen
        assert out.memory_sources == [[[]]]

    def test_an_unfinished_call_is_taken_back(self, model: Any) -> None:
        long = "x" * (2 * Triples.call_tokens)
        found, seen, _ = said(model, f" She is [find {long}", noted(model, LIST), max_new_tokens=10)
        assert found.startswith("She is")
        assert "[find" not in found
        assert "[find" not in seen

    def test_the_text_ends_where_it_ends_in_a_call(self, model: Any) -> None:
        found, _, _ = said(model, " She is [find Ada", noted(model, LIST))
        assert found.split() == ["She", "is", "</s>"]

    def test_a_token_of_the_mark_is_not_generated_again_at_once(self, model: Any) -> None:
        """Without a script: where the decoder would open the same call for ever, it goes on with something else."""

        class Opens:
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                scores = scores.clone()
                scores[:, ids_of("[", special=False)[-1]] = 1e4
                return scores

        out = model.generate(
            prompt(),
            memory=noted(model, LIST),
            logits_processor=[Opens()],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] > prompt().shape[1]

    def test_calls_are_counted(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Triples, "most_calls", 2)
        found, seen, out = said(model, "1[find Ada|office]2[find Ada|office]3[find Ada|office]4", noted(model, LIST))
        assert found == "123"
        assert len(out.memory_sources[0][0]) == 2
        assert seen.count("[find Ada|office] room 12.") == 2

    def test_tokens_of_calls_are_not_counted(self, model: Any) -> None:
        found, _, out = said(model, "ab[find Ada|office]cdefgh", noted(model, LIST), max_new_tokens=4)
        assert found == "abcd"
        assert out.sequences.shape[1] == prompt("Where is Ada?").shape[1] + 4

    def test_prompts_of_a_batch_make_their_own_calls(self, model: Any) -> None:
        memory = model.new_memory(2, tokenizer=tokenizer())
        memory.write([LIST, None], source="list")
        ids = prompt("Where is Ada?").expand(2, -1)
        alone = model.generate(ids[1:], max_new_tokens=6, do_sample=False, pad_token_id=0)
        out = model.generate(ids, memory=memory, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(out[1, : alone.shape[1]], alone[0])

    def test_an_empty_memory_leaves_marks_alone(self, model: Any) -> None:
        found, _, _ = said(model, " She is [find Ada|office] there.", model.new_memory(tokenizer=tokenizer()))
        assert found == "She is [find Ada|office] there.</s>"

    def test_an_answer_of_another_kind_is_named(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = noted(model, LIST)
        for wrong in (
            "room 12",
            Recalled("room 12", ("Ada",)),
            Recalled("x", memory.states[0].entries()[:1], (1.0, 2.0)),
        ):
            monkeypatch.setattr(Triples, "answer", lambda self, entries, call, ask, wrong=wrong: wrong)
            with pytest.raises(MechanismError, match="'triples': answer must return a"):
                said(model, "[find Ada|office]", memory)

    def test_ways_of_generating_that_cannot_be_interrupted_are_refused(self, model: Any) -> None:
        memory = noted(model, LIST)
        for name, value in (("num_beams", 2), ("output_scores", True), ("streamer", TextStreamer(tokenizer()))):
            with pytest.raises(NotSupported, match=name):
                model.generate(prompt(), memory=memory, max_new_tokens=2, pad_token_id=0, **{name: value})


class TestWaysOfCalling:
    def test_the_last_call_leaves_when_another_is_made(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Triples, "keeps_calls", False)
        found, seen, out = said(model, "1[find Ada|office]2[find Ben|office]3", noted(model, LIST))
        assert found == "123</s>"
        assert seen.endswith("12[find Ben|office] room 3.3")
        assert len(out.memory_sources[0][0]) == 2
        found, seen, _ = said(model, "1[find Ada|office]2[find Eve|office]3", noted(model, LIST))
        assert found == "123</s>"
        assert seen.endswith("1[find Ada|office] room 12.23"), "a call that is taken back drives out no other"

    def test_the_same_call_is_taken_back(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Triples, "repeats_calls", False)
        found, seen, out = said(model, "1[find Ada|office]2[find Ada|office]3", noted(model, LIST))
        assert found == "123</s>"
        assert seen.endswith("1[find Ada|office] room 12.23")
        assert len(out.memory_sources[0][0]) == 1

    def test_a_call_may_be_held_to_what_is_stored(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def calls(self: Triples, entries: Any) -> list[str]:
            return ["|".join(entry.fields[:2]) for entry in entries]

        monkeypatch.setattr(Triples, "calls", calls)
        found, seen, out = said(model, "1[find 2", noted(model, LIST))
        assert found == "12</s>"
        call = seen.partition("[find ")[2].partition("]")[0]
        assert call in {"Ada|office", "Ben|office"}
        assert len(out.memory_sources[0][0]) == 1
        limited = model.config.model_type == "llama"
        for possible, answers in ((["long " * 600, "Ada|office"], 1), (["long " * 600], 0)):
            if limited or answers:
                monkeypatch.setattr(Triples, "calls", lambda self, entries, possible=possible: possible)
                found, _, out = said(model, "1[find 2", noted(model, LIST))
                assert found == "12</s>"
                assert not limited or len(out.memory_sources[0][0]) == answers, "for one there are no positions"

    def test_an_answer_that_does_not_fit_is_taken_back(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        entries = noted(model, LIST).states[0].entries()
        long = Recalled(" room" * 600, entries[:1])
        monkeypatch.setattr(Triples, "answer", lambda self, entries, call, ask: long)
        found, seen, out = said(model, "1[find Ada|office]2", noted(model, LIST))
        assert found.startswith("12")
        fits = model.config.model_type == "mamba"
        assert (seen.count(" room") > 1, bool(out.memory_sources[0][0])) == (fits, fits)


class TestAsk:
    def test_late_stopping_ends_at_the_best_place(self) -> None:
        ask = with_notes().mplus_engine.asking(tokenizer())
        whole = ask("Once upon a time", 40)
        assert ask("Once upon a time", 40, stop=["."], patience=1) == whole.partition(".")[0]
        late = ask("Once upon a time", 40, stop=["."], patience=3)
        assert "." not in late
        assert late.startswith(whole.partition(".")[0])
        assert ask("Once upon a time", 4, stop=["xyz"], patience=3) == ask("Once upon a time", 4)

    def test_vectors_are_mean_hidden_states(self) -> None:
        model = with_notes()
        ask = model.mplus_engine.asking(tokenizer())
        ids = torch.tensor([ids_of("a cat", special=False)])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 2):
            [found] = ask.vectors(["a cat"], layer)
            assert torch.allclose(found.double(), states[layer][0].mean(0), atol=1e-6)
        for texts, layer, message in ((["", "a"], 0, "1 to 512 tokens, got 0"), (["a"], 99, "layer must be from 0 to")):
            with pytest.raises(InputError, match=message):
                ask.vectors(texts, layer)
        with pytest.raises(InputError, match="1 to 512 tokens, got"):
            ask.vectors(["a cat " * 600], 1)
        assert ask.count("a cat") == ids.shape[1]

    def test_it_is_greedy_decoding_without_memory(self) -> None:
        model = with_notes()
        ask = model.mplus_engine.asking(tokenizer())
        ids = prompt("Once upon a time")
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer().decode(expected, skip_special_tokens=True)
        with model.reading(noted(model, KEY)):
            assert ask("Once upon a time", 12) == text
        assert ask("Once upon a time", 12, stop=[text[5:9]]) == text[:5]

    def test_a_latent_decoder_can_be_asked_too(self) -> None:
        model = wrapped(None, "kv")
        ask = model.mplus_engine.decoder.ask
        assert ask(tokenizer(), "Once upon a time", 12) == with_notes().mplus_engine.asking(tokenizer())(
            "Once upon a time", 12
        )

    def test_of_choices_the_one_whose_tokens_are_likelier(self) -> None:
        ask = with_notes().mplus_engine.asking(tokenizer())
        choices = (" there was a little girl", " there was a little xylophone", " zzz", " there")
        assert ask("Once upon a time,", 1, choices=choices) in (choices[0], choices[3])
        assert ask("Once upon a time,", 1, choices=(" zzz",)) == " zzz"
        with pytest.raises(InputError, match="choices must have at least one token each"):
            ask("Once", 1, choices=("", "a"))

    def test_a_trie_ends_where_its_choices_end(self) -> None:
        trie = Trie.of([("a", [1]), ("ab", [1, 2]), ("c", [3])])
        assert set(trie.next) == {1, 3}
        assert trie.next[1].choice == "a"
        assert trie.next[1].next[2].choice == "ab"

    def test_what_does_not_fit_is_refused(self) -> None:
        ask = with_notes().mplus_engine.asking(tokenizer())
        with pytest.raises(InputError, match="must fit into the 512 positions of LlamaForCausalLM"):
            ask("the " * 500, 20)
