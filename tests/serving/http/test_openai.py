"""Chat completions, completions, responses and models over an engine in memory: what is sent, whole and streamed."""

from __future__ import annotations

import pytest

from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.serving.errors import ServingError
from tests.serving.http.conftest import error_of, frames
from tests.serving.http.engine import TOKENIZER, ids

SAID = "there was a little girl named Lily."
HELLO = {"messages": [{"role": "user", "content": "Once upon a time"}]}


def test_models(http):
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [one["id"] for one in listed["data"]] == ["stories"]
    assert http.get("/v1/models/stories").json() == listed["data"][0]
    assert listed["data"][0]["chat_template"] is False
    for other in ("other", "someone/other", "someone%2Fother"):
        assert error_of(http.get(f"/v1/models/{other}"), 404)["code"] == "model_not_found"
    assert error_of(http.post("/v1/embeddings", json={}), 404)["code"] == "unknown_route"


def test_a_chat_answer(http, engine):
    answer = http.post("/v1/chat/completions", json={**HELLO, "model": "stories", "seed": 5, "temperature": 0}).json()
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = TOKENIZER("Once upon a time")["input_ids"]
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids(SAID))}
    assert answer["usage"] == {**counts, "total_tokens": sum(counts.values())}
    assert answer["memory_version"] == 0
    asked = engine.asked[0]
    assert (list(asked.prompt), asked.memory.id, asked.sampling.seed, asked.sampling.temperature) == (
        prompt, "default", 5, 0,
    )  # fmt: skip
    assert asked.sampling.max_tokens == 512 - len(prompt)


def test_messages_without_a_template_are_joined_by_newlines(http, engine):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": parts},
    ]
    assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert list(engine.asked[0].prompt) == TOKENIZER("Be kind.\nYes?\nHello")["input_ids"]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant]"
)


def test_a_chat_template(http, engine, tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    engine.folder = str(tmp_path / "tokenizer")
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert http.get("/v1/models").json()["data"][0]["chat_template"] is True
    assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert TOKENIZER.decode(engine.asked[0].prompt) == "<s> [system] Be kind.\n[user] Hello\n[assistant]"
    assert list(engine.asked[0].prompt).count(TOKENIZER.bos_token_id) == 1
    refused = http.post("/v1/chat/completions", json={"messages": [*messages, {"role": "tool", "content": "x"}]})
    assert error_of(refused, 400)["param"] == "messages"
    assert "no tools" in refused.json()["error"]["message"]


def test_a_chat_stream(http):
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in response.headers
    *chunks, usage, done = frames(response.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2 * len(ids(SAID))
    assert len({chunk["id"] for chunk in chunks}) == 1
    for row in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == row]
        assert [choice["delta"].get("role") for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice["delta"].get("content", "") for choice in own) == SAID
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    without = frames(http.post("/v1/chat/completions", json={**HELLO, "stream": True}).text)
    assert not any("usage" in chunk for chunk in without[:-1]), "a usage chunk comes only when it was asked for"


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_several_prompts(http, engine, stream):
    body = {"prompt": ["One day", "Tim"], "n": 2, "max_tokens": 3, "stream": stream, "memory": None}
    response = http.post("/v1/completions", json=body)
    texts = dict.fromkeys(range(4), "")
    parts = frames(response.text)[:-1] if stream else [response.json()]
    for choice in (choice for part in parts for choice in part["choices"]):
        texts[choice["index"]] += choice["text"]
        assert choice["finish_reason"] in (("length", None) if stream else ("length",))
    assert set(texts.values()) == {TOKENIZER.decode(ids(SAID)[:3])}
    assert [list(asked.prompt) for asked in engine.asked] == [TOKENIZER(text)["input_ids"] for text in body["prompt"]]
    assert {asked.memory for asked in engine.asked} == {None}


def test_completions_of_token_ids(http, engine):
    assert http.post("/v1/completions", json={"prompt": [1, 403, 407]}).status_code == 200
    assert http.post("/v1/completions", json={"prompt": [[1, 403], [5]]}).json()["choices"][1]["index"] == 1
    assert [list(asked.prompt) for asked in engine.asked] == [[1, 403, 407], [1, 403], [5]]
    assert engine.asked[0].sampling.max_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_that_its_stop_string_ended_is_generated_no_further(http, engine, stream):
    engine.pause = 0.001
    engine.rows_say = {1: ids("One day Tom saw a big red dog in the park with his mom and dad.")}
    body = {"prompt": "x", "n": 3, "stop": "big", "max_tokens": 300, "ignore_eos": True, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    assert {row for _, row in engine.ended} == {1}
    used = frames(answer.text)[-2] if stream else answer.json()
    assert engine.steps == 300
    if not stream:
        assert [choice["finish_reason"] for choice in used["choices"]] == ["length", "stop", "length"]
        assert used["choices"][1]["text"].endswith("saw a ")
        assert used["usage"]["completion_tokens"] < 2 * 300 + 20


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_before_them(http, engine, stream):
    body = {"prompt": "x", "max_tokens": 100, "stop": ["zzz", "tle gi"], "stream": stream, "logprobs": 0}
    response = http.post("/v1/completions", json=body)
    parts = frames(response.text)[:-1] if stream else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    assert "".join(choice["text"] for choice in choices) == "there was a lit"
    assert choices[-1]["finish_reason"] == "stop"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]] if not stream else []
    assert stream or "".join(tokens).startswith(" there was a lit")
    assert engine.running == 0


def test_logprobs(http):
    chat = http.post("/v1/chat/completions", json={**HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2})
    first = chat.json()["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], bytes(first["bytes"])) == (" there", -0.5, b" there")
    assert [one["logprob"] for one in first["top_logprobs"]] == [-0.5, -9999.0]
    plain = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "logprobs": 1}).json()
    scored = plain["choices"][0]["logprobs"]
    assert scored["token_logprobs"] == [-0.5, -0.5]
    assert scored["text_offset"] == [0, 5]
    assert scored["top_logprobs"] == [{scored["tokens"][0]: -0.5}, {scored["tokens"][1]: -0.5}]


def test_max_tokens_is_cut_to_the_room_that_is_left(http, engine):
    body = {"prompt": "Once", "max_tokens": 2**20, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_responses(http, engine):
    body = {"model": "stories", "input": "Once", "instructions": "Be kind.", "store": False}
    whole = http.post("/v1/responses", json=body).json()
    assert whole["status"] == "completed"
    assert whole["output"][0]["content"][0]["text"] == SAID
    assert list(engine.asked[0].prompt) == TOKENIZER("Be kind.\nOnce")["input_ids"]
    events = frames(http.post("/v1/responses", json={**body, "stream": True, "max_output_tokens": 4}).text)
    assert events.pop() == "[DONE]"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said == TOKENIZER.decode(ids(SAID)[:4]) == events[-1]["response"]["output"][0]["content"][0]["text"]
    again = [
        {"role": "user", "content": [{"type": "input_text", "text": "Once"}]},
        {**whole["output"][0], "phase": None},
    ]
    assert http.post("/v1/responses", json={"input": again}).status_code == 200


def test_the_sources_that_came_back(http, engine):
    http.post("/v1/memories", json={"id": "ada"})
    http.post("/v1/memories/ada/write", json={"text": "Tom has a dog.", "source": "notes"})
    body = {**HELLO, "memory": "ada", "memory_sources": True, "min_score": 0}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["memory_version"] == 1
    assert answer["memory_sources"] == [{"source": "notes", "rows": 1, "score": 0.5, "age": 7, "written": None}]
    streamed = frames(http.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert streamed[0]["memory_sources"] == answer["memory_sources"]
    assert engine.asked[0].min_score == 0


def test_an_error_in_the_middle_of_a_stream_is_its_last_frame(http, engine):
    engine.fails = ServingError("the engine was lost", 503, "server_error", code="engine_lost")
    *chunks, last = frames(http.post("/v1/completions", json={"prompt": "x", "stream": True}).text)
    assert last["error"]["code"] == "engine_lost"
    assert len(chunks) == 3
    engine.fails = RuntimeError("secret path /home/someone")
    *_, last = frames(http.post("/v1/completions", json={"prompt": "x", "stream": True}).text)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in str(last)
    error = error_of(http.post("/v1/completions", json={"prompt": "x"}), 500)
    assert "secret" not in error["message"]


def test_a_request_that_the_engine_refuses_has_a_status_of_its_own_even_streamed(http, engine):
    body = {"prompt": "x", "memory": "nowhere", "stream": True}
    assert error_of(http.post("/v1/completions", json=body), 404)["code"] == "memory_not_found"
    engine.limits = engine.limits.__class__(waiting=1)
    engine.waiting = 1
    refused = http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert error_of(refused, 429)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"


def test_a_stream_that_waits_says_so(app, http, engine):
    app.state.front.comment_seconds = 0.01
    engine.pause = 0.1
    text = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}).text
    assert ": waiting\n\n" in text
    assert frames(text)[-1] == "[DONE]"


def test_while_there_is_no_engine(http, engine):
    engine.down = True
    for response in (http.post("/v1/completions", json={"prompt": "x"}), http.get("/v1/models"), http.get("/ready")):
        assert error_of(response, 503)["code"] == "engine_not_ready"
    assert http.get("/health").json() == {"status": "ok", "keys": False}
    engine.down = False
    assert http.get("/ready").status_code == 200
