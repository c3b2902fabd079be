"""A session: what stands in its prompts, what goes into memory, and that nothing goes there twice or is lost."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
import torch

import mplus
from mplus.chat.journal import FILE, Journal
from mplus.errors import ConfigError, InputError, MemoryFileError
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.stores.disk.files import FileSystem
from tests.chat.conftest import kept, new_chat

FACTS = ["Tom has a red ball.", "Lily has a blue hat.", "Ben saw a big dog.", "Sue ate a green pear."]


def test_an_answer_is_what_the_decoder_generates_behind_the_template(model, tokenizer):
    chat = mplus.Chat(model, tokenizer=tokenizer, system="Tell a story.", max_new_tokens=8, do_sample=False)
    texts = []
    for message in ("One day", "And then?"):
        reply = chat.send(message)
        texts += [("user", message), ("assistant", reply.text)]
        prompt = (
            "<s>[system] Tell a story.\n" + "".join(f"[{who}] {text}\n" for who, text in texts[:-1]) + "[assistant]"
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert reply.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert (reply.prompt_tokens, reply.tokens, reply.recalled) == (ids.shape[1], 8, ())
        assert 0 < reply.first_seconds <= reply.seconds


def test_what_leaves_the_window_goes_into_memory_once_and_in_order(chat, memory):
    replies = [chat.send(fact) for fact in FACTS]
    inside = [exchange.turns[0].content for exchange in chat.exchanges]
    left = [text for _, text in kept(memory)]
    assert 0 < len(left) < len(FACTS)
    assert inside == FACTS[len(left) :]
    chat.close()
    chat.close()
    assert [text for _, text in kept(memory)] == [
        f"User: {fact}\nAssistant: {reply.text}" for fact, reply in zip(FACTS, replies, strict=True)
    ]
    assert max(reply.prompt_tokens for reply in replies) <= chat.window_tokens


def test_names_say_when_and_differ(model, memory):
    chat = new_chat(model, memory, clock=lambda: datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC))
    for fact in FACTS:
        chat.send(fact)
    chat.close()
    names = [name for name, _ in kept(memory)]
    assert names == ["chat 2023-11-14 22:13:20", *(f"chat 2023-11-14 22:13:20 ({count})" for count in (2, 3, 4))]


def test_a_reply_says_what_was_recalled(chat, memory):
    for fact in FACTS:
        memory.write(fact, source=fact.partition(" ")[0])
    (found,) = chat.send("What did Sue eat? A green pear").recalled
    assert (found.source, found.rows) == ("Sue", 1)
    assert found.score > 0


def test_memory_off_answers_as_without_one(chat, model, tokenizer, memory):
    memory.write("Sue ate a green pear.", source="Sue")
    chat.recalls = False
    reply = chat.send("What did Sue eat?")
    assert reply.recalled == ()
    alone = mplus.Chat(model, tokenizer=tokenizer, window_tokens=120, max_new_tokens=6, do_sample=False)
    assert alone.send("What did Sue eat?").text == reply.text


def test_what_is_not_kept_leaves_no_trace(chat, memory):
    chat.send(FACTS[0])
    before = list(chat.exchanges)
    assert chat.send("Who has a red ball?", keep=False).text == chat.send("Who has a red ball?", keep=False).text
    assert chat.exchanges == before


def test_only_some_speakers_are_remembered(model, memory):
    with new_chat(model, memory, remember=["user"], speakers={"user": "Ada"}) as chat:
        chat.send("Who has a hat?")
        chat.send({"role": "user", "content": "My dog is Rex. Is that good?", "name": "Tom"})
        chat.send("I am well")
    assert [text for _, text in kept(memory)] == ["Tom: My dog is Rex. Is that good?", "Ada: I am well"]


def test_after_an_error_all_is_as_before(chat, memory, model, monkeypatch):
    chat.send(FACTS[0])
    before = list(chat.exchanges)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.send(FACTS[1])
    assert chat.exchanges == before
    chat.send(FACTS[1])
    chat.close()
    assert [text.partition("\n")[0] for _, text in kept(memory)] == [f"User: {fact}" for fact in FACTS[:2]]


def test_what_memory_could_not_take_is_still_in_the_prompt(chat, memory, monkeypatch):
    chat.send(FACTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(memory, "write", lambda *_, **__: (_ for _ in ()).throw(MemoryFileError("disk full")))
        with pytest.raises(MemoryFileError, match="disk full"):
            chat.close()
    assert len(chat.exchanges) == 1
    chat.close()
    assert len(kept(memory)) == 1


def test_an_answer_that_is_left_counts_with_what_was_said(chat, memory):
    answer = chat.stream("One day", max_new_tokens=100)
    for piece in answer:
        if piece.strip():
            break
    assert answer.reply.interrupted
    assert 0 < answer.reply.tokens < 100
    assert chat.exchanges[-1].turns[-1].content == answer.reply.text
    with pytest.raises(InputError, match="can be read once"):
        list(answer)
    assert not chat.send("And then?").interrupted


def test_an_answer_that_is_ended_before_its_first_word_leaves_nothing(chat):
    answer = chat.stream("One day")
    answer.stop()
    assert list(answer) == []
    assert answer.reply.interrupted
    assert chat.exchanges == []


def test_pieces_are_the_answer(chat):
    answer = chat.stream("One day", max_new_tokens=12)
    with pytest.raises(InputError, match="must be over"):
        answer.reply  # noqa: B018 - a property
    pieces = list(answer)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == answer.reply.text == chat.reply.text


def test_one_answer_at_a_time(chat):
    running = iter(chat.stream("One day", max_new_tokens=100))
    next(running)
    with pytest.raises(InputError, match="one answer at a time"):
        chat.send("Hello")
    running.close()
    chat.send("Hello")
    assert [exchange.turns[0].content for exchange in chat.exchanges] == ["One day", "Hello"]


def test_other_tasks_run_while_an_answer_is_given(model, tokenizer):
    def chat():
        return mplus.Chat(model, tokenizer=tokenizer, max_new_tokens=8, do_sample=False)

    async def ask():
        ticks, asked = 0, asyncio.create_task(chat().asend("One day"))
        while not asked.done():
            ticks += 1
            await asyncio.sleep(0.001)
        pieces = [piece async for piece in chat().stream("One day")]
        return (await asked).text, "".join(pieces).strip(), ticks

    sent, streamed, ticks = asyncio.run(ask())
    assert sent == streamed == chat().send("One day").text
    assert ticks > 1


def test_a_cancelled_task_ends_its_answer(chat):
    async def ask():
        asked = asyncio.create_task(chat.asend("One day", max_new_tokens=300))
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(ask())
    assert chat.send("Hello").text


def test_after_a_crash_the_session_goes_on(model, tokenizer, tmp_path):
    memory = mplus.Memory.open(tmp_path / "memory", model, tokenizer=tokenizer)
    chat = new_chat(model, memory)
    for fact in FACTS:
        chat.send(fact)
    inside, left = list(chat.exchanges), kept(memory)
    files = [tmp_path / "memory" / name for name in (FILE, "manifest.json")]
    assert len({file.stat().st_mode for file in files}) == 1, "what was said is as private as the memory"
    memory.streams.persistence.directory.close()  # as the end of the process would, and the chat was not closed
    with mplus.Memory.open(tmp_path / "memory", model, tokenizer=tokenizer) as memory:
        again = new_chat(model, memory)
        assert again.exchanges == inside
        assert kept(memory) == left
        again.close()
        assert len(kept(memory)) == len(FACTS)
    with mplus.Memory.open(tmp_path / "memory", model, tokenizer=tokenizer) as memory:
        assert new_chat(model, memory).exchanges == []


def test_a_crash_between_memory_and_journal_writes_nothing_twice(model, tokenizer, tmp_path):
    with mplus.Memory.open(tmp_path / "memory", model, tokenizer=tokenizer) as memory:
        chat = new_chat(model, memory)
        chat.send(FACTS[0])
        journal = (tmp_path / "memory" / FILE).read_bytes()
        chat.close()
        (tmp_path / "memory" / FILE).write_bytes(journal + b'{"name": "cut in the mid')
        with new_chat(model, memory) as again:
            assert again.exchanges == []
        assert len(kept(memory)) == 1


def test_the_name_of_a_new_journal_is_synced_once_it_is_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        FileSystem, "sync_folder", lambda _, folder: synced.append((folder, (tmp_path / FILE).exists()))
    )
    Journal(tmp_path / FILE).write([])
    assert synced == [(tmp_path, True)]


def test_a_damaged_journal_is_refused(model, tokenizer, tmp_path):
    with mplus.Memory.open(tmp_path / "memory", model, tokenizer=tokenizer) as memory:
        (tmp_path / "memory" / FILE).write_text('{"name": 1}\n')
        with pytest.raises(MemoryFileError, match="must have an exchange of a chat in each line"):
            new_chat(model, memory)


def test_forgetting_in_the_prompt_and_in_memory(chat, memory):
    for fact in FACTS:
        chat.send(fact)
    in_memory, in_prompt = kept(memory)[0][0], chat.exchanges[0].name
    chat.forget(in_memory)
    chat.forget(in_prompt)
    chat.close()
    names = [name for name, _ in kept(memory)]
    assert len(names) == len(FACTS) - 2
    assert not {in_memory, in_prompt} & set(names)
    with pytest.raises(InputError):
        chat.forget("nothing of this name")


def test_lines_instead_of_a_template(model):
    plain = load_tokenizer()
    with pytest.raises(ConfigError, match=r"chat template.*plain=True"):
        mplus.Chat(model, tokenizer=plain)
    chat = mplus.Chat(model, tokenizer=plain, plain=True, system="Be kind.", max_new_tokens=4)
    chat.send("Hello")
    assert chat.reply.prompt_tokens == len(plain("Be kind.\n\nUser: Hello\nAssistant:")["input_ids"])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("  ", "must have words"),
        ([], "must end with something to answer"),
        ({"role": "assistant", "content": "Hi"}, "must end with something to answer"),
        ({"role": "system", "content": "Hi"}, "system="),
        ({"role": "user"}, "a text as 'content'"),
        (["Hi"], "a text as 'content'"),
    ],
)
def test_what_is_no_message_is_refused(chat, message, says):
    with pytest.raises(InputError, match=says):
        chat.send(message)
    assert chat.exchanges == []


def test_a_message_longer_than_the_window_is_refused(chat, memory):
    chat.send(FACTS[0])
    with pytest.raises(InputError, match="must fit into window_tokens"):
        chat.send("word " * 200)
    assert len(chat.exchanges) + len(kept(memory)) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window_tokens": 0}, "window_tokens must be at least 1"),
        ({"window_tokens": 510}, "leave room for max_new_tokens"),
        ({"remember": ["system"]}, "must name roles"),
    ],
)
def test_options_are_checked(model, memory, options, says):
    with pytest.raises(ConfigError, match=says):
        new_chat(model, memory, **options)


def test_a_memory_of_several_streams_is_refused(model, tokenizer):
    with pytest.raises(InputError, match=r"memory\.select"):
        mplus.Chat(model, model.new_memory(2, tokenizer=tokenizer))
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        mplus.Chat(model)
