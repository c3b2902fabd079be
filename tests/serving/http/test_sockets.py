"""What takes a real connection: clients that leave, read nothing or send slowly, bodies that are refused, the end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from contextlib import closing, contextmanager

import pytest

from mplus.serving.config import Limits
from mplus.serving.http import bodies
from mplus.serving.http.server import listen, make_server
from tests.serving.http.engine import until

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


def test_clients_that_send_slowly_hold_nobody_up(served, engine, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    with closing(served.connect()) as slow, closing(served.connect()) as slower:
        slower.sendall(b"POST /v1/comp")
        slow.sendall(head("/v1/completions", "content-length: 100") + b"{")
        assert b"200 OK" in served.get("/health")
        assert rest(slow).startswith(b"HTTP/1.1 408")
    assert engine.asked == []


def test_many_requests_at_once(served, engine):
    engine.free, engine.limits = False, Limits(waiting=32)
    made = [served.post("/v1/completions", {**ENDLESS, "max_tokens": 2}) for _ in range(60)]
    wait(lambda: len(engine.asked) == 60)
    engine.free = True
    answers = [rest(one) for one in made]
    refused = [one for one in answers if one.startswith(b"HTTP/1.1 429")]
    assert len(refused) == 28
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
