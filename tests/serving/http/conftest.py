"""A server over an engine in memory, and clients of it: without keys, and with the keys of two tenants."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from mplus.serving.config import Limits, ServeConfig
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys
from tests.serving.http.engine import RecordingEngine

ADMIN = "the-admin-key-of-the-tests"


@pytest.fixture
def engine():
    return RecordingEngine()


@pytest.fixture
def config(tmp_path):
    return ServeConfig(memories=tmp_path, limits=Limits(body_bytes=2**20))


@pytest.fixture
def app(engine, config, tmp_path):
    """Without keys."""
    return make_app(engine, config, Keys(tmp_path / "keys.json"))


@pytest.fixture
def http(app):
    """A client of a server without keys, on the same machine."""
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def keyed(engine, config, tmp_path):
    """A client without a key, of a server that needs one."""
    made = make_app(engine, config, Keys(tmp_path / "keys.json", ADMIN))
    with TestClient(made) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(response, status: int) -> dict:
    """The error object of a refused request, complete, and without a word of the server's insides."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    assert "site-packages" not in response.text
    return error


def frames(text: str) -> list:
    """The data of a stream's frames, parsed; the last is "[DONE]" where the stream has it."""
    data = [part.partition("data: ")[2] for part in text.split("\n\n") if "data: " in part]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
