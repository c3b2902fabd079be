"""The server over the real engine and the decoder that comes with mplus: texts, memories and copies end to end."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from starlette.testclient import TestClient

import mplus
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.serving.config import ServeConfig
from mplus.serving.engine.client import InProcessEngine
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys
from tests.serving.http.conftest import ADMIN, bearer, error_of, frames

STORY = "Lily has a red ball. Tom has a green dog. Sue ate a big pear in the park. "
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def decoder():
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism={"name": "kv"}))
    return ServedDecoder.of(model, load_tokenizer(), "stories260K")


@pytest.fixture(scope="module")
def server(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories")
    config = ServeConfig(memories=folder)
    with TestClient(make_app(InProcessEngine(decoder, config), config, Keys(folder / "keys.json", ADMIN))) as client:
        yield client


@pytest.fixture
def tenant(server, request):
    """Headers of a tenant of the test's own."""
    made = server.post("/v1/admin/keys", json={"tenant": request.node.name[:40].strip("[]")}, headers=bearer(ADMIN))
    return bearer(made.json()["key"])


def told(server, headers, name, text=STORY, source="story"):
    assert server.post("/v1/memories", json={"id": name}, headers=headers).status_code == 200
    report = server.post(f"/v1/memories/{name}/write", json={"text": text, "source": source}, headers=headers)
    assert report.status_code == 200, report.text
    return report.json()


def test_texts_are_those_of_the_decoder_alone(server, tenant, decoder):
    ids = torch.tensor([decoder.tokenizer("Once upon a time")["input_ids"]])
    with torch.no_grad():
        alone = load_decoder().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = decoder.tokenizer.decode(alone, skip_special_tokens=True)
    body = {"prompt": "Once upon a time", **GREEDY}
    for memory in ({"memory": None}, {}):  # one that was never written reads as none
        assert (
            server.post("/v1/completions", json={**body, **memory}, headers=tenant).json()["choices"][0]["text"] == text
        )
    streamed = frames(server.post("/v1/completions", json={**body, "stream": True}, headers=tenant).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text
    several = server.post("/v1/completions", json={**body, "n": 3, "prompt": ids.tolist() * 2}, headers=tenant).json()
    assert [choice["text"] for choice in several["choices"]] == [text] * 6
    scored = server.post("/v1/completions", json={**body, "logprobs": 2}, headers=tenant).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == [max(best.values()) for best in scored["logprobs"]["top_logprobs"]]
    again = [
        server.post("/v1/completions", json={**body, "temperature": 1, "seed": 7}, headers=tenant).json() for _ in "ab"
    ]
    assert again[0]["choices"] == again[1]["choices"]


def test_many_at_once_are_answered_as_alone(server, tenant):
    for place in range(4):
        told(server, tenant, f"m{place}", STORY * (place + 1))
    bodies = [{"prompt": f"Who has a ball? {place}", "memory": f"m{place % 4}", **GREEDY} for place in range(12)]

    def ask(body):
        return server.post("/v1/completions", json=body, headers=tenant).json()["choices"][0]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, bodies)) == alone


def test_a_memory_from_its_making_to_its_end(server, tenant):
    report = told(server, tenant, "notes", source="a/b ?#%")
    once = {**tenant, "idempotency-key": "once"}
    more = {"text": "Max saw a blue bird. " * 3, "source": "more"}
    first = server.post("/v1/memories/notes/write", json=more, headers=once).json()
    again = server.post("/v1/memories/notes/write", json=more, headers=once).json()
    assert (again["tokens"], again["chunks"]) == (first["tokens"], first["chunks"])
    other = server.post("/v1/memories/notes/write", json={**more, "text": "Else."}, headers=once)
    assert error_of(other, 409)["type"] == "conflict_error"
    sources = server.get("/v1/memories/notes/sources", headers=tenant).json()["data"]
    assert [one["name"] for one in sources] == ["a/b ?#%", "more"]
    assert sources[0]["chunks"] == report["chunks"]
    assert sources[0]["newest_age"] == first["tokens"]
    assert isinstance(sources[0]["newest_age"], int)
    found = server.post("/v1/memories/notes/search", json={"text": "Who saw a bird?", "k": 1}, headers=tenant).json()
    assert found["data"][0]["source"] == "more"
    body = {"prompt": "Who saw a bird?", "memory": "notes", "memory_sources": True, "min_score": 0, **GREEDY}
    answer = server.post("/v1/completions", json=body, headers=tenant).json()
    assert "more" in [one["source"] for one in answer["memory_sources"]]
    path = "/v1/memories/notes/sources/a%2Fb%20%3F%23%25"
    assert server.get(f"{path}/text", headers=tenant).json()["text"].startswith("Lily has a red ball.")
    assert server.delete(path, headers=tenant).json()["rows"] > 0
    error_of(server.delete(path, headers=tenant), 404)
    assert server.delete("/v1/memories/notes", headers=tenant).status_code == 200
    error_of(server.get("/v1/memories/notes/sources", headers=tenant), 404)


def archives() -> list[bytes]:
    """Archives that would write elsewhere, or claim to be larger than they are."""
    found = []
    for name, kind in (
        ("../evil", tarfile.REGTYPE),
        ("/evil", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("big", None),
    ):
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind or tarfile.REGTYPE, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
        entry.size = 5 if kind == tarfile.REGTYPE else 2**40 if kind is None else 0
        found.append(entry.tobuf() + b"words".ljust(512, b"\0") + b"\0" * 1024)
    return found


def test_texts_shorter_than_a_chunk_are_written_too(server, tenant):
    report = told(server, tenant, "short", "Hi.", "greeting")
    server.post("/v1/memories/short/flush", headers=tenant)
    (source,) = server.get("/v1/memories/short/sources", headers=tenant).json()["data"]
    assert (source["name"], source["tokens"]) == ("greeting", report["tokens"])


def test_copies(server, tenant):
    told(server, tenant, "one")
    assert server.post("/v1/memories/one/fork", json={"id": "two"}, headers=tenant).status_code == 200
    sent = server.get("/v1/memories/one/export", headers=tenant).content
    server.post("/v1/memories", json={"id": "three"}, headers=tenant)
    flipped = bytearray(sent)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (b"", b"garbage", sent[: len(sent) // 2], bytes(flipped), *archives()):
        refused = server.post("/v1/memories/three/import", content=damaged, headers=tenant)
        assert refused.status_code in {400, 409}, refused.text
        error_of(refused, refused.status_code)
        assert server.get("/v1/memories/three/sources", headers=tenant).json()["data"] == []
    taken = server.post("/v1/memories/three/import", content=sent, headers=tenant)
    assert taken.status_code == 200, taken.text
    error_of(server.post("/v1/memories/three/import", content=sent, headers=tenant), 409)
    listed = [server.get(f"/v1/memories/{name}/sources", headers=tenant).json() for name in ("one", "two", "three")]
    assert listed[0] == listed[1] == listed[2]


def test_what_was_said_is_remembered_once(server, tenant):
    chat = {"messages": [{"role": "user", "content": "I am Ada and I like green tea."}], "remember": "both", **GREEDY}
    reports = [server.post("/v1/chat/completions", json=chat, headers=tenant).json() for _ in "ab"]
    assert not any("memory_error" in one for one in reports)
    (source,) = server.get("/v1/memories/default/sources", headers=tenant).json()["data"]
    text = server.get(f"/v1/memories/default/sources/{source['name']}/text", headers=tenant).json()["text"]
    assert text.count("I am Ada and I like green tea.") == 1
    assert reports[1]["memory_version"] >= 2


def test_prompts_that_the_engine_would_refuse_are_refused_before(server, tenant):
    long = {"prompt": "dog " * 600}
    assert error_of(server.post("/v1/completions", json=long, headers=tenant), 400)["code"] == "context_length_exceeded"
    assert error_of(server.post("/v1/completions", json={"prompt": [512]}, headers=tenant), 400)["param"] == "prompt"
    assert server.get("/v1/models", headers=tenant).json()["data"][0]["mechanism"] == "kv"
