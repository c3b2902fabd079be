"""Which notes come back, in which frame and order, and which settings mean nothing to a memory of text."""

from __future__ import annotations

from typing import Any

import pytest

import mplus
from mplus.config import AdapterConfig
from mplus.errors import ConfigError, InputError, MechanismError
from mplus.mechanisms import Entry, TokenBudget
from mplus.mechanisms.notes import NotesMechanism
from tests.mechanisms.text.decoders import CAT, KEY, noted, prompt, tokenizer, with_notes, wrapped

DOG = "Tom has a dog and a cat."


def notes(**options: Any) -> NotesMechanism:
    return NotesMechanism(mplus.MPlusConfig(mechanism="notes"), NotesMechanism.Options(**options))


def recalled(asked: str, *texts: str, tokens: int = 1000, **options: Any) -> Any:
    """What is recalled, with a token for each word."""
    entries = tuple(Entry((text,), f"s{number}", number) for number, text in enumerate(texts))
    budget = TokenBudget(tokens, lambda text: len(text.split()))
    return notes(**options).recall(entries, asked, None, budget)  # type: ignore[arg-type]


class TestChoice:
    def test_the_notes_that_share_words_come_back_the_best_one_last(self) -> None:
        found = recalled("A cat, Lily, and a key?", KEY, CAT, "Tom has one cat.", "Nothing else")
        assert [entry.source for entry in found.entries] == ["s2", "s0", "s1"]
        assert found.scores == tuple(sorted(found.scores))
        assert found.text == f"Tom has one cat.\n{KEY}\n{CAT}\n"

    def test_case_and_punctuation_do_not_count(self) -> None:
        assert recalled("LILY!", CAT, KEY).text == f"{CAT}\n"

    def test_nothing_comes_back_that_shares_nothing(self) -> None:
        for asked in ("Hello", "", "?!"):
            assert recalled(asked, KEY, CAT).text == ""
        assert recalled("key", "?!", "...").text == ""

    def test_no_more_than_so_many(self) -> None:
        found = recalled("the cat of Lily", KEY, CAT, DOG, passages=1)
        assert [entry.source for entry in found.entries] == ["s1"]

    def test_as_they_were_written(self) -> None:
        found = recalled("the cat of Lily", CAT, KEY, DOG, order="written")
        assert [entry.source for entry in found.entries] == ["s0", "s1", "s2"]
        assert found.scores[0] == max(found.scores)

    def test_what_does_not_fit_is_left_out_and_a_shorter_one_comes(self) -> None:
        found = recalled("cat Lily", f"{CAT} {'Lily has a cat. ' * 20}", DOG, tokens=10)
        assert [entry.source for entry in found.entries] == ["s1"]
        assert recalled("cat Lily", CAT, tokens=3).text == ""
        assert recalled("cat Lily", CAT, budget_tokens=3).text == ""

    def test_frames(self) -> None:
        found = recalled("cat", DOG, template="[{source}] {text} {{}}\n")
        assert found.text == f"[s0] {DOG} {{}}\n"
        assert recalled("cat", "cat {text} {source}").text == "cat {text} {source}\n"  # braces of a note are text

    @pytest.mark.parametrize("k1", [0, 1.5])
    def test_scores_are_finite(self, k1: float) -> None:
        assert all(0 < score < 100 for score in recalled("the cat", KEY, CAT, "?!", k1=k1).scores)


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("template", "note"),
            ("template", "{text} {other}"),
            ("template", "{text"),
            ("template", 3),
            ("passages", 0),
            ("budget_tokens", 0),
            ("order", "newest"),
            ("place", "end"),
            ("b", 1.5),
            ("k1", -1),
        ],
    )
    def test_options_are_checked(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"{name} must be"):
            notes(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("variant", "published"),
            ("memory_tokens_per_chunk", 4),
            ("short_term_tokens", 8),
            ("retrieved_tokens", 8),
            ("long_term_tokens", 100),
            ("bytes_budget", "1MiB"),
            ("drop_per_layer", False),
            ("memory_positions", "constant"),
            ("rope_inv_freq_dtype", "bfloat16"),
            ("memory_rows", "hidden"),
            ("store", "quantized"),
            ("eviction", "lru"),
            ("retriever", {"name": "linear", "width": 8}),
            ("backend", "reference"),
            ("adapters", AdapterConfig(rank=2)),
        ],
    )
    def test_what_is_about_rows_is_refused_by_name(self, name: str, value: Any) -> None:
        config = mplus.MPlusConfig.from_dict({"mechanism": "notes", name: value})
        with pytest.raises(ConfigError, match=f"{name} means nothing to the mechanism 'notes'"):
            NotesMechanism.settle(config, None)

    def test_so_are_a_pool_and_the_shortest_chunk(self) -> None:
        with pytest.raises(ConfigError, match="min_chunk_tokens means nothing to the mechanism 'notes'"):
            NotesMechanism.settle(mplus.MPlusConfig(mechanism="notes", chunk_tokens=32, min_chunk_tokens=3), None)
        with pytest.raises(ConfigError, match="pool means nothing to the mechanism 'notes'"):
            mplus.wrap(wrapped_less(), mplus.MPlusConfig(mechanism="notes"), pool=prompt())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("store", "ram"),
            ("eviction", "lru"),
            ("bytes_budget", "1MiB"),
            ("device", "cuda"),
            ("memory_rows", "hidden"),
            ("keep_text", True),
        ],
    )
    def test_arguments_of_a_new_memory_too(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"{name} means nothing to the mechanism 'notes'"):
            with_notes().new_memory(**{name: value})

    def test_passages_are_smaller_in_a_small_decoder(self) -> None:
        assert NotesMechanism.settle(mplus.MPlusConfig(mechanism="notes"), 40).chunk_tokens == 20
        assert NotesMechanism.settle(mplus.MPlusConfig(mechanism="notes"), None).chunk_tokens == 128
        again = NotesMechanism.settle(mplus.MPlusConfig(mechanism="notes"), 40)
        assert NotesMechanism.settle(mplus.MPlusConfig.from_dict(again.to_dict()), 1000) == again

    def test_the_summary_says_what_there_is(self) -> None:
        summary = wrapped(place="turn", chunk_tokens=20).mplus_summary()
        *said, check = summary.splitlines()
        assert check.startswith("left-padded row = row alone: relative error ")
        assert said == [
            "memories of text: notes",
            "recalled text stands at: the opening of the last user turn",
            "chunk_tokens: 20",
        ]


class TestWrites:
    def test_passages_become_entries(self) -> None:
        memory = wrapped(chunk_tokens=20).new_memory(tokenizer=tokenizer())
        report = memory.write(f"{KEY} {CAT}\n\n{DOG}", source="all")
        assert [entry.fields for entry in memory.states[0].entries()] == [(KEY,), (CAT,), (DOG,)]
        assert report.chunks == [3]
        assert [entry.birth for entry in memory.states[0].entries()] == [0, 1, 2]

    def test_ids_are_turned_into_text(self) -> None:
        memory = with_notes().new_memory(tokenizer=tokenizer())
        memory.write(prompt(KEY)[0])
        assert memory.states[0].entries()[0].fields == (KEY,)

    def test_pieces_are_one_text(self) -> None:
        model = wrapped(chunk_tokens=20)
        memory, other = (model.new_memory(tokenizer=tokenizer()) for _ in range(2))
        text = f"{KEY} {CAT}\n\n{DOG}" * 3
        memory.write(text, source="all")
        report = other.write_pieces((text[at : at + 7] for at in range(0, len(text), 7)), source="all")
        assert [entry.fields for entry in other.states[0].entries()] == [
            entry.fields for entry in memory.states[0].entries()
        ]
        assert report.chunks == [len(memory.states[0])]

    def test_memories_that_are_written_together(self) -> None:
        model = with_notes()
        memories = [model.new_memory(tokenizer=tokenizer()) for _ in range(3)]
        found = mplus.write_together(memories, [KEY, "", CAT], ["a", "b", "c"], errors="return")
        assert isinstance(found[1], InputError)
        assert [
            memory.states[0].of_source(name)[0].fields[0] for memory, name in zip(memories[::2], "ac", strict=True)
        ] == [
            KEY,
            CAT,
        ]

    def test_a_memory_without_a_tokenizer_says_so(self) -> None:
        memory = with_notes().new_memory()
        with pytest.raises(InputError, match="a memory of text needs a tokenizer"):
            memory.write(KEY)
        with pytest.raises(InputError, match="a memory of text needs a tokenizer"):
            memory.write([1, 2, 3])

    def test_a_single_pass_is_refused(self) -> None:
        with pytest.raises(mplus.errors.NotSupported, match="write_chunk is for one pass of the decoder"):
            noted(with_notes()).write_chunk(prompt(KEY))

    @pytest.mark.parametrize("wrong", [["text"], [("",)], [()], [(3,)], [None]], ids=repr)
    def test_wrong_entries_are_named_and_nothing_is_written(self, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = noted(with_notes(), KEY)
        monkeypatch.setattr(NotesMechanism, "write", lambda self, *given: wrong)
        with pytest.raises(MechanismError, match="'notes': write must return entries"):
            memory.write(CAT, source="new")
        assert [source.name for source in memory.sources()] == ["s0"]

    def test_a_write_sees_its_own_source_and_what_it_wrote_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        model = wrapped(chunk_tokens=20)

        def write(mechanism: Any, entries: Any, passage: str, before: str, ask: Any) -> Any:
            seen.append(([entry.fields[0] for entry in entries], before.strip()))
            return [(passage.strip(),)]

        monkeypatch.setattr(NotesMechanism, "write", write)
        memory = noted(model, KEY)
        memory.write(f"{CAT} {DOG}", source="new")
        memory.write("More of it.", source="new")
        assert seen == [([], ""), ([], ""), ([CAT], CAT), ([CAT, DOG], "")]


def wrapped_less() -> Any:
    """A decoder that is not wrapped."""
    return mplus.unwrap(wrapped())
