"""The released code's traces are replayed, and fail where anything of what it computes is another thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_memlong import MemLongMechanism, mechanism, reading
from mplus_memlong.eviction import make_room
from mplus_memlong.player import MemLongPlayer
from mplus_memlong.search import GroupSearch
from mplus_memlong.state import MemLongState

from mplus.errors import MechanismError
from mplus.interop.golden import replay
from mplus.interop.report import CaseReport

GOLDENS = Path(__file__).parent / "goldens"
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("case", ["memlong_a", "memlong_b"])
def test_traces_of_the_released_code_are_replayed(case: str) -> None:
    [report] = replay(GOLDENS / case)
    assert report.passed(), (report.errors, report.differences)
    assert max(error for name, error in report.errors.items() if "last place" not in name) < 5e-6
    skipped = ["step 14 (decode)", "step 15 (decode)"] if case == "memlong_a" else []
    assert list(report.skipped) == skipped


def test_every_step_is_right_from_the_recorded_bank() -> None:
    [report] = replay(GOLDENS / "memlong_b", backend="reference", reset=True)
    assert report.passed(), (report.errors, report.differences)
    assert report.errors["retrieved rows (units in the last place)"] == 0


# ---------------------------------------------------------------------- mistakes


def rotated_at_one(patch: Patch) -> None:
    own = reading.ReadGroups._tables

    def tables(self: Any, factor: int, layer: int, hidden: Any) -> Any:
        if self.positions != "zero":
            return own(self, factor, layer, hidden)
        return self.kept.tables(layer, hidden, torch.ones(1, max(self.lengths), dtype=torch.int64))

    patch.setattr(reading.ReadGroups, "_tables", tables)


def text_from_zero(patch: Patch) -> None:
    own = MemLongMechanism.open

    def opened(self: Any, *given: Any) -> Any:
        found = own(self, *given)
        return evolve(found, text_offset=None if found.text_offset is None else found.text_offset - 1)

    patch.setattr(MemLongMechanism, "open", opened)


def turned_once_only(patch: Patch) -> None:
    own = reading.ReadGroups._tables
    patch.setattr(reading.ReadGroups, "_tables", lambda self, factor, layer, hidden: own(self, 1, layer, hidden))


def best_groups_first(patch: Patch) -> None:
    own = GroupSearch.best

    def best(self: Any, *given: Any) -> Any:
        groups, scores = own(self, *given)
        order = scores.argsort(descending=True)
        return groups[order], scores[order]

    patch.setattr(GroupSearch, "best", best)


def one_group_more(patch: Patch) -> None:
    own = GroupSearch.best
    patch.setattr(
        GroupSearch, "best", lambda self, query, state, store, count: own(self, query, state, store, count + 1)
    )


def rows_of_the_layer_above(patch: Patch) -> None:
    own = MemLongMechanism.write

    def write(self: Any, *given: Any) -> Any:
        layer = self.additions.memory_layer
        self.additions.memory_layer = layer + 1
        try:
            return own(self, *given)
        finally:
            self.additions.memory_layer = layer

    patch.setattr(MemLongMechanism, "write", write)


def read_in_one_layer_only(patch: Patch) -> None:
    own = MemLongMechanism.prefix

    def prefix(self: Any, opened: Any, layer: int, *given: Any) -> Any:
        last = self.additions.read_layers[-1]
        return own(self, opened, layer, *given) if layer == last else None

    patch.setattr(MemLongMechanism, "prefix", prefix)


def gate_the_other_way(patch: Patch) -> None:
    own = reading.attend_gated
    patch.setattr(mechanism, "attend_gated", lambda gate, *given: own(-gate, *given))


def gate_on_what_attention_gives(patch: Patch) -> None:
    def attend(gate: Any, request: Any, compute: Any) -> Any:
        share = gate.sigmoid()[:, None, None]
        text = compute(evolve(request, segments=(), joined=None)).output
        found = compute(request)
        return evolve(found, output=share * found.output + (1 - share) * text)

    patch.setattr(mechanism, "attend_gated", attend)


def asked_with_the_first_tokens(patch: Patch) -> None:
    own = MemLongMechanism._ids
    patch.setattr(MemLongMechanism, "_ids", lambda self, text, row: own(self, text, row)[:2])


def not_asked_anew(patch: Patch) -> None:
    patch.setattr(MemLongMechanism, "reopen", lambda self, decoder, opened, text, rows: opened)


def whole_groups_leave(patch: Patch) -> None:
    def half(state: Any, tokens: int, context: Any, limits: Any, room: Any) -> Any:
        return make_room(state, tokens, context, evolve(limits, evict="half"), room)

    patch.setattr(mechanism, "make_room", half)


def nothing_is_rounded(patch: Patch) -> None:
    patch.setattr(MemLongMechanism, "dtype", property(lambda self: None))


def groups_are_shifted_by_a_token(patch: Patch) -> None:
    own = MemLongState.places

    def places(self: Any, groups: Any) -> Any:
        return (own(self, groups) + 1).clamp(max=self.tokens - 1)

    patch.setattr(MemLongState, "places", places)


def rows_share_a_bank(patch: Patch) -> None:
    own = MemLongMechanism.open
    patch.setattr(
        MemLongMechanism, "open", lambda self, decoder, views, text: own(self, decoder, [views[0]] * len(views), text)
    )


def keys_are_of_the_whole_chunk(patch: Patch) -> None:
    own = MemLongMechanism.write

    def write(self: Any, *given: Any) -> Any:
        update = own(self, *given)
        beside = [{"group_key": one["group_key"].mean(0).expand_as(one["group_key"])} for one in update.beside]
        return evolve(update, beside=tuple(beside))

    patch.setattr(MemLongMechanism, "write", write)


MISTAKES: dict[Callable[[Patch], None], str] = {
    rotated_at_one: "memlong_a",
    text_from_zero: "memlong_a",
    not_asked_anew: "memlong_a",
    turned_once_only: "memlong_b",
    best_groups_first: "memlong_a",
    one_group_more: "memlong_b",
    rows_of_the_layer_above: "memlong_b",
    read_in_one_layer_only: "memlong_b",
    gate_the_other_way: "memlong_b",
    gate_on_what_attention_gives: "memlong_b",
    asked_with_the_first_tokens: "memlong_b",
    whole_groups_leave: "memlong_b",
    nothing_is_rounded: "memlong_b",
    groups_are_shifted_by_a_token: "memlong_b",
    rows_share_a_bank: "memlong_b",
    keys_are_of_the_whole_chunk: "memlong_b",
}


@pytest.fixture(scope="module")
def players() -> dict[str, MemLongPlayer]:
    """A player of each case, which can begin again and again."""
    return {case: MemLongPlayer(GOLDENS / case, "auto", torch.float32) for case in sorted(set(MISTAKES.values()))}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found(
    mistake: Callable[[Patch], None], players: dict[str, MemLongPlayer], monkeypatch: Patch
) -> None:
    player = players[MISTAKES[mistake]]
    player.memory = None
    mistake(monkeypatch)
    report = CaseReport(
        player.folder.name, "memlong", "auto", "float32", tolerances=player.tolerances, scale=player.error_scale
    )
    try:
        for _ in player.play(report):
            report.steps += 1
            if not report.passed():
                return
    except MechanismError:  # more groups than it says: refused before anything is compared
        assert mistake is one_group_more
        return
    pytest.fail(f"{mistake.__name__} was not found: {report.errors}")
