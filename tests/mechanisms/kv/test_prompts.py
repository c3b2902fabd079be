"""A chat is read where its last turn begins: what stands there, what is asked with, and how a cache goes on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import InputError, NotSupported
from mplus.mechanisms.decoder import Text
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.mechanisms.kv.prompt import Prompt
from mplus.testing.rounding import error
from tests.helpers import noise
from tests.mechanisms.kv.memories import decoder, text, tokenizer, wrapped
from tests.mechanisms.kv.plain_reader import PlainReader
from tests.mechanisms.kv.test_begin import model as wrapped_for_chat
from tests.mechanisms.kv.test_begin import rendered
from tests.memory import tiny

if TYPE_CHECKING:
    from torch import Tensor

    import mplus

CHAT = ChatFormat(prefix=(9, 1, 2), opening=(1, 2), closing=(3, 4))
TWO_TURNS = [9, 1, 2, 50, 51, 3, 4, 60, 3, 1, 2, 70, 71, 3, 4]
NOTES = ("The key is under the blue stone.", "Rosa paints doors.", "Omar bakes bread in Lisbon.", "It rained.")
FIRST, SECOND = "Where is the key?", "Who paints doors, Rosa?"


@pytest.mark.parametrize(
    ("ids", "chat", "begin", "query"),
    [
        (TWO_TURNS, CHAT, 11, [70, 71]),
        (TWO_TURNS[:7], CHAT, 3, [50, 51]),
        (TWO_TURNS[:4], CHAT, 3, [50]),  # a turn that is not closed yet
        ([5, 6, 7], CHAT, 0, [5, 6, 7]),  # no turn: a text
        ([9, 5, 6], None, 1, [5, 6]),  # it begins with BOS
        ([8, 8, 5], None, 2, [5]),  # it begins as chunks were written
        ([8, 5, 6], None, 0, [8, 5, 6]),
    ],
)
def test_the_parts_of_a_prompt(ids: list[int], chat: ChatFormat | None, begin: int, query: list[int]) -> None:
    padded = torch.tensor([[0, 0, *ids], [*ids, 0, 0]])
    for row, mask in enumerate((torch.tensor([0, 0, *[1] * len(ids)]), torch.tensor([*[1] * len(ids), 0, 0]))):
        found = Prompt.of(Text(padded, mask.bool().expand(2, -1)), row, chat, [(8, 8), (9,)])
        assert (found.begin, found.query.tolist(), found.ids.tolist()) == (begin, query, ids)
        assert found.known.tolist() == ids


def test_what_a_call_says_goes_before_the_turn() -> None:
    ids = torch.tensor([TWO_TURNS])
    first = torch.arange(ids.shape[1])[None] < 5
    limited = Prompt.of(Text(ids, query=first, limited=True), 0, CHAT, [])
    assert (limited.query.tolist(), limited.known.tolist(), limited.begin) == (TWO_TURNS[:5], TWO_TURNS[:5], 11)
    told = Prompt.of(Text(ids, query=first, limited=True, queries=[torch.tensor([7, 8])]), 0, CHAT, [])
    assert (told.query.tolist(), told.begin) == ([7, 8], 11)


@functools.cache
def shared() -> tuple[Any, Any]:
    return wrapped_for_chat(retrieved_chunks=1, config={"chunk_tokens": 64, "retrieved_tokens": 64}), decoder()


def memory_of(model: Any, *notes: str) -> mplus.Memory:
    memory: mplus.Memory = model.new_memory(tokenizer=tokenizer())
    for number, note in enumerate(notes or NOTES):
        memory.write(note, f"note {number}")
    return memory


def parts(*contents: str) -> tuple[Tensor, Tensor]:
    """The ids in front of the content of the last turn, and the rest."""
    ids, chat = rendered(tokenizer(), *contents), ChatFormat.of(tokenizer())
    assert chat is not None
    turn = chat.last_turn(ids)
    assert turn is not None
    return torch.tensor(ids[: turn[0]]), torch.tensor(ids[turn[0] :])


def near(found: Tensor, wanted: Tensor) -> None:
    assert error(found, wanted) <= noise.rounding("llama")


@pytest.mark.parametrize("earlier", [(), ("Hello, my name is Greta.", "Hello Greta!")], ids=["one turn", "two turns"])
def test_system_text_and_earlier_turns_stand_in_front_of_the_memory(earlier: tuple[str, ...]) -> None:
    (model, plain), memory = shared(), memory_of(shared()[0])
    begin, rest = parts(*earlier, FIRST)
    reader = PlainReader(plain)
    wanted = [reader.text(begin)]
    reader.chunk(memory, 0)
    wanted.append(reader.text(rest))
    with torch.no_grad():
        output = model(torch.cat([begin, rest])[None], memory=memory, output_sources=True)
        near(output.logits[0], torch.cat(wanted))
        assert error(output.logits[0], plain(torch.cat([begin, rest])[None]).logits[0]) >= 10 * noise.rounding("llama")
    (found,) = output.memory_sources[0][0]
    assert (found.source, found.tokens) == ("note 0", int(memory.states[0].chunk_length[0]))
    assert found.score is not None
    assert found.score > 0
    assert found.written is not None


def test_rows_of_a_batch_have_begins_of_their_own_and_what_is_not_found_is_the_bare_decoder() -> None:
    (model, plain), made = shared(), tokenizer()
    memory = model.new_memory(2, tokenizer=made)
    memory.write(list(NOTES[:2]))
    prompts = [torch.cat(parts(FIRST)), torch.cat(parts("Hello, I am Greta.", "Hello!", SECOND))]
    most = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(one, (most - len(one), 0)) for one in prompts])
    mask = torch.stack([torch.arange(most) >= most - len(one) for one in prompts]).long()
    made_of_both = model.generate(ids, attention_mask=mask, memory=memory, max_new_tokens=5, do_sample=False)
    for row, contents in enumerate([(FIRST,), ("Hello, I am Greta.", "Hello!", SECOND)]):
        begin, rest = parts(*contents)
        reader = PlainReader(plain)
        reader.text(begin)
        reader.chunk(memory, 0, row)
        assert made_of_both[row, most:].tolist() == reader.answer(rest, 5)
    other = torch.cat(parts("Zzz qqq"))[None]
    with torch.no_grad():
        assert torch.equal(model(other, memory=memory.select([0])).logits, plain(other).logits)


def test_template_and_system_text_ask_for_nothing() -> None:
    model = shared()[0]
    memory = memory_of(model, "Be kind to Rosa.", "The user said system.", "Rosa paints doors.")
    ids = torch.cat(parts(SECOND))[None]
    assert [one.source for one in read(model, ids, memory)] == ["note 2"]
    assert read(model, torch.cat(parts("Mmm nnn"))[None], memory) == []
    assert [one.source for one in read(model, ids, memory, retrieval_query="Be kind.")] == ["note 0"]
    asked = tokenizer()("Who said system?", add_special_tokens=False)["input_ids"]
    assert [one.source for one in read(model, ids, memory, retrieval_query=asked)] == ["note 1"]
    assert [one.source for one in read(model, ids, memory, query_tokens=ids.shape[1])] != []


def test_a_threshold_of_a_call_goes_before_the_configured_one() -> None:
    model = shared()[0]
    memory, ids = memory_of(model), torch.cat(parts(SECOND))[None]
    (best,) = read(model, ids, memory)
    assert read(model, ids, memory, min_score=best.score) == []
    assert read(model, ids, memory, min_score=best.score - 0.01) == [best]
    with model.reading(memory, min_score=1e9), torch.no_grad():
        assert torch.equal(model(ids).logits, shared()[1](ids).logits)
    rows = _rows()
    with pytest.raises(NotSupported, match="min_score does not go with the mechanism 'mplus'"):
        rows(text(4)[None], memory=rows.new_memory(), min_score=0.5)
    with pytest.raises(ValueError, match="min_score must be a number, or None, got 'much'"):
        model(ids, memory=memory, min_score="much")


@functools.cache
def _rows() -> Any:
    return tiny.build()


def read(model: Any, ids: Tensor, memory: mplus.Memory, **options: Any) -> list[Any]:
    with torch.no_grad():
        output = model(ids, memory=memory, output_sources=True, **options)
    found: list[Any] = output.memory_sources[0][0]
    return found


def test_a_cache_goes_on_with_what_it_read_and_retrieves_for_the_next_turn() -> None:
    (model, plain), memory = shared(), memory_of(shared()[0])
    begin, rest = parts(FIRST)
    asked = {"memory": memory, "do_sample": False, "return_dict_in_generate": True, "output_sources": True}
    first = model.generate(torch.cat([begin, rest])[None], max_new_tokens=4, **asked)
    reader = PlainReader(plain)
    reader.text(begin)
    reader.chunk(memory, 0)
    answer = reader.answer(rest, 4)
    assert first.sequences[0, len(begin) + len(rest) :].tolist() == answer
    assert sources(first) == ["note 0"]
    ending = tokenizer()("</s>\n<|user|>\n", add_special_tokens=False)["input_ids"]
    content = parts(SECOND)[1]
    prompt = torch.cat([first.sequences[0], torch.tensor(ending), content])[None]
    second = model.generate(prompt, past_key_values=first.past_key_values, max_new_tokens=4, **asked)
    reader.text(torch.tensor([answer[-1], *ending]))
    reader.chunk(memory, 1)
    assert second.sequences[0, prompt.shape[1] :].tolist() == reader.answer(content, 4)
    assert sources(second) == ["note 0", "note 1"]
    # A third turn that asks for the first note again: it is there already.
    prompt = torch.cat([second.sequences[0], torch.tensor(ending), rest])[None]
    third = model.generate(prompt, past_key_values=second.past_key_values, max_new_tokens=1, **asked)
    assert sources(third) == ["note 0", "note 1"]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_two_turns_without_a_tokenizer_whose_layers_see_a_window(name: str) -> None:
    """The window of 8 tokens ends within chunks and turns; what opens and closes a turn is given by the options."""
    opening, closing = [90, 91], [92]
    model = wrapped(name, begin=[1, *opening], opening=opening, closing=closing, retrieved_chunks=1)
    plain, memory = tiny.BY_NAME[name].build(0), model.new_memory()
    told = text(24)
    memory.write(told)
    reader, output, logits, wanted = PlainReader(plain), None, [], []
    for turn, chunk in enumerate((2, 0)):
        asked = torch.cat([told[8 * chunk : 8 * chunk + 8 : 2], text(3, 5 + turn)])
        front = torch.tensor([[1, *text(4, 3).tolist()], text(5, 4).tolist()][turn] + opening)
        new = torch.cat([front, asked, torch.tensor(closing)])
        with torch.no_grad():
            cache = None if output is None else output.past_key_values
            output = model(new[None], memory=memory, past_key_values=cache, output_sources=True)
        logits.append(output.logits[0])
        wanted.append(reader.text(front))
        reader.chunk(memory, chunk)
        wanted.append(reader.text(new[len(front) :]))
    assert [one.age for one in output.memory_sources[0][0]] == [7, 23]
    assert error(torch.cat(logits), torch.cat(wanted)) <= noise.rounding(name)


def test_a_cache_that_was_cut_lets_go_of_what_later_turns_brought_back() -> None:
    (model, plain), memory = shared(), memory_of(shared()[0])
    begin, rest = parts(FIRST)
    behind = torch.tensor(tokenizer()("</s>\n<|user|>\n", add_special_tokens=False)["input_ids"])
    first = torch.cat([begin, rest])
    with torch.no_grad():
        output = model(first[None], memory=memory)
        cache = model(
            torch.cat([behind, parts(SECOND)[1]])[None], memory=memory, past_key_values=output.past_key_values
        ).past_key_values
        cache.crop(len(first) - cache.get_seq_length())
        content = parts("Who bakes bread in Lisbon?")[1]
        asked = {"memory": memory, "output_sources": True}
        output = model(torch.cat([behind, content])[None], past_key_values=cache, **asked)
    reader = PlainReader(plain)
    reader.text(begin)
    reader.chunk(memory, 0)
    reader.text(rest)
    wanted = [reader.text(behind)]
    reader.chunk(memory, 2)
    near(output.logits[0], torch.cat([*wanted, reader.text(content)]))
    assert sources(output) == ["note 0", "note 2"]


def sources(output: Any) -> list[str]:
    return [one.source for one in output.memory_sources[0][0]]


@pytest.mark.parametrize("cut", [-2, 12], ids=["in front of the turn", "inside the turn"])
def test_forwards_go_on_alike(cut: int) -> None:
    (model, plain), memory = shared(), memory_of(shared()[0])
    begin, rest = parts(FIRST)
    output = model(torch.cat([begin, rest])[None], memory=memory)
    reader = PlainReader(plain)
    reader.text(begin)
    reader.chunk(memory, 0)
    reader.text(rest)
    behind = torch.tensor(tokenizer()("</s>\n<|user|>\n", add_special_tokens=False)["input_ids"])
    content = parts(SECOND)[1]
    new, cut = torch.cat([behind, content]), len(behind) + cut
    with torch.no_grad():
        found = []
        for piece in (new[:cut], new[cut:]):
            output = model(piece[None], memory=memory, past_key_values=output.past_key_values)
            found.append(output.logits[0])
    wanted = [reader.text(behind)]
    reader.chunk(memory, 1)
    near(torch.cat(found), torch.cat([*wanted, reader.text(content)]))


def test_fewer_chunks_come_back_where_the_decoder_has_no_positions_left() -> None:
    model = wrapped(chunk_tokens=40, retrieved_tokens=120, long_term_tokens=400)
    memory = model.new_memory()
    memory.write(text(120))
    for prompt, chunks in ((100, 3), (136, 2), (216, 0), (256, 0)):
        ids = text(120).repeat(3)[None, :prompt]
        ids = torch.cat([ids[:, ::2], ids[:, 1::2]], 1)  # its tokens, and not the chunks themselves
        assert len(read(model, ids, memory)) == chunks
    ids = torch.cat([text(100)[None, ::2], text(100)[None, 1::2]], 1)
    told = {"memory": memory, "return_dict_in_generate": True, "output_sources": True, "pad_token_id": 0}
    output = model.generate(ids, max_new_tokens=60, **told)
    assert len(output.memory_sources[0][0]) == 2


def test_bad_queries_are_refused() -> None:
    model = shared()[0]
    memory, ids = memory_of(model), torch.cat(parts(FIRST))[None]
    with pytest.raises(InputError, match="retrieval_query must be one text or one per row, got 2 for a batch of 1"):
        model(ids, memory=memory, retrieval_query=["a", "b"])
    bare = model.new_memory()
    bare.write(ids[0])
    with pytest.raises(InputError, match="a retrieval_query of text needs a tokenizer"):
        model(ids, memory=bare, retrieval_query="key")
    with pytest.raises(ValueError, match="retrieval_query must be a text or token ids"):
        model(ids, memory=memory, retrieval_query=3.5)
    with pytest.raises(InputError, match="needs the ids of a text that is read with it, got embeddings"):
        model(inputs_embeds=torch.randn(1, 3, 32), memory=memory)
    rows = _rows()
    with pytest.raises(NotSupported, match="retrieval_query does not go with the mechanism 'mplus'"):
        rows(text(4)[None], memory=rows.new_memory(), retrieval_query=[3])


def test_chunks_that_are_chosen_later_do_not_overlap_what_the_prompt_begins_with() -> None:
    model = shared()[0]
    short, long = "Rosa paints doors.", "Tom keeps nine old clocks in the tower, and winds them every morning."
    memory = memory_of(model, short, long)
    prompt, later = torch.cat(parts("What does Rosa paint? ")), torch.tensor(tokenizer()(long[:40])["input_ids"])
    mechanism, decoder_ = model.mplus_engine.mechanism, model.mplus_engine.decoder
    whole = torch.cat([prompt, later])[None]
    chosen = (torch.arange(whole.shape[1]) >= len(prompt))[None]
    opened = mechanism.open(decoder_, memory.snapshot(), Text(prompt[None], tokenizer=tokenizer(), reopens=True))
    assert opened.own.blocks[0][0].chunks.tolist() == [0]
    again = mechanism.reopen(decoder_, opened, Text(whole, tokenizer=tokenizer(), query=chosen), [0])
    assert again.own.blocks[0][0].chunks.tolist() == [1], "longer than the first"
    ends = []
    for one in (opened, again):
        where = one.insertion.positions[0]
        assert int(where[0]) >= int(one.insertion.tokens[0, 0]) > 0, "behind all that stands in front"
        ends.append(int(where[-1]))
    assert ends[0] == ends[1] == int(opened.insertion.tokens[0, 0] + opened.insertion.rooms[0, 0]) - 1
    without = mechanism.open(decoder_, memory.snapshot(), Text(prompt[None], tokenizer=tokenizer()))
    assert torch.equal(without.insertion.rooms, without.insertion.rows), "nothing is kept free unless it is asked for"
    narrow = mechanism.reopen(decoder_, without, Text(whole, tokenizer=tokenizer(), query=chosen), [0])
    assert bool((narrow.insertion.positions[0] >= narrow.insertion.tokens[0, 0]).all()), "what is too long stays away"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_an_answer_that_looks_things_up_on_the_way_is_that_of_a_read_in_pieces(options: dict[str, int]) -> None:
    model = shared()[0]
    memory, prompt = memory_of(model), torch.cat(parts(FIRST))[None]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(prompt, memory=memory, retrieve_every=2, **settings)
    if not options:
        with torch.no_grad():
            scored = model(made, memory=memory, query_tokens=prompt.shape[1], retrieve_every=2).logits
        assert scored[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist() == made[0, prompt.shape[1] :].tolist()
