"""LaMemo agrees with traces of its published code, and mistakes in it do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mplus_lamemo import published
from mplus_lamemo.attention import Attention
from mplus_lamemo.player import LaMemoPlayer
from mplus_lamemo.published import PublishedDecoder

from mplus.interop.golden import find_cases
from mplus.interop.report import CaseReport

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def players() -> dict[str, LaMemoPlayer]:
    return {name: LaMemoPlayer(GOLDENS / name, "auto", torch.float32) for name in ("lamemo_a", "lamemo_b")}


def played(player: LaMemoPlayer, *, reset: bool = False) -> CaseReport:
    report = CaseReport("case", "lamemo", "auto", "float32", tolerance=player.tolerance, scale=player.error_scale)
    for _ in player.play(report, reset=reset):
        report.steps += 1
    return report


@pytest.mark.parametrize("name", ["lamemo_a", "lamemo_b"])
@pytest.mark.parametrize("reset", [False, True])
def test_every_step_agrees(players: dict[str, LaMemoPlayer], name: str, reset: bool) -> None:
    report = played(players[name], reset=reset)
    assert report.steps == 15
    assert set(report.errors) == set(LaMemoPlayer.quantities)
    assert report.worst < 5e-6


def test_the_command_finds_the_player_by_its_name() -> None:
    assert [case.player() for case in find_cases(GOLDENS)] == [LaMemoPlayer, LaMemoPlayer]


def _patch(owner: Any, name: str, make: Any) -> Any:
    own = getattr(owner, name)
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(own))


def _merge(change: Any) -> Any:
    return _patch(published, "merged", lambda own: lambda carried, new, epsilon: change(own, carried, new, epsilon))


def _mean(own: Any, carried: Attention, new: Attention, epsilon: float) -> Any:
    found, alpha = own(carried, new, epsilon)
    return Attention((carried.vectors + new.vectors) / 2, found.mass), alpha


def _epsilon_in_mass(own: Any, carried: Attention, new: Attention, epsilon: float) -> Any:
    found, alpha = own(carried, new, epsilon)
    return Attention(found.vectors, found.mass + 1e-3), alpha


def _one_key_too_few(own: Any) -> Any:
    def keys(*given: int) -> tuple[int, int]:
        first, behind = own(*given)
        return first, max(behind - 1, first + 1)

    return keys


MISTAKES = {
    "old and new change places": _merge(lambda own, carried, new, epsilon: own(new, carried, epsilon)),
    "the merge is a mean": _merge(_mean),
    "the mass is that of the new keys": _merge(
        lambda own, carried, new, epsilon: (Attention(own(carried, new, epsilon)[0].vectors, new.mass), new.mass * 0)
    ),
    "the mass is a little off": _merge(_epsilon_in_mass),
    "nothing is merged": _merge(lambda own, carried, new, epsilon: (carried, torch.ones_like(new.mass))),
    "one key too few": _patch(published, "lookahead_keys", _one_key_too_few),
    "one key too many": _patch(
        published, "lookahead_keys", lambda own: lambda *given: (own(*given)[0], min(own(*given)[1] + 1, given[1]))
    ),
    "all keys of the window": _patch(published, "lookahead_keys", lambda own: lambda *given: (1, own(*given)[1])),
    "places look at themselves": _patch(
        published,
        "looks_ahead",
        lambda own: lambda memory, first, behind: own(memory, first, behind) | own(memory, first + 1, behind + 1),
    ),
    "text sees one token ahead": _patch(
        published, "causal", lambda own: lambda memory, keys: own(memory, keys) | own(memory, keys).roll(1, 1)
    ),
    "the oldest places stay": _patch(
        Attention,
        "newest",
        lambda own: lambda self, count: Attention(self.vectors[:, :, :count], self.mass[:, :, :count]),
    ),
    "the gradient reaches earlier segments": _patch(Attention, "detach", lambda own: lambda self: self),
    "distances are not clamped, or by one less": _patch(
        PublishedDecoder,
        "_relative",
        lambda own: (
            lambda self, prefix, count: own(
                PublishedDecoder({**self.sizes, "clamp_len": self.sizes["clamp_len"] - 1}, self.named), prefix, count
            )
        ),
    ),
}


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "gradient" not in name])
def test_a_planted_mistake_shows(
    players: dict[str, LaMemoPlayer], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    MISTAKES[mistake](monkeypatch)
    assert not played(players["lamemo_b"]).passed()


def test_nothing_carried_has_a_graph(monkeypatch: pytest.MonkeyPatch, players: dict[str, LaMemoPlayer]) -> None:
    decoder = players["lamemo_a"].decoder
    named = {name: weight.detach().requires_grad_(True) for name, weight in decoder.named.items()}
    _, after = PublishedDecoder(decoder.sizes, named).segment(torch.tensor([[1, 2, 3, 4]]), decoder.empty(1))
    assert not after.embeddings.requires_grad
    assert not any(one.vectors.requires_grad or one.mass.requires_grad for one in after.attention)
    MISTAKES["the gradient reaches earlier segments"](monkeypatch)
    _, after = PublishedDecoder(decoder.sizes, named).segment(torch.tensor([[1, 2, 3, 4]]), decoder.empty(1))
    assert all(one.vectors.requires_grad for one in after.attention)
