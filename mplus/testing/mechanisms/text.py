"""What every ``TextMechanism`` must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import attrs
import pytest
import torch
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.hf.text.engine import TextEngine
from mplus.mechanisms.text.asking import Ask
from mplus.mechanisms.text.mechanism import Recalled, TextMechanism, TokenBudget
from mplus.mechanisms.text.state import Entry, EntryState
from mplus.memory.writing.chunking import WriteData
from mplus.testing.mechanisms.life import MechanismLife

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory import Memory

NAMES = ("Quillon", "Brastig", "Vemdal", "Torvyn", "Yaxley", "Zubrin", "Foskel", "Wendric", "Gallop", "Hobsen")
THINGS = ("lamp", "boat", "drum", "kite", "coat", "ring", "book", "bell", "cup", "map")
PLACES = ("barn", "attic", "cellar", "garden", "tower", "shed", "mill", "cave", "tent", "well")
PROMPT_TOKENS = 12
MOST_CALLS = 64
"""Calls in one text from which they count as endless."""


class TextMechanismConformance(MechanismLife):
    """Subclass it in a test module and set ``implementation``.

    Texts are of the form "Quillon keeps the lamp in the barn.", prompts "the one who keeps the lamp in
    the barn", cut to the same number of tokens.

    Example:
        >>> class TestNotes(TextMechanismConformance):
        ...     implementation = NotesMechanism

    Attributes:
        implementation: the mechanism class under test; it need not be registered.
        options: of the mechanism; such that a prompt recalls all that the tests write.
    """

    implementation: ClassVar[type[TextMechanism]]
    options: ClassVar[Mapping[str, JsonValue]] = {}
    asking: ClassVar[Mapping[str, JsonValue]] = {"query_tokens": 4}

    # ------------------------------------------------------------------ helpers

    @classmethod
    def memory_table(cls) -> dict[str, JsonValue]:
        mechanism = {"name": cls.implementation.name, **cls.options}
        return {"chunk_tokens": 48, **cls.settings, "mechanism": mechanism}

    def given(self) -> dict[str, Any]:
        return {"tokenizer": load_tokenizer()}

    def text(self, seed: int) -> str:
        """Return a sentence, in which a word is of this seed alone."""
        return f"{NAMES[seed]} keeps the {THINGS[seed]} in the {PLACES[seed]}."

    def prompt(self, seed: int) -> Tensor:
        text = f"the one who keeps the {THINGS[seed]} in the {PLACES[seed]} when it is raining in the morning"
        ids: Tensor = load_tokenizer()(text, return_tensors="pt")["input_ids"][0, :PROMPT_TOKENS]
        return ids

    def traces(self, text: str) -> dict[str, bytes]:
        """Return the word that is in no other text."""
        return {"a word of it": text.split(maxsplit=1)[0].encode()}

    def generated(self, model: MemoryModel, ids: Tensor, memory: Memory | None = None, **options: Any) -> Tensor:
        """Return what greedy decoding puts behind prompts ``[B, T]``, these included."""
        settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
        found: Tensor = model.generate(ids, memory=memory, max_new_tokens=6, do_sample=False, **settings)
        return found

    # ------------------------------------------------------------------ what it is

    def test_has_a_name_options_a_state_and_marks(self) -> None:
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        assert issubclass(self.implementation.State, EntryState)
        assert self.implementation.opens is None or (self.implementation.opens and self.implementation.closes)
        assert self.implementation.opens is not None or self.implementation.recall is not TextMechanism.recall

    def test_an_empty_memory_leaves_the_decoder_as_it_is(self, model: MemoryModel) -> None:
        ids, emptied = self.prompt(7)[None], self.written(model, 1)
        emptied.forget("s0")
        for memory in (model.new_memory(**self.given()), emptied):
            assert torch.equal(self.logits(model, ids, memory), self.logits(model, ids))
            assert torch.equal(self.generated(model, ids, memory), self.generated(model, ids))

    def test_what_is_written_leaves_entries(self, model: MemoryModel) -> None:
        memory = self.written(model, 1, 2)
        assert [source.held["entries"] > 0 for source in memory.sources()] == [True, True]

    def test_what_is_recalled_changes_what_is_read(self, model: MemoryModel) -> None:
        ids, memory = self.prompt(1)[None], self.written(model, 1, 2)
        same = torch.equal(self.logits(model, ids, memory), self.logits(model, ids))
        assert not same or cast("TextEngine", memory.engine).mechanism.opens is not None

    def test_recalled_text_fits_and_says_what_it_is_made_of(self, model: MemoryModel) -> None:
        memory, tokenizer = self.written(model, 1, 2, 3), load_tokenizer()
        engine, [state] = cast("TextEngine", memory.engine), memory.states
        prompt, asking = str(tokenizer.decode(self.prompt(1))), engine.asking(tokenizer)
        entries = EntryState.entries(state)  # type: ignore[arg-type]
        for most in (1, 5, 20, 60, 1000):
            budget = TokenBudget(most, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
            found = engine.mechanism.recall(entries, prompt, asking, budget)
            assert budget.count(found.text) <= most
            assert set(found.entries) <= set(entries)
            assert len(found.scores) in (0, len(found.entries))

    def test_reads_change_nothing(self, model: MemoryModel) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        self.logits(model, self.prompt(7)[None], memory)
        self.generated(model, self.prompt(7)[None], memory)
        assert self.differences(memory, other) == []

    def test_prompts_of_a_batch_are_continued_as_alone(self, model: MemoryModel) -> None:
        """One stream is empty and one has more than the other, so that prompts get texts of all lengths."""
        together = model.new_memory(3, **self.given())
        together.write([self.text(1), None, self.text(2)], source="s0")
        together.write([None, None, self.text(3)], source="s1")
        ids = torch.stack([self.prompt(seed) for seed in (1, 2, 3)])
        found = self.generated(model, ids, together)
        assert torch.equal(found[:, :PROMPT_TOKENS], ids)
        for row in range(3):
            alone = self.generated(model, ids[row : row + 1], together.fork(row))[0]
            assert torch.equal(found[row, : len(alone)], alone)

    def test_another_decoder_reads_the_same(self, model: MemoryModel, tmp_path: Path) -> None:
        memory, ids = self.written(model, 1, 2), self.prompt(1)[None]
        memory.save(tmp_path / "saved")
        with self.wrapped() as other:
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(0.5)
            loaded = self.loaded(tmp_path / "saved", other)
            assert self.differences(loaded, memory) == []
            assert not torch.allclose(self.logits(other, ids, loaded), self.logits(model, ids, memory))
            reports = [one(ids, memory=it, output_sources=True) for one, it in ((model, memory), (other, loaded))]
            assert reports[0].memory_sources == reports[1].memory_sources

    # ------------------------------------------------------------------ calls

    def test_calls_come_to_an_end(self, model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """The decoder calls and calls, and always gets an answer."""
        mechanism, tokenizer = cast("TextEngine", model.mplus_engine).mechanism, load_tokenizer()
        opens, closes = mechanism.opens, mechanism.closes
        answered = []

        def answer(mechanism: TextMechanism, entries: Sequence[Entry], call: str, ask: Ask) -> Recalled:
            answered.append(call)
            assert len(answered) <= MOST_CALLS, "the calls are endless"
            return Recalled(" yes", tuple(entries[:1]))

        monkeypatch.setattr(self.implementation, "answer", answer)
        forced = Forced(tokenizer(f"{opens}a{closes}", add_special_tokens=False)["input_ids"] if opens else [5])
        memory, ids = self.written(model, 1), self.prompt(1)[None]
        found = self.generated(model, ids, memory, logits_processor=[forced])
        text = tokenizer.decode(found[0, PROMPT_TOKENS:])
        assert opens is None or (opens not in text and answered)
        assert self.implementation.most_calls <= MOST_CALLS  # positions of another decoder may go on

    # ------------------------------------------------------------------ what goes wrong

    @pytest.mark.parametrize("nothing", ["", "  \n", 3.5, [None]])
    def test_a_refused_text_changes_nothing(self, model: MemoryModel, nothing: WriteData) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        with pytest.raises(InputError):
            memory.write(nothing, source="s2")
        assert self.differences(memory, other) == []


class Forced:
    """A logits processor after which some tokens come, one after the other and again from the first."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.given = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = torch.full_like(scores, -1e9)
        found[:, self.tokens[self.given % len(self.tokens)]] = 0.0
        self.given += 1
        return found
