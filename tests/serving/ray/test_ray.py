"""`mplus serve --ray`: two engines, each memory at one of them, which are killed and replaced."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from urllib.parse import quote

import pytest

from benchmarks.serving.ray_owner import FACT, QUESTION, ask_at_once, engine_processes, hand_over, kill_owner

MEMORIES = [f"memory-{number}" for number in range(8)]


@pytest.fixture(scope="module")
def told(server):
    """Memories that know a fact, at both engines."""
    for memory in MEMORIES:
        server.ask("/v1/memories", {"id": memory})
        server.ask(f"/v1/memories/{memory}/write", {"text": FACT, "source": "fact"})
    assert {server.owner(memory) for memory in MEMORIES} == engine_processes()
    return server


def test_everybody_asks_one_memory_at_once_and_nobody_is_refused(told):
    found = ask_at_once(told, MEMORIES[0], 48)
    assert (found["refused"], found["equal_to_alone"]) == (0, 48)


def test_a_stream_comes_in_pieces_and_a_client_that_leaves_makes_room(told):
    body = {**QUESTION, "max_tokens": 600, "stream": True, "memory": MEMORIES[1]}
    request = urllib.request.Request(
        f"{told.address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        assert [next(reply)[:5] for _ in range(8)][::2] == [b"data:"] * 4
        assert told.metric("mplus_batch_rows") == 1
    until = time.monotonic() + 30
    while told.metric("mplus_batch_rows") and time.monotonic() < until:
        time.sleep(0.01)
    assert told.metric("mplus_batch_rows") == 0


def test_a_row_that_its_stop_string_ended_is_generated_no_further_by_the_engine_that_has_it(told):
    tokens = "mplus_generated_tokens_total"
    body = {**QUESTION, "memory": MEMORIES[4], "n": 2, "temperature": 1, "seed": 5, "max_tokens": 400}
    first, second = (choice["text"] for choice in told.ask("/v1/completions", body)["choices"])
    stop = next(f" {word} " for word in first.split()[3:] if f" {word} " not in second)
    before = told.metric(tokens)
    answer = told.ask("/v1/completions", {**body, "stop": stop})
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert [choice["text"] for choice in answer["choices"]] == [first.partition(stop)[0], second]
    assert told.metric(tokens) - before < 700, "all of both rows are 800"


def test_a_source_of_any_name_is_forgotten(told):
    name = "a/b ?#%<b>\n"
    told.ask(f"/v1/memories/{MEMORIES[2]}/write", {"text": FACT, "source": name})
    assert told.ask(f"/v1/memories/{MEMORIES[2]}/sources/{quote(name, safe='')}", method="DELETE")["rows"] > 0


def test_an_engine_is_killed_and_its_memories_are_served_on_while_writes_are_written_once(told):
    writes = []

    def write_on():
        for number in range(6):
            body = {"text": FACT, "source": f"write {number}"}
            writes.append(told.ask(f"/v1/memories/{MEMORIES[3]}/write", body)["tokens"])

    writer = threading.Thread(target=write_on)
    writer.start()
    found = kill_owner(told, MEMORIES[3])
    writer.join()
    assert found["same_answer"]
    assert found["last_write_there"]
    assert found["refused"] == 0
    sources = {one["name"]: one["tokens"] for one in told.ask(f"/v1/memories/{MEMORIES[3]}/sources")["data"]}
    assert [sources[f"write {number}"] for number in range(6)] == writes
    hand_over(told, MEMORIES)
    assert {told.owner(memory) for memory in MEMORIES} == engine_processes(), "the new engine has its share"
