"""``mplus serve`` as people start it, with ``mplus keys`` beside it: answered, remembered, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mplus.cli import app
from mplus.cli.serving import serve as serving
from mplus.hf.pretrained.shipped import STORIES260K

ADMIN = "an-admin-key"


class Started:
    """A server in a process, and a client of it."""

    def __init__(self, folder, *options, line=r"http://127\.0\.0\.1:\d+") -> None:
        self.log, self.key = folder / "log", ADMIN
        command = [sys.executable, "-m", "mplus.cli", "serve", str(STORIES260K), "--memories", str(folder / "memories")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--mechanism", "kv", "--port", "0", "--threads", "1", *options],
                stderr=log, env={**os.environ, "MPLUS_ADMIN_KEY": ADMIN},
            )  # fmt: skip
        self.until(lambda: re.search(line, self.log.read_text()))
        self.url = re.search(line, self.log.read_text())[0]

    def until(self, holds) -> None:
        end = time.monotonic() + 300
        while not holds():
            assert time.monotonic() < end, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def open(self, path, body=None):
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers))

    def ask(self, path, body=None):
        try:
            with self.open(path, body) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def test_a_server_from_its_start_to_its_end(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Lily has a red ball."}], "max_tokens": 4, "temperature": 0}
    keys = ["--memories", str(tmp_path / "memories")]
    server = Started(tmp_path, "--grace", "1")
    try:
        assert server.ask("/ready")[0] in {200, 503}
        server.key = CliRunner().invoke(app, ["keys", "make", "ada", *keys]).stdout.strip()
        second = CliRunner().invoke(app, ["keys", "make", "bob", *keys]).stdout.strip()
        server.until(lambda: server.ask("/ready")[0] == 200)
        status, answer = server.ask("/v1/chat/completions", {**chat, "remember": "user", "conversation": "talk"})
        assert (status, answer["usage"]["completion_tokens"], "memory_error" in answer) == (200, 4, False)
        assert [one["name"] for one in server.ask("/v1/memories/default/sources")[1]["data"]] == ["talk"]
        assert server.ask("/v1/chat/completions", chat)[1]["memory_version"] > 0
        assert CliRunner().invoke(app, ["keys", "revoke", server.key.split("-")[1], *keys]).exit_code == 0
        assert server.ask("/v1/models")[0] == 401
        begun = threading.Event()
        said: list[bytes] = []

        def listen() -> None:
            body = {**chat, "max_tokens": 400, "ignore_eos": True, "stream": True}
            with server.open("/v1/chat/completions", body) as answer:
                for line in answer:
                    said.append(line)
                    begun.set()

        listening = threading.Thread(target=listen)
        server.key = second
        listening.start()
        assert begun.wait(60)
    finally:
        code = server.stop()
    listening.join(30)
    assert any(word in said[-2] + said[-1] for word in (b"[DONE]", b"shutting_down")), said[-3:]
    lines = server.log.read_text().splitlines()
    assert code == 0, lines
    assert any("route=/v1/chat/completions status=200" in line and "reason=length" in line for line in lines)


def test_a_server_that_is_stopped_while_it_loads_leaves_no_process(tmp_path):
    server = Started(tmp_path, line="loading .*this takes some seconds")
    server.until(lambda: len(children(server.process.pid)) > 1)  # the engine, and what multiprocessing has beside it
    others = children(server.process.pid)
    server.stop()
    end = time.monotonic() + 120
    while any((Path("/proc") / str(pid)).exists() for pid in others):
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.1)


def children(pid) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def refused(*options) -> str:
    result = CliRunner().invoke(app, ["serve", str(STORIES260K), *map(str, options)])
    assert result.exit_code == 2
    return result.stderr


def test_options_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.delenv(serving.ADMIN_KEY, raising=False)
    here = ("--memories", tmp_path)
    assert "--host must be 127.0.0.1 without an admin key" in refused(*here, "--host", "0.0.0.0")
    assert "--host must be 127.0.0.1 without an admin key" in refused(*here, "--host", "example.org")
    assert "--ram must be" in refused(*here, "--ram", "much")
    assert "--tenant-disk must be" in refused(*here, "--tenant-disk", "0")
    (tmp_path / "empty").write_text("\n")
    assert "is empty" in refused(*here, "--admin-key-file", tmp_path / "empty")
    assert "must be a text file" in refused(*here, "--admin-key-file", tmp_path / "none")
    (tmp_path / "key").write_text("123456789012345\n")
    elsewhere = ("--admin-key-file", tmp_path / "key", "--host", "203.0.113.7")
    assert "must have at least 16 characters, so that nobody finds it by trying, got 15" in refused(*here, *elsewhere)
    (tmp_path / "key").write_text("1234567890123456\n")
    assert "cannot listen on" in refused(*here, *elsewhere)


def test_keys(tmp_path):
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["keys", *arguments, "--memories", str(tmp_path)])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    assert run("list") == "no valid keys: mplus keys make TENANT makes one\n"
    first = run("make", "ada").strip()
    second = json.loads(run("make", "bob", "--rights", "read", "--json"))
    assert (second["tenant"], second["rights"]) == ("bob", ["read"])
    listed = run("list").splitlines()
    assert [line.split()[-1] for line in listed] == ["ada", "bob"]
    assert first not in run("list", "--json")
    run("revoke", first.split("-")[1])
    assert "there is no valid key" in run("revoke", first.split("-")[1], code=2)
    assert [one["id"] for one in json.loads(run("list", "--json"))] == [second["id"]]
    assert "a tenant must be" in run("make", "../x", code=2)
    assert "rights must be some of" in run("make", "ada", "--rights", "all", code=2)
    tmp_path /= "nowhere"
    assert f"must be the folder of a server's memories, and there is none at {tmp_path}" in run("list", code=2)


@pytest.mark.parametrize(("given", "bytes_"), [("1000", 1000), ("1KiB", 1024), ("1.5GB", 1_500_000_000)])
def test_numbers_of_bytes(given, bytes_):
    assert serving._bytes(given, "--ram") == bytes_
