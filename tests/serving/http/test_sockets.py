"""What takes a real connection: clients that leave, read nothing or send slowly, bodies that are refused, the end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest

from mplus.serving.config import Limits
from mplus.serving.http import gate
from mplus.serving.http.sockets import connections
from mplus.serving.http.sockets.listening import listen
from mplus.serving.http.sockets.server import make_server
from mplus.serving.messages import MemoryName
from tests.serving.http.engine import Kept, until

ENDLESS = {"prompt": "x", "ignore_eos": True, "max_tokens": 500, "memory": None}


class Served:
    """A server in a thread, with sockets that hold little."""

    def __init__(self, app) -> None:
        self.listening = listen("127.0.0.1", 0)
        self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.port = self.listening.getsockname()[1]
        self.server = make_server(app, grace=5)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))

    def connect(self) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.settimeout(10)
        made.connect(("127.0.0.1", self.port))
        return made

    def post(self, path: str, body: dict) -> socket.socket:
        """Send a request, and leave it to others to read the answer."""
        raw = json.dumps(body).encode()
        made = self.connect()
        made.sendall(head(path, f"content-length: {len(raw)}") + raw)
        return made

    def get(self, path: str) -> bytes:
        with closing(self.connect()) as made:
            made.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            return rest(made)


def head(path: str, *more: str, keep: bool = False) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *more]
    lines += [] if keep else ["connection: close"]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def rest(made: socket.socket) -> bytes:
    return b"".join(iter(lambda: made.recv(2**16), b""))


@pytest.fixture
def served(app):
    with serving(app) as found:
        yield found


@contextmanager
def serving(app):
    found = Served(app)
    found.thread.start()
    try:
        wait(lambda: found.server.started)
        yield found
    finally:
        found.server.should_exit = True
        found.thread.join(20)
        assert not found.thread.is_alive()
        found.listening.close()


def wait(holds) -> None:
    asyncio.run(until(holds))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_client_that_leaves_ends_its_answer(served, engine, stream, path):
    engine.pause = 0.01
    mine = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}[path]
    said = [{"role": "user", "content": "x"}] if mine == "messages" else "x"
    made = served.post(path, {mine: said, "ignore_eos": True, "stream": stream, "memory": None})
    wait(lambda: engine.running == 1 and engine.steps > 3)
    made.close()
    wait(lambda: engine.running == 0)
    steps = engine.steps
    assert steps < 200
    wait(lambda: not served.server.config.app.state.front.answers)
    assert engine.steps == steps


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_is_forgotten(served, engine, stream):
    engine.free = False
    made = served.post("/v1/completions", {**ENDLESS, "stream": stream})
    wait(lambda: engine.waiting == 1)
    made.close()
    wait(lambda: engine.waiting == 0)
    engine.free = True
    assert engine.steps == 0


def test_a_client_that_does_not_read_is_cut_off_and_others_are_served(app, served, engine, caplog):
    caplog.set_level("INFO", logger="mplus.serving")
    app.state.front.stream_room = 8
    engine.pause = 0.001
    made = served.post("/v1/completions", {**ENDLESS, "n": 16, "stream": True})
    wait(lambda: engine.running == 16)
    wait(lambda: engine.running == 0)
    assert engine.steps < 500, "it did not come to the end"
    assert b"200 OK" in served.get("/health")
    wait(lambda: any("reason=slow_reader" in record.getMessage() for record in caplog.records))
    made.close()


@pytest.mark.parametrize("how", ["declared", "chunked"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/memories/a/write"])
def test_a_body_that_is_too_long_is_refused_before_all_of_it_was_sent(served, how, path):
    with closing(served.connect()) as made:
        if how == "declared":
            made.sendall(head(path, f"content-length: {32 * 2**20 + 1}", keep=True) + b"{")
        else:
            made.sendall(head(path, "transfer-encoding: chunked", keep=True))
            for _ in range(17):  # of 64 KiB; the limit of these tests is 1 MiB
                made.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
        answer = b""
        while b'"code":"request_too_large"' not in answer:
            answer += made.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/memories/default/write", "/v1/memories/default/import"])
def test_bodies_that_come_too_slowly_are_refused(served, engine, monkeypatch, path):
    """Byte by byte as well as not at all, and nothing is asked of the engine or left on the disk."""
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with closing(served.connect()) as slow:
        slow.sendall(head(path, "content-length: 100") + b"{")
        assert b"200 OK" in served.get("/health")
        with suppress(OSError):
            for _ in range(100):
                slow.sendall(b" ")
                time.sleep(0.02)
        answer = rest(slow)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer
    assert engine.asked == []
    assert not any(kept.texts for kept in engine.memories.values())
    assert not list((served.server.config.app.state.front.config.memories / ".drafts").glob("*"))


def test_a_body_in_pieces_may_take_its_time(served, engine, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(gate, "SLOWEST", 10)
    raw = json.dumps({"text": "words " * 5, "source": "s"}).encode()
    with closing(served.connect()) as made:
        made.sendall(head("/v1/memories/default/write", f"content-length: {len(raw)}") + raw[:20])
        time.sleep(0.6)  # 20 bytes are good for 2 seconds
        made.sendall(raw[20:])
        assert rest(made).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", ["nothing", "a head byte by byte", "a second head"])
def test_heads_that_come_too_slowly_are_refused(served, engine, monkeypatch, sent):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with closing(served.connect()) as slow:
        if sent == "a second head":
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += slow.recv(2**16)
            time.sleep(0.5)  # idle between two requests: that has a time of its own
            slow.sendall(b"GET /hea")
        elif sent != "nothing":
            with suppress(OSError):
                for byte in b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: yes yes yes\r\n":
                    slow.sendall(bytes([byte]))
                    time.sleep(0.02)
        answer = rest(slow)
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert not served.server.server_state.connections


@pytest.mark.parametrize("sent", [b"no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2**17])
def test_what_is_no_http_is_refused_as_all_is(served, sent):
    with closing(served.connect()) as made:
        made.sendall(sent)
        answer = made.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_client_that_does_not_read_keeps_no_connection(served, engine, monkeypatch):
    """What is not streamed may be large as well: an export, a list of sources."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    engine.memories[MemoryName("local", "default")] = Kept({"s" * 1000: ["x" * 20_000_000]})
    made = served.connect()
    made.sendall(b"GET /v1/memories/default/export HTTP/1.1\r\nhost: localhost\r\n\r\n")
    wait(lambda: engine.called)
    wait(lambda: not served.server.server_state.connections)
    wait(lambda: not list((served.server.config.app.state.front.config.memories / ".drafts").glob("*")))
    assert b"200 OK" in served.get("/health")
    made.close()


def test_a_client_that_reads_slowly_gets_all_of_it(served, engine, monkeypatch):
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    text = "x" * 300_000
    engine.memories[MemoryName("local", "default")] = Kept({"s": [text]})
    with closing(served.connect()) as made:
        made.sendall(b"GET /v1/memories/default/export HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        got = b""
        while piece := made.recv(16384):
            got += piece
            time.sleep(0.02)
    assert text.encode() in got


def test_many_requests_at_once(served, engine):
    engine.free, engine.limits = False, Limits(waiting=32)
    made = [served.post("/v1/completions", {**ENDLESS, "max_tokens": 2}) for _ in range(200)]
    wait(lambda: len(engine.asked) == 200)
    assert b"200 OK" in served.get("/v1/memories/default")
    engine.free = True
    answers = [rest(one) for one in made]
    refused = [one for one in answers if one.startswith(b"HTTP/1.1 429")]
    assert len(refused) == 168
    assert all(b"retry-after: 1\r\n" in one for one in refused)
    assert sum(one.startswith(b"HTTP/1.1 200") for one in answers) == 32


def test_the_end_waits_for_answers_and_tells_who_comes_late(served, engine):
    engine.pause = 0.01
    made = served.post("/v1/completions", {**ENDLESS, "max_tokens": 50, "stream": True})
    wait(lambda: engine.running == 1)
    served.server.handle_exit(signal.SIGTERM, None)
    assert served.get("/ready").startswith(b"HTTP/1.1 503")
    assert served.get("/v1/models").startswith(b"HTTP/1.1 503")
    assert served.get("/health").startswith(b"HTTP/1.1 200")
    assert rest(made).rstrip(b"\r\n0").endswith(b"data: [DONE]")
    served.thread.join(10)
    assert engine.closed


def test_the_end_waits_for_writes_too(served, engine):
    engine.pause = 0.5
    made = served.post("/v1/memories/default/write", {"text": "words", "source": "s"})
    wait(lambda: engine.called)
    served.server.handle_exit(signal.SIGTERM, None)
    assert rest(made).startswith(b"HTTP/1.1 200")
    served.thread.join(10)


def test_a_write_that_takes_too_long_is_told(app, engine):
    engine.pause = 30
    with serving(app) as served:
        served.server._grace = served.server.config.timeout_graceful_shutdown = 0.1
        made = served.post("/v1/memories/default/write", {"text": "words", "source": "s"})
        wait(lambda: engine.called)
        served.server.handle_exit(signal.SIGTERM, None)
        answer = rest(made)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"shutting_down"' in answer


def test_an_answer_that_takes_too_long_ends_with_an_error(app, engine):
    engine.pause = 0.05
    with serving(app) as served:
        served.server._grace = 0.1
        streamed = served.post("/v1/completions", {**ENDLESS, "stream": True})
        whole = served.post("/v1/completions", ENDLESS)
        wait(lambda: engine.running == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        text = rest(streamed).decode()
        assert rest(whole).startswith(b"HTTP/1.1 503")
        served.thread.join(10)
    assert '"code":"shutting_down"' in text
    assert "[DONE]" not in text
    assert engine.running == 0
