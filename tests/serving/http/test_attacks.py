"""Requests that are made to hurt: bodies that cost more than they weigh, odd headers; and files of keys, edited."""

from __future__ import annotations

import errno
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mplus.errors import ConfigError
from mplus.serving.config import Limits, ServeConfig
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys
from mplus.serving.http.memories import copies
from tests.serving.http.conftest import bearer, error_of

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
JSON = {"content-type": "application/json"}
MANY = 60_000


def many(item: str) -> str:
    return ",".join([item] * MANY)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, f'{{"prompt": [{many("-1")}]}}'), (TEXT, f'{{"prompt": [{many("{}")}]}}'),
        (TEXT, f'{{"prompt": [[{many("-1")}]]}}'), (TEXT, f'{{"prompt": "x", "stop": [{many("5")}]}}'),
        (CHAT, f'{{"messages": [{many("{}")}]}}'), (RESPONSES, f'{{"input": [{many("{}")}]}}'),
        (CHAT, f'{{"messages": [{{"role": "user", "content": [{many("{}")}]}}]}}'),
        ("/v1/memories/a/write", f'{{"source": "s", "messages": [{many("{}")}]}}'),
        (TEXT, json.dumps({"prompt": "x", **{f"a{n}": 1 for n in range(MANY)}})),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "x", **{f"a{n}": 1 for n in range(MANY)}}]})),
    ],
)  # fmt: skip
def test_many_faults_cost_no_more_than_one(http, engine, path, body):
    """Each of them had an error object of its own: 4 MiB of them took 77 seconds and 4 GB, while nobody was served."""
    assert len(body) < 2**20
    tracemalloc.start()
    try:
        error = error_of(http.post(path, content=body, headers=JSON), 400)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error["param"]
    assert peak < 24 * 2**20
    assert engine.asked == []


@pytest.mark.parametrize("host", ["[", "[::1", "]", "localhost@[", "example.org", "127.0.0.1.example.org", ""])
def test_hosts_that_are_none_are_refused(http, host):
    assert error_of(http.get("/v1/models", headers={"host": host}), 403)["code"] == "not_local"


@pytest.mark.parametrize("given", ["bytes=abc", "bytes=99999-", "lines=1", "bytes=0-0,2-2", "bytes=0-3", "bytes=-"])
def test_an_export_is_sent_whole_whatever_range_is_asked_for(http, given):
    http.post("/v1/memories", json={"id": "a"})
    http.post("/v1/memories/a/write", json={"text": "words", "source": "s"})
    whole = http.get("/v1/memories/a/export")
    part = http.get("/v1/memories/a/export", headers={"range": given})
    assert (part.status_code, part.content) == (200, whole.content)
    assert part.headers["accept-ranges"] == "none"


class FullDisk:
    """A file of a disk that is full, which says so where a buffer is written, as Python does at the end."""

    def __init__(self, when: str) -> None:
        self.when = when

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.when == "closed":
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, data: bytes) -> None:
        if self.when == "written":
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["written", "closed"])
def test_a_disk_that_is_full_while_an_import_comes_is_told(http, engine, monkeypatch, when):
    http.post("/v1/memories", json={"id": "a"})
    monkeypatch.setattr(Path, "open", lambda *_: FullDisk(when))
    response = http.post("/v1/memories/a/import", content=b"{} and so on")
    assert error_of(response, 507)["code"] == "insufficient_storage"
    assert not list((http.app.state.front.config.memories / ".drafts").glob("*"))


def test_imports_at_once_do_not_each_have_all_the_room(engine, tmp_path):
    config = ServeConfig(memories=tmp_path, limits=Limits(disk_bytes=5000))
    app = make_app(engine, config, Keys(tmp_path / "keys.json"))
    with TestClient(app, base_url="http://localhost") as http:
        http.post("/v1/memories", json={"id": "a"})
        room = copies.Room(app.state.front, "local", 4900)
        room.take(3000)
        error = error_of(http.post("/v1/memories/a/import", content=b"x" * 2000), 413)
        assert error["code"] == "quota_exceeded"
        room.give()
        assert error_of(http.post("/v1/memories/a/import", content=b"x" * 2000), 400)["code"] == "invalid_export"


def test_a_question_to_look_up_is_no_longer_than_a_prompt(http, engine):
    error = error_of(http.post("/v1/memories/default/search", json={"text": "dog " * 600}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "text")
    assert engine.called == []


BAD = [
    {"sha256": "\xe9" * 64}, {"sha256": None}, {"sha256": "abc"}, {"sha256": "A" * 64}, {"rights": "admin"},
    {"rights": ["king"]}, {"tenant": 5}, {"tenant": ""}, {"requests": "9"}, {"id": None}, {"revoked": 5},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_a_file_of_keys_that_was_spoilt_lets_nobody_in(engine, config, tmp_path, change):
    keys = Keys(tmp_path / "keys.json")
    record, key = keys.make("ada")
    text = keys.file.read_text()
    with TestClient(make_app(engine, config, keys), base_url="http://localhost") as http:
        assert http.get("/v1/models", headers=bearer(key)).status_code == 200
        content = json.loads(text)
        content["keys"][0].update(change)
        keys.file.write_text(json.dumps(content, ensure_ascii=False))
        time.sleep(0.01)
        for headers in ({}, bearer(key), bearer(f"mp-{record.id}-x")):
            error = error_of(http.get("/v1/models", headers=headers), 503)
            assert error["code"] == "keys_unreadable"
            assert str(tmp_path) not in error["message"]
        with pytest.raises(ConfigError, match="as `mplus keys` writes them"):
            Keys(keys.file).list()
        keys.file.write_text(text)
        assert http.get("/v1/models", headers=bearer(key)).status_code == 200
