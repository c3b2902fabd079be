"""What was said is written to the memory if it is asked for: each turn once, and never instead of an answer."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mplus.serving.errors import ServingError
from mplus.serving.messages import WriteMemory
from tests.serving.http.conftest import error_of, frames
from tests.serving.http.engine import ids

SAID = "there was a little girl named Lily."
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "I am Ada."},
    {"role": "assistant", "content": "Hello Ada."},
    {"role": "tool", "content": "5 degrees", "tool_call_id": "1"},
    {"role": "user", "content": "Who am I?"},
]


def written(engine) -> list[tuple[str, str, str]]:
    """Source, role and content of what was written, each turn as often as it is in the memory."""
    name = next(iter(engine.memories))
    kept = engine.memories[name].texts
    return [(source, *eval(part)[0].values()) for source, parts in kept.items() for part in parts]


def ask(http, **more):
    return http.post("/v1/chat/completions", json={"messages": TALK, "memory": "default", **more})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("remember", "turns"),
    [(None, []), ("off", []), ("user", [("user", "Who am I?")]),
     ("both", [("user", "Who am I?"), ("assistant", SAID)])],
)  # fmt: skip
def test_which_turns_are_written(http, engine, stream, remember, turns):
    body = {} if remember is None else {"remember": remember}
    for _ in range(3):  # a client that tries again
        assert ask(http, stream=stream, **body).status_code == 200
    day = f"chat {datetime.now(UTC):%Y-%m-%d}"
    assert written(engine) == [(day, *turn) for turn in turns]


def test_a_conversation_that_goes_on_and_another_one(http, engine):
    ask(http, remember="user", conversation="one")
    ask(http, remember="user", conversation="two")
    more = [*TALK, {"role": "assistant", "content": "You are Ada."}, {"role": "user", "content": "Who am I?"}]
    http.post("/v1/chat/completions", json={"messages": more, "remember": "user", "conversation": "one"})
    again = [*TALK[:-1], {"role": "user", "content": "Something else at the same place."}]
    http.post("/v1/chat/completions", json={"messages": again, "remember": "user", "conversation": "one"})
    assert [source for source, *_ in written(engine)] == ["one", "one", "one", "two"]
    assert len({one.write_id for one in engine.called if isinstance(one, WriteMemory)}) == 4


def test_another_answer_to_the_same_question_is_not_written_beside_the_first(http, engine):
    ask(http, remember="both", conversation="c")
    engine.says = ids("Another answer.")
    answer = ask(http, remember="both", conversation="c").json()
    assert answer["choices"][0]["message"]["content"] == "Another answer."
    assert "memory_error" not in answer
    assert [content for _, role, content in written(engine) if role == "assistant"] == [SAID]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_write_is_told_and_does_not_spoil_the_answer(http, engine, stream):
    engine.refuses = error = ServingError("the disk is full", 507, "server_error", code="disk_full")
    response = ask(http, remember="both", stream=stream)
    assert response.status_code == 200
    if stream:
        *chunks, last, done = frames(response.text)
        assert done == "[DONE]"
        assert (last["choices"][0]["finish_reason"], last["memory_error"]) == ("stop", error.body()["error"])
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    else:
        assert response.json()["memory_error"] == error.body()["error"]
        text = response.json()["choices"][0]["message"]["content"]
    assert text == SAID


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_failed_is_not_written(http, engine, stream):
    engine.fails = ServingError("lost", 503, "server_error")
    response = ask(http, remember="both", stream=stream)
    assert response.status_code == (200 if stream else 503)
    assert written(engine) == []


def test_responses_remember_too(http, engine):
    body = {"input": "I am Ada.", "instructions": "Be kind.", "remember": "both", "conversation": "c"}
    assert http.post("/v1/responses", json=body).status_code == 200
    assert written(engine) == [("c", "user", "I am Ada."), ("c", "assistant", SAID)]


def test_nothing_to_remember(http, engine):
    for messages in ([{"role": "system", "content": "Be kind."}], [{"role": "user", "content": " "}]):
        assert http.post("/v1/chat/completions", json={"messages": messages, "remember": "user"}).status_code == 200
    assert written(engine) == []
    error_of(ask(http, remember="both", memory=None), 400)
