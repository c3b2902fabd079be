"""The routes for memories: what the engine is asked, names in paths, copies as streams, and their limits."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from attrs import evolve
from starlette.testclient import TestClient

from mplus.serving import drafts
from mplus.serving.config import Limits
from mplus.serving.errors import ServingError
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys
from mplus.serving.messages import (
    DeleteMemory,
    DescribeUsage,
    FlushMemory,
    ForgetSource,
    ForkMemory,
    ListMemories,
    MakeMemory,
    MemoryName,
    ReadSource,
    SearchMemory,
    WriteMemory,
)
from tests.serving.http.conftest import error_of

ADA = MemoryName("local", "ada")
NAMES = ["notes", "a/b", "/", "?#%<b>", "a b", "%2F", "语言🙂", "..hidden", "x" * 1024, "a\tb", "text", "a/text"]


@pytest.fixture
def ada(http):
    http.post("/v1/memories", json={"id": "ada"})
    return "/v1/memories/ada"


def test_what_the_engine_is_asked(http, engine, ada):
    http.post(f"{ada}/write", json={"text": "x", "source": "s", "expires": 60, "pin": True})
    messages = [{"role": "user", "content": "Hi", "name": "Ada"}]
    http.post(
        f"{ada}/write",
        json={"messages": messages, "source": "s", "expires": "2030-01-01T00:00:00Z"},
        headers={"idempotency-key": "once"},
    )
    http.post(f"{ada}/flush")
    http.post(f"{ada}/search", json={"text": "x", "k": 2})
    http.get(f"{ada}/sources/s/text")
    http.delete(f"{ada}/sources/s")
    http.post(f"{ada}/fork", json={"id": "copy"})
    http.get("/v1/memories?limit=5&after=ada")
    http.get("/v1/usage")
    http.delete(ada)
    assert engine.called == [
        MakeMemory(ADA),
        WriteMemory(ADA, "x", "s", 60, True, None),
        WriteMemory(ADA, messages, "s", "2030-01-01T00:00:00Z", False, "once"),
        FlushMemory(ADA),
        SearchMemory(ADA, "x", 2),
        ReadSource(ADA, "s"),
        ForgetSource(ADA, "s"),
        ForkMemory(ADA, "copy"),
        ListMemories("local", 5, "ada"),
        DescribeUsage("local"),
        DeleteMemory(ADA),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_sources_in_paths(http, ada, name):
    assert http.post(f"{ada}/write", json={"text": "words", "source": name}).status_code == 200
    path = f"{ada}/sources/{quote(name, safe='')}"
    assert [one["name"] for one in http.get(f"{ada}/sources").json()["data"]] == [name]
    assert http.get(f"{path}/text").json() == {"name": name, "text": "'words'"}
    assert http.delete(path).json() == {"rows": 1}
    assert error_of(http.delete(path), 404)["code"] == "source_not_found"


def test_a_source_whose_name_would_name_the_memory_deletes_nothing(http, engine, ada):
    """A client may take ``..`` out of a path before it sends it, so no source is called so; see the bad writes."""
    for path in (f"{ada}/", f"{ada}/sources/"):
        error_of(http.delete(path), 404)
    assert ADA in engine.memories
    long = quote("x" * 1025)
    assert error_of(http.delete(f"{ada}/sources/{long}"), 400)["param"] == "source"
    assert error_of(http.delete(f"{ada}/sources/%ff"), 400)["param"] == "source"


def test_lists_page_by_page(http):
    for name in ("b", "a", "c"):
        http.post("/v1/memories", json={"id": name})
    first = http.get("/v1/memories?limit=2").json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["b", "a"], True)
    rest = http.get("/v1/memories?limit=2&after=a").json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["c"], False)
    assert error_of(http.post("/v1/memories", json={"id": "a"}), 409)["type"] == "conflict_error"


def test_idempotency(http, ada):
    once, body = {"idempotency-key": "once"}, {"text": "words", "source": "s"}
    first = http.post(f"{ada}/write", json=body, headers=once)
    assert http.post(f"{ada}/write", json=body, headers=once).json() == first.json()
    assert http.get(f"{ada}/sources").json()["data"] == [{"name": "s", "chunks": 1}]
    other = http.post(f"{ada}/write", json={**body, "text": "other"}, headers=once)
    assert error_of(other, 409)["code"] == "idempotency_conflict"


def left_over(config) -> list:
    folder = config.memories / drafts.FOLDER
    return list(folder.iterdir()) if folder.is_dir() else []


def test_copies(http, engine, config, ada):
    http.post(f"{ada}/write", json={"text": "words", "source": "s"})
    sent = http.get(f"{ada}/export")
    assert sent.headers["content-disposition"] == 'attachment; filename="ada.mplus"'
    assert sent.headers["content-type"] == "application/octet-stream"
    http.post("/v1/memories", json={"id": "bob"})
    pieces = (sent.content[at : at + 3] for at in range(0, len(sent.content), 3))
    assert http.post("/v1/memories/bob/import", content=pieces).json() == {"id": "bob"}
    assert engine.memories[MemoryName("local", "bob")].texts == {"imported": [sent.text]}
    assert error_of(http.post("/v1/memories/bob/import", content=sent.content), 409)["code"] == "memory_not_empty"
    assert error_of(http.post("/v1/memories/none/import", content=sent.content), 404)["code"] == "memory_not_found"
    http.post("/v1/memories", json={"id": "eve"})
    for damaged in (b"", b"garbage"):
        assert error_of(http.post("/v1/memories/eve/import", content=damaged), 400)["code"] == "invalid_export"
    error_of(http.get("/v1/memories/none/export"), 404)
    assert left_over(config) == []


@pytest.mark.parametrize("declared", [True, False])
def test_an_import_ends_at_the_quota_of_the_tenants_disk(engine, config, tmp_path, declared):
    limits = Limits(body_bytes=1000, disk_bytes=5000)
    app = make_app(engine, evolve(config, limits=limits), Keys(tmp_path / "keys.json"))
    with TestClient(app, base_url="http://localhost") as client:
        client.post("/v1/memories", json={"id": "ada"})
        for size, status in ((4901, 413), (4900, 400)):  # the engine says that 100 bytes are used
            body = b"x" * size
            content = body if declared else (body[at : at + 700] for at in range(0, size, 700))
            response = client.post("/v1/memories/ada/import", content=content)
            assert error_of(response, status)["code"] == ("quota_exceeded" if status == 413 else "invalid_export")
    assert left_over(config) == []


def test_an_import_while_the_disk_is_full(http, config, ada, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr(drafts.tempfile, "NamedTemporaryFile", full)
    for verb, path in (("POST", f"{ada}/import"), ("GET", f"{ada}/export")):
        response = http.request(verb, path, content=b"x" if verb == "POST" else None)
        assert error_of(response, 507)["code"] == "insufficient_storage"
        assert "secret" not in response.text


def test_errors_of_the_engine_keep_their_status(http, engine, ada):
    for status, kind in ((409, "conflict_error"), (413, "invalid_request_error"), (507, "server_error")):
        engine.refuses = ServingError("as the engine says", status, kind, code="its_code", param="text")
        told = error_of(http.post(f"{ada}/write", json={"text": "x", "source": "s"}), status)
        assert told == {"message": "as the engine says", "type": kind, "param": "text", "code": "its_code"}
