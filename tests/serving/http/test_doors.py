"""Who may come in: keys, rights, tenants; what is free; and what every request leaves in the log and the metrics."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from mplus.errors import ConfigError
from mplus.serving.http.app import make_app
from mplus.serving.http.keys import Keys, rights_of
from tests.serving.http.conftest import ADMIN, bearer, error_of
from tests.serving.http.engine import until

HELLO = {"prompt": "Hello", "max_tokens": 2}


@pytest.fixture
def ada(keyed):
    """The headers of a key of the tenant ada."""
    return new_key(keyed, tenant="ada")[1]


def new_key(client, **body):
    made = client.post("/v1/admin/keys", json=body, headers=bearer(ADMIN)).json()
    return made["id"], bearer(made["key"])


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"), ("POST", "/v1/embeddings"), ("GET", "/v1/memories"), ("POST", "/v1/memories"),
    ("DELETE", "/v1/memories/a"), ("POST", "/v1/memories/a/write"), ("POST", "/v1/memories/a/import"),
    ("GET", "/v1/memories/a/export"), ("GET", "/v1/usage"), ("GET", "/v1/admin/keys"), ("POST", "/v1/admin/keys"),
    ("DELETE", "/v1/admin/keys/x"), ("GET", "/v1/nothing"), ("GET", "/metrics"), ("GET", "/nothing"),
    ("GET", "/health/"), ("GET", "/./v1/models"), ("GET", "/%68ealth"),
]  # fmt: skip
WRONG = [
    {}, {"authorization": ""}, bearer(""), bearer("mp-"), bearer("mp-abc-def"), bearer(ADMIN[:-1]), bearer(ADMIN + "x"),
    {"authorization": f"Basic {ADMIN}"}, {"authorization": ADMIN}, {"x-api-key": ADMIN}, {"authorization": "Bearer"},
]  # fmt: skip


@pytest.mark.parametrize(("verb", "path"), ROUTES)
def test_nothing_is_answered_without_a_key(keyed, engine, verb, path):
    for headers in WRONG:
        response = keyed.request(verb, path, headers=headers, content=b"[" * 5000)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert engine.called == engine.asked == []


def test_what_is_free(keyed):
    assert keyed.get("/health").status_code == 200
    assert keyed.get("/ready").status_code == 200
    page = keyed.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.text.startswith("<!doctype html>")


def test_keys_are_made_and_revoked_at_once(keyed, tmp_path):
    key_id, headers = new_key(keyed, tenant="ada")
    key = headers["authorization"].removeprefix("Bearer ")
    assert key.startswith(f"mp-{key_id}-")
    assert len(key) >= 3 + len(key_id) + 1 + 43, "32 random bytes"
    assert keyed.get("/v1/models", headers=headers).status_code == 200
    listed = keyed.get("/v1/admin/keys", headers=bearer(ADMIN))
    assert [one["id"] for one in listed.json()["data"]] == [key_id]
    stored = (tmp_path / "keys.json").read_text()
    secret = key.rpartition("-")[2]
    assert secret not in listed.text
    assert secret not in stored
    assert json.loads(stored)["keys"][0]["tenant"] == "ada"
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
    assert keyed.delete(f"/v1/admin/keys/{key_id}", headers=bearer(ADMIN)).json()["id"] == key_id
    error_of(keyed.get("/v1/models", headers=headers), 401)
    error_of(keyed.delete(f"/v1/admin/keys/{key_id}", headers=bearer(ADMIN)), 404)
    assert keyed.get("/v1/admin/keys", headers=bearer(ADMIN)).json() == {"data": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "tenant"), ({"tenant": ""}, "tenant"), ({"tenant": "../x"}, "tenant"), ({"tenant": 5}, "tenant"),
     ({"tenant": "a", "rights": []}, "rights"), ({"tenant": "a", "rights": ["all"]}, "rights"),
     ({"tenant": "a", "rights": "read"}, "rights"),
     ({"tenant": "a", "requests": 0}, "requests"), ({"tenant": "a", "key": "x"}, "key")],
)  # fmt: skip
def test_keys_with_bad_fields(keyed, body, param):
    assert error_of(keyed.post("/v1/admin/keys", json=body, headers=bearer(ADMIN)), 400)["param"] == param


def test_rights(keyed, ada):
    for verb, path in (("GET", "/v1/admin/keys"), ("POST", "/v1/admin/keys"), ("GET", "/metrics")):
        assert error_of(keyed.request(verb, path, headers=ada), 403)["type"] == "permission_error"
    _, reads = new_key(keyed, tenant="ada", rights=["read"])
    assert keyed.post("/v1/completions", json=HELLO, headers=reads).status_code == 200
    assert keyed.get("/v1/memories", headers=reads).status_code == 200
    chat = {"messages": [{"role": "user", "content": "x"}], "remember": "user"}
    for verb, path in (
        ("POST", "/v1/memories"), ("DELETE", "/v1/memories/a"), ("POST", "/v1/memories/a/write"),
        ("POST", "/v1/memories/a/flush"), ("POST", "/v1/memories/a/fork"), ("POST", "/v1/memories/a/import"),
        ("DELETE", "/v1/memories/a/sources/x"), ("POST", "/v1/chat/completions"),
    ):  # fmt: skip
        assert error_of(keyed.request(verb, path, headers=reads, json=chat), 403)["code"] == "permission_denied"
    _, writes = new_key(keyed, tenant="ada", rights=["write"])
    assert keyed.post("/v1/memories", json={"id": "w"}, headers=writes).status_code == 200
    error_of(keyed.get("/v1/memories", headers=writes), 403)


def test_a_key_may_have_a_limit_of_requests_at_once(keyed, engine):
    _, two = new_key(keyed, tenant="ada", requests=2)
    _, free = new_key(keyed, tenant="ada")
    engine.free = False
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(keyed.post, "/v1/completions", json=HELLO, headers=two) for _ in range(2)]
        asyncio.run(until(lambda: engine.waiting == 2))
        refused = keyed.get("/v1/models", headers=two)
        assert error_of(refused, 429)["code"] == "too_many_requests"
        assert refused.headers["retry-after"] == "1"
        assert keyed.get("/v1/models", headers=free).status_code == 200
        engine.free = True
        assert [one.result().status_code for one in running] == [200, 200]
    assert keyed.get("/v1/models", headers=two).status_code == 200
    assert keyed.get("/v1/admin/keys", headers=bearer(ADMIN)).json()["data"][0]["requests"] == 2


def test_memories_of_another_tenant_are_not_there(keyed, ada):
    _, bob = new_key(keyed, tenant="bob")
    keyed.post("/v1/memories", json={"id": "notes"}, headers=ada)
    keyed.post("/v1/memories/notes/write", json={"text": "Ada's", "source": "s"}, headers=ada)
    for verb, path in (
        ("GET", ""), ("DELETE", ""), ("GET", "/sources"), ("GET", "/sources/s/text"), ("DELETE", "/sources/s"),
        ("GET", "/export"), ("POST", "/flush"),
    ):  # fmt: skip
        error = error_of(keyed.request(verb, f"/v1/memories/notes{path}", headers=bob), 404)
        assert error["code"] == "memory_not_found"
    error_of(keyed.post("/v1/completions", json={**HELLO, "memory": "notes"}, headers=bob), 404)
    assert keyed.get("/v1/memories", headers=bob).json()["data"] == []
    assert keyed.post("/v1/memories", json={"id": "notes"}, headers=bob).status_code == 200
    assert keyed.get("/v1/memories/notes/sources", headers=bob).json()["data"] == []
    assert len(keyed.get("/v1/memories/notes/sources", headers=ada).json()["data"]) == 1


def test_without_keys_only_programs_of_this_machine_are_answered(http):
    assert http.post("/v1/completions", json=HELLO, headers=bearer("EMPTY")).status_code == 200
    same = {"origin": "http://localhost", "host": "localhost"}
    assert http.post("/v1/completions", json=HELLO, headers=same).status_code == 200
    for headers in ({"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"origin": "http://evil.example"},
                    {"origin": "null"}, {"host": "10.0.0.1"}, {"host": ""}):  # fmt: skip
        error = error_of(http.post("/v1/completions", json=HELLO, headers=headers), 403)
        assert error["code"] == "not_local"
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost:80"):
        assert http.get("/health", headers={"host": host}).status_code == 200
    assert error_of(http.post("/v1/admin/keys", json={"tenant": "a"}), 403)["code"] == "no_admin_key"


def test_a_first_key_closes_the_server_and_revoking_it_does_not_open_it(http, tmp_path):
    keys = Keys(tmp_path / "keys.json")  # as another process has it
    record, key = keys.make("ada")
    error_of(http.get("/v1/models"), 401)
    assert http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert keys.revoke(record.id)
    assert not keys.revoke(record.id)
    error_of(http.get("/v1/models", headers=bearer(key)), 401)
    error_of(http.get("/v1/models"), 401)
    (tmp_path / "keys.json").unlink()
    error_of(http.get("/v1/models"), 503)


def test_a_damaged_file_of_keys_lets_nobody_in(tmp_path):
    for text in ("", "{}", '{"keys": [{"id": "a"}]}', "[]", '{"keys": 5}'):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(ConfigError, match=r"keys\.json must be a file of keys"):
            Keys(tmp_path / "keys.json").caller("mp-a-b")
    with pytest.raises(ConfigError, match="rights must be some of read, write, admin, got all"):
        rights_of(["read", "all"])
    with pytest.raises(ConfigError, match="got none"):
        rights_of([])


def test_request_ids(http):
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "", "x" * 65, "<b>", "a\tb"):
        given = http.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert given != odd
        assert len(given) == 32


def test_one_line_of_the_log_for_each_request(keyed, ada, caplog):
    caplog.set_level(logging.INFO, logger="mplus.serving")
    keyed.post("/v1/completions", json={**HELLO, "memory": None}, headers={**ada, "x-request-id": "r1"})
    keyed.get("/v1/memories/secret-name", headers={**ada, "x-request-id": "r2"})
    keyed.get("/v1/models", headers={"x-request-id": "r3"})
    lines = [record.getMessage() for record in caplog.records if "request id=r" in record.getMessage()]
    assert len(lines) == 3
    first, second, third = (dict(part.split("=", 1) for part in line.split()[1:]) for line in lines)
    assert (first["status"], first["route"], first["tokens"], first["reason"]) == (
        "200", "/v1/completions", "2", "length",
    )  # fmt: skip
    assert int(first["prompt"]) > 0
    assert float(first["first"]) >= 0
    assert (second["status"], second["route"], second["reason"]) == ("404", "/v1/memories/{memory_id}", "error")
    assert first["tenant"] == second["tenant"] != third["tenant"] == "-"
    assert "ada" not in lines[0]
    assert "secret-name" not in lines[1]
    assert third["status"] == "401"


def test_metrics(keyed, ada):
    keyed.post("/v1/completions", json={**HELLO, "memory": None}, headers=ada)
    keyed.get("/v1/memories/secret-name", headers=ada)
    keyed.post("/v1/completions", json={**HELLO, "memory": "secret-name"}, headers=ada)
    text = keyed.get("/metrics", headers=bearer(ADMIN)).text
    assert 'mplus_requests_total{reason="length",route="/v1/completions",status="200"} 1.0' in text
    assert 'route="/v1/memories/{memory_id}",status="404"} 1.0' in text
    assert 'mplus_requests_total{reason="error",route="/v1/completions",status="404"} 1.0' in text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    named = {(sample.name, frozenset(sample.labels.items())) for sample in samples}
    assert len(named) == len(samples), "Prometheus refuses a sample that is there twice"
    for line in (
        "mplus_requests_running 0.0", "mplus_requests_waiting 0.0", "mplus_time_to_first_token_seconds_count 1.0",
        "mplus_open_memories 0.0", "mplus_generated_tokens_total 2.0",
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    assert "secret" not in text
    assert "ada" not in text.replace("_created", "")


def test_open_metrics(engine, config, tmp_path):
    app = make_app(engine, config, Keys(tmp_path / "keys.json", ADMIN), metrics_open=True)
    with TestClient(app) as client:
        assert client.get("/metrics").status_code == 200
        error_of(client.get("/v1/models"), 401)
    assert engine.closed, "the app closes the engine when it ends"


def test_while_the_server_ends(keyed, ada):
    keyed.app.state.front.draining = True
    assert keyed.get("/health").status_code == 200
    for path in ("/ready", "/v1/models", "/"):
        response = keyed.get(path, headers=ada)
        assert error_of(response, 503)["code"] == "shutting_down"
    assert response.headers["retry-after"] == "5"
