"""Which engine owns a memory, when engines agree, and how many there are to be: what a server on Ray decides."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from mplus.errors import ConfigError, MemoryMismatchError
from mplus.serving.messages import DescribeUsage, Generate, ListMemories, ListSources, MemoryName
from mplus.serving.ray.agreement import agree
from mplus.serving.ray.placement import owner, placement_key
from mplus.serving.ray.scaling import WAITING_PER_ENGINE, Engines, WantedEngines

KEYS = [placement_key(ListSources(MemoryName("tenant", f"memory-{number}"))) for number in range(600)]


def test_whatever_is_about_a_memory_has_one_owner_in_whatever_order_engines_are_listed():
    memory = MemoryName("ada", "notes")
    keys = {placement_key(ListSources(memory)), placement_key(Generate("ada", memory, [1]))}
    assert len(keys) == 1
    (key,) = keys
    assert owner(key, ["a", "b", "c"]) == owner(key, ["c", "a", "b"])


def test_what_is_about_no_memory_goes_anywhere():
    assert {placement_key(one) for one in (ListMemories("ada"), DescribeUsage("ada"), Generate("ada", None, [1]))} == {
        ""
    }


def test_a_key_names_nobody():
    assert "ada" not in placement_key(ListSources(MemoryName("ada", "ada")))
    assert placement_key(ListSources(MemoryName("a", "b"))) != placement_key(ListSources(MemoryName("b", "a")))


def test_memories_are_spread_and_few_move_when_an_engine_goes_or_comes():
    three = {key: owner(key, "abc") for key in KEYS}
    assert all(150 < count < 250 for count in Counter(three.values()).values())
    two = {key: owner(key, "ab") for key in KEYS}
    assert all(two[key] == three[key] for key in KEYS if three[key] != "c"), "only those of the engine that went"


def test_engines_of_one_decoder_agree_and_another_decoder_is_refused(tmp_path):
    agree(tmp_path, "server", {"base": "1", "adapters": "2"})
    agree(tmp_path, "server", {"base": "1", "adapters": "2"})
    with pytest.raises(MemoryMismatchError, match="first engine in adapters, layers"):
        agree(tmp_path, "server", {"base": "1", "adapters": "3", "layers": 4})
    agree(tmp_path, "the next start", {"base": "5"})
    assert sorted(json.loads(file.read_text())["base"] for file in tmp_path.iterdir()) == ["1", "5"]


def told(engines, waiting, running):
    metrics = {"requests_waiting": {"a": waiting}, "requests_running": {"a": running}}
    return SimpleNamespace(current_num_replicas=engines, aggregated_metrics=metrics)


@pytest.mark.parametrize(
    ("engines", "waiting", "running", "wanted"),
    [
        (1, 0, 0, 1),
        (1, WAITING_PER_ENGINE, 32, 1),
        (1, WAITING_PER_ENGINE + 1, 32, 2),
        (2, 5 * WAITING_PER_ENGINE, 64, 5),
        (2, 0, 16, 1),
        (2, 0, 17, 2),
        (2, 1, 0, 2),
    ],
)
def test_engines_come_where_requests_wait_and_go_where_the_others_have_room(engines, waiting, running, wanted):
    assert WantedEngines(places=32)(told(engines, waiting, running)) == (wanted, {})


def test_before_any_engine_has_said_anything_nothing_changes():
    assert WantedEngines(32)(SimpleNamespace(current_num_replicas=1, aggregated_metrics=None)) == (1, {})


def test_a_number_of_engines_that_is_none_is_refused():
    assert (Engines.parse("1-8", {}).fewest, Engines.parse("3", {}).most) == (1, 3)
    for wrong in ("", "0", "4-2", "-1", "two", "1-"):
        with pytest.raises(ConfigError):
            Engines.parse(wrong, {})
