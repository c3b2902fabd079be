"""Bodies and paths that break a rule: an error of the right status that names the field, and nothing is asked or
written; see also test_doors, for who may come in, and test_sockets, for what takes a connection."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from mplus.serving.config import Limits, ServeConfig
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys
from tests.serving.http.conftest import error_of
from tests.serving.http.engine import RecordingEngine

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}
GOOD = {CHAT: {"messages": HELLO}, TEXT: {"prompt": "Hello"}, RESPONSES: {"input": "Hello"}}


@pytest.fixture(scope="module")
def engine():
    return RecordingEngine()


@pytest.fixture(scope="module")
def http(engine, tmp_path_factory):
    """One server for all bad requests, which it takes one after the other."""
    folder = tmp_path_factory.mktemp("memories")
    config = ServeConfig(memories=folder, limits=Limits(body_bytes=2**20))
    with TestClient(make_app(engine, config, Keys(folder / "keys.json")), base_url="http://localhost") as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_happens(engine):
    engine.called.clear()
    yield
    assert engine.asked == []
    assert not any(kept.texts for kept in engine.memories.values())


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"null", b"5", b'"text"', b"no JSON", b'{"prompt": "x"} more',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "temperature": -Infinity}', b"{" * 5000,
        b"[" * 5000, b'{"prompt":' * 5000, b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00x"}', b'{"prompt": "\xff"}',
        b"{'prompt': 'x'}", '{"prompt": "x"}'.encode("utf-16"), b'{"n": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [TEXT, CHAT, "/v1/memories"])
def test_bodies_that_are_no_object(http, path, raw):
    error = error_of(http.post(path, content=raw, headers=JSON), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_content_types(http, media):
    error = error_of(http.post(TEXT, content=b'{"prompt": "x"}', headers={"content-type": media}), 415)
    assert error["code"] == "unsupported_media_type"


RANGES = [
    *(("temperature", value) for value in (-0.1, 2.1, "1", True, 10**400, [1])),
    *(("top_p", value) for value in (-1, 0, 1.1, "1", False, 10**400)),
    *(("n", value) for value in (-1, 0, 17, 1.0, "1", True, 10**30)),
    *(("max_tokens", value) for value in (-1, 0, 2**20 + 1, 1.5, "8", True, 10**400)),
    *(("seed", value) for value in (0.5, "1", True, 2**63, -(2**63) - 1)),
    *(("min_score", value) for value in (-1, "0", True)),
    *(("stream", value) for value in ("yes", 1, 0, "true", [])),
    *(("memory_sources", value) for value in ("yes", 1)),
    *(("model", value) for value in (5, True, ["stories"])),
    *(("stop", value) for value in ("", ["a", ""], list("abcde"), 5, [5], ["a" * 2000], {})),
    *(("stream_options", value) for value in (True, {"include_usage": "yes"}, {"wrong": True})),
]


@pytest.mark.parametrize(("field", "value"), RANGES)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_values_out_of_range_and_of_the_wrong_type(http, path, field, value):
    body = {"stream": True, **GOOD[path], field: value} if field == "stream_options" else {**GOOD[path], field: value}
    assert error_of(http.post(path, json=body), 400)["param"] == field


@pytest.mark.parametrize("value", [-1, 0, 2**20 + 1, 1.5, "8", True])
def test_other_names_for_the_number_of_tokens(http, value):
    for path, field in ((CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens")):
        assert error_of(http.post(path, json={**GOOD[path], field: value}), 400)["param"] == field


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "logprobs", 1), (CHAT, "logprobs", "yes"), (CHAT, "top_logprobs", 21), (CHAT, "top_logprobs", -1),
        (TEXT, "logprobs", 6), (TEXT, "logprobs", -1), (TEXT, "logprobs", True), (TEXT, "logprobs", 1.0),
        (CHAT, "remember", "all"), (CHAT, "remember", True), (CHAT, "conversation", ""),
        (CHAT, "conversation", "c" * 1025), (RESPONSES, "store", True), (RESPONSES, "truncation", "auto"),
        (RESPONSES, "instructions", 5), (TEXT, "remember", "user"),
    ],
)  # fmt: skip
def test_fields_of_single_routes(http, path, field, value):
    assert error_of(http.post(path, json={**GOOD[path], field: value}), 400)["param"] == field


def test_fields_that_do_not_go_together(http):
    for body in ({"n": 16, "max_tokens": 2**17}, {"top_logprobs": 2}, {"stream_options": {"include_usage": True}},
                 {"max_tokens": 5, "max_completion_tokens": 6}, {"n": 16, "max_completion_tokens": 2**17}):  # fmt: skip
        assert error_of(http.post(CHAT, json={**GOOD[CHAT], **body}), 400)["param"] in body
    error = error_of(http.post(CHAT, json={**GOOD[CHAT], "memory": None, "remember": "user"}), 400)
    assert error["param"] == "remember"


UNSUPPORTED = [
    (CHAT, "tools", [{"type": "function"}]), (CHAT, "tool_choice", "auto"), (CHAT, "functions", [{}]),
    (CHAT, "response_format", {"type": "json_object"}), (CHAT, "frequency_penalty", 0.5), (CHAT, "presence_penalty", 1),
    (CHAT, "logit_bias", {"5": 1}), (CHAT, "user", "ada"), (CHAT, "store", True), (CHAT, "metadata", {}),
    (CHAT, "parallel_tool_calls", False), (CHAT, "reasoning_effort", "low"), (CHAT, "modalities", ["audio"]),
    (TEXT, "best_of", 2), (TEXT, "echo", True), (TEXT, "suffix", "x"), (TEXT, "logit_bias", {}), (TEXT, "user", "ada"),
    (TEXT, "frequency_penalty", 1), (TEXT, "presence_penalty", 1),
    (RESPONSES, "previous_response_id", "resp_1"), (RESPONSES, "tools", [{}]), (RESPONSES, "background", True),
    (RESPONSES, "reasoning", {}), (RESPONSES, "text", {"format": {}}), (RESPONSES, "include", ["x"]),
    (RESPONSES, "metadata", {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field", "value"), UNSUPPORTED)
def test_fields_of_openai_that_are_not_supported(http, path, field, value):
    error = error_of(http.post(path, json={**GOOD[path], field: value}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize("path", GOOD)
def test_unknown_fields(http, path):
    for name in ("temprature", "<b>", "a" * 10_000):
        error = error_of(http.post(path, json={**GOOD[path], name: 1}), 400)
        assert (error["param"], error["code"]) == (name[:100], "unknown_field")
        assert len(error["message"]) < 200


MESSAGES = [
    [], "Hello", [5], [None], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}],
    [{"role": "king", "content": "x"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x", "wrong": 1}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], None,
]  # fmt: skip


@pytest.mark.parametrize("messages", MESSAGES)
def test_messages(http, messages):
    assert error_of(http.post(CHAT, json={"messages": messages}), 400)["param"] == "messages"
    if messages != "Hello":
        assert error_of(http.post(RESPONSES, json={"input": messages}), 400)["param"] == "input"


def test_the_fault_in_a_list_is_named(http):
    error = error_of(
        http.post(CHAT, json={"messages": [*HELLO, {"role": "user", "content": [{"type": "image"}]}]}), 400
    )
    assert error["message"].startswith("messages.1.content.")
    error = error_of(http.post(RESPONSES, json={"input": [{"role": "user", "content": "x", "wrong": 1}]}), 400)
    assert error["message"] == "unknown field: input.0.wrong"


def test_required_fields(http):
    for path, field in ((CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input"), ("/v1/memories", "id")):
        assert error_of(http.post(path, json={}), 400)["param"] == field


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        {},
        [],
        [[]],
        [""] * 33,
        [1, "x"],
        [[1], "x"],
        [[1], []],
        [True],
        [1.0],
        [-1],
        [512],
        [2**40],
        [[1], [512]],
    ],
)
def test_prompts(http, prompt):
    assert error_of(http.post(TEXT, json={"prompt": prompt}), 400)["param"] == "prompt"


@pytest.mark.parametrize("count", [512, 3_000, 100_000])
def test_prompts_that_are_longer_than_the_context(http, count):
    words = "dog " * count
    assert len(words) < 2**20
    for path, body in ((TEXT, {"prompt": words}), (CHAT, {"messages": [{"role": "user", "content": words}]}),
                       (TEXT, {"prompt": [7] * count})):  # fmt: skip
        error = error_of(http.post(path, json={**body, "stream": True}), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("messages" if path == CHAT else "prompt")
        assert any(int(word) >= 512 for word in error["message"].split() if word.isdigit())


def test_another_model(http):
    for path, body in GOOD.items():
        error = error_of(http.post(path, json={**body, "model": "gpt-4"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


BAD_IDS = [
    "",
    "..",
    ".",
    "a/b",
    "../x",
    "a" * 129,
    "a" * 300,
    "a\nb",
    "a\n",
    "a\0",
    "\u202ea",
    "é",
    " a",
    "a b",
    "-a",
    "%2e",
]


@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_of_memories_in_bodies(http, name):
    assert error_of(http.post("/v1/memories", json={"id": name}), 400)["param"] == "id"
    assert error_of(http.post("/v1/memories/default/fork", json={"id": name}), 400)["param"] == "id"
    for path, body in GOOD.items():
        assert error_of(http.post(path, json={**body, "memory": name}), 400)["param"] == "memory"
    for wrong in (5, True, ["a"], {}):
        assert error_of(http.post(TEXT, json={**GOOD[TEXT], "memory": wrong}), 400)["param"] == "memory"


@pytest.mark.parametrize(
    "segment", ["%2e%2e", "a%2Fb", "%00", "a%0A", "%E2%80%AEa", "a" * 300, "%ff", "%20a", "..%2f..%2fetc", "%252e"]
)
def test_ids_of_memories_in_paths(http, engine, segment):
    assert error_of(http.get(f"/v1/memories/{segment}"), 400)["param"] == "id"
    for verb, rest in (("GET", "sources"), ("POST", "flush"), ("GET", "export"), ("DELETE", "sources/x")):
        assert error_of(http.request(verb, f"/v1/memories/{segment}/{rest}"), 400)["param"] == "id"
    assert engine.called == []


def test_ids_keep_their_case(http):
    assert http.post("/v1/memories", json={"id": "Ada"}).status_code == 200
    assert http.get("/v1/memories/Ada").status_code == 200
    assert error_of(http.get("/v1/memories/ada"), 404)["code"] == "memory_not_found"


WRITES = [
    ({"source": "s"}, "text"), ({"text": "", "source": "s"}, "text"), ({"text": " \n", "source": "s"}, "text"),
    ({"text": 5, "source": "s"}, "text"), ({"text": "x"}, "source"), ({"text": "x", "source": ""}, "source"),
    ({"text": "x", "source": "s" * 1025}, "source"), ({"text": "x", "source": "s" * 100_000}, "source"),
    ({"text": "x", "source": ".."}, "source"), ({"text": "x", "source": 5}, "source"),
    ({"text": "x", "source": "s", "wrong": 1}, "wrong"), ({"text": "x", "source": "s", "pin": "yes"}, "pin"),
    ({"text": "x", "source": "s", "expires": 0}, "expires"), ({"text": "x", "source": "s", "expires": -5}, "expires"),
    ({"text": "x", "source": "s", "expires": True}, "expires"),
    ({"text": "x", "source": "s", "expires": 1e300}, "expires"),
    ({"messages": [], "source": "s"}, "messages"), ({"messages": [{"role": "x"}], "source": "s"}, "messages"),
    ({"text": "x", "messages": [{"role": "user", "content": "x"}], "source": "s"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), WRITES)
def test_writes(http, body, param):
    http.post("/v1/memories", json={"id": "ada"})
    error = error_of(http.post("/v1/memories/ada/write", json=body), 400)
    assert error["param"] in ((param, None) if param == "text" else (param,) if param else ("text", "messages", None))


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "a\tb"])
def test_idempotency_keys(http, key):
    http.post("/v1/memories", json={"id": "ada"})
    body = {"text": "x", "source": "s"}
    error = error_of(http.post("/v1/memories/ada/write", json=body, headers={"idempotency-key": key}), 400)
    assert error["param"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=1001", "limit=x", "limit=1.5", "limit=%D9%A1", "wrong=1"]
)
def test_lists(http, query):
    assert error_of(http.get(f"/v1/memories?{query}"), 400)["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "text"), ({"text": ""}, "text"), ({"text": "x", "k": 0}, "k"), ({"text": "x", "k": 101}, "k"),
     ({"text": "x", "k": 1.0}, "k"), ({"text": "x", "k": True}, "k"), ({"text": "x", "wrong": 1}, "wrong")],
)  # fmt: skip
def test_searches(http, body, param):
    assert error_of(http.post("/v1/memories/default/search", json=body), 400)["param"] == param


def test_routes_and_verbs(http):
    for path in ("/v1/nothing", "/nothing", "/v1/", "/v1/memories/", "/v1/memories/a/", "/docs", "/openapi.json",
                 "/v1/memories/a/sources/", "/v1/memories/a/nothing", "/v1/chat/completions/"):  # fmt: skip
        assert error_of(http.get(path), 404)["code"] == "unknown_route", path
    for verb, path in (("GET", TEXT), ("DELETE", "/v1/models"), ("PUT", "/v1/memories"), ("POST", "/health"),
                       ("PATCH", "/v1/memories/a"), ("GET", "/v1/memories/a/write")):  # fmt: skip
        assert error_of(http.request(verb, path), 405)["code"] == "method_not_allowed"


def test_a_body_that_is_too_long(http):
    big = b'{"prompt": "' + b"x" * 2**20 + b'"}'
    error = error_of(http.post(TEXT, content=big, headers=JSON), 413)
    assert error["code"] == "request_too_large"
    pieces = (b"x" * 2**16 for _ in range(17))
    assert error_of(http.post(TEXT, content=pieces, headers=JSON), 413) == error


def test_huge_and_odd_numbers_in_json(http):
    for raw in (b"1e999", b"-1e999", b"1e-400x", b"01"):
        body = b'{"prompt": "x", "temperature": ' + raw + b"}"
        error_of(http.post(TEXT, content=body, headers=JSON), 400)
