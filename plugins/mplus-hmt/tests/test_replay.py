"""HMT agrees with traces of its published code, and mistakes in it do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_hmt import mechanism, player, recall
from mplus_hmt.mechanism import HMTMechanism
from mplus_hmt.player import HMTPlayer
from mplus_hmt.state import HMTState

from mplus.interop.golden import find_cases
from mplus.interop.report import CaseReport

GOLDENS = Path(__file__).parent / "goldens"
A, B = 0, 1


@pytest.fixture(scope="module")
def players() -> list[HMTPlayer]:
    """A player of each case, whose decoders all tests share."""
    return [HMTPlayer(GOLDENS / name, "auto", torch.float32) for name in ("hmt_a", "hmt_b")]


def played(one: HMTPlayer, *steps: int) -> CaseReport:
    """Play these steps of a case; all of them where none is named."""
    report = CaseReport("case", "hmt", "auto", "float32", tolerance=one.tolerance, tolerances=one.tolerances)
    report.scale = one.error_scale
    whole = one.case
    one.case = evolve(whole, steps=[whole.steps[step] for step in steps] or whole.steps)
    try:
        for _ in one.play(report):
            report.steps += 1
    finally:
        one.case = whole
    return report


@pytest.mark.parametrize("case", [A, B])
def test_every_step_agrees(players: list[HMTPlayer], case: int) -> None:
    report = played(players[case])
    assert report.steps == 11
    assert report.passed(), (report.errors, report.equal, report.differences)
    assert {*report.errors, *report.equal} == set(HMTPlayer.quantities)
    assert max(error for name, error in report.errors.items() if name != "recall in bfloat16") < 5e-6


def test_the_command_finds_the_player_by_its_name() -> None:
    assert [case.player() for case in find_cases(GOLDENS)] == [HMTPlayer, HMTPlayer]


# ---------------------------------------------------------------------- planted mistakes


def _recall_of(change: Any) -> Any:
    """Patch what ``recall`` returns, or is given, in all modules that call it."""
    own = recall.recall

    def patched(*given: Any, **named: Any) -> Any:
        return change(own, *given, **named)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mechanism, "recall", patched)
        monkeypatch.setattr(player, "recall", patched)

    return patch


def _scaled_by_width(own: Any, parts: Any, summary: Any, *rest: Any, **named: Any) -> Any:
    return own(parts, summary / parts.query.weight.shape[0] ** 0.5, *rest, **named)


def _values_are_keys(own: Any, parts: Any, summary: Any, memory: Any, lengths: Any, **named: Any) -> Any:
    found = own(parts, summary, memory, lengths, **named)
    return evolve(found, prompt=found.prompt.softmax(-1))


def _always_first(own: Any, parts: Any, summary: Any, *rest: Any, **named: Any) -> Any:
    return evolve(own(parts, summary, *rest, **named), prompt=parts.first_prompts(summary))


def _detached(own: Any, *given: Any, **named: Any) -> Any:
    found = own(*given, **named)
    return evolve(found, prompt=found.prompt.detach())


def _patch(owner: Any, name: str, make: Any) -> Any:
    own = getattr(owner, name)
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(own))


def _one_token_less(own: Any) -> Any:
    return property(lambda self: own.fget(self) - 1)


def _front_in_wrong_layers(own: Any) -> Any:
    return lambda *given: own(*given)[::-1]


def _no_closing_prompt(own: Any) -> Any:
    def passed(decoder: Any, prompt: Any, sensory: Any, text: Any, *rest: Any) -> Any:
        bare = SimpleNamespace(
            run=lambda whole, **named: decoder.run(whole[:, :-1], **{**named, "mask": None}),
        )
        return own(bare, prompt, sensory, text, *rest)

    return passed


def _closing_topic_missing(own: Any) -> Any:
    def passed(decoder: Any, *given: Any, **named: Any) -> Any:
        bare = SimpleNamespace(run=lambda whole, **others: decoder.run(whole[:, :-1], **{**others, "mask": None}))
        return own(bare, *given, **named)

    return passed


def _without_mask(own: Any) -> Any:
    return lambda decoder, prompt, sensory, text, adapter, mask=None: own(decoder, prompt, sensory, text, adapter)


def _one_sensory_token_less(own: Any) -> Any:
    return lambda self, ids, source, count: own(self, ids, source, count - 1)


def _first_tokens_are_sensory(own: Any) -> Any:
    return lambda self, ids, source, count: own(self, ids.flip(0), source, count)


def _newest_leaves(own: Any) -> Any:
    def absorbed(self: Any, state: Any, update: Any, source: int, context: Any) -> Any:
        store = context.store
        if store.count(0) == context.capacity:
            store.remove(0, store.ids(0)[-1:])
        return own(self, state, update, source, context)

    return absorbed


def _text_at_zero(own: Any) -> Any:
    return lambda self, *given: evolve(own(self, *given), text_offset=None)


def _oldest_is_the_prompt(own: Any) -> Any:
    def recalled(self: Any, decoder: Any, views: Any, *given: Any, **named: Any) -> Any:
        found = own(self, decoder, views, *given, **named)
        lists = [view.store.gather(0, view.store.ids(0)).need_hidden() for view in views]
        return evolve(found, prompt=torch.stack([one[:1] for one in lists])) if len(lists[0]) else found

    return recalled


def _softmax_once(own: Any) -> Any:
    return lambda scores, positives, twice=False: own(scores, positives)


def _sensory_not_read(own: Any) -> Any:
    return lambda decoder, prompt, sensory, adapter: own(decoder, prompt, [one * 0 for one in sensory], adapter)


MISTAKES = {
    "scores divided by h": (A, 0, _recall_of(_scaled_by_width)),
    "values are not the vectors": (A, 0, _recall_of(_values_are_keys)),
    "the first prompt is always read": (A, 0, _recall_of(_always_first)),
    "no gradient through recall": (A, 6, _recall_of(_detached)),
    "summary of one token less": (A, 0, _patch(HMTMechanism, "summary_tokens", _one_token_less)),
    "no closing topic prompt": (A, 0, _patch(mechanism, "summarised", _closing_topic_missing)),
    "no closing prompt": (A, 1, _patch(mechanism, "remembered", _no_closing_prompt)),
    "padding is seen": (B, 2, _patch(player, "remembered", _without_mask)),
    "one sensory token less": (A, 3, _patch(HMTState, "with_segment", _one_sensory_token_less)),
    "the first tokens are sensory": (A, 3, _patch(HMTState, "with_segment", _first_tokens_are_sensory)),
    "sensory tokens are not read": (A, 8, _patch(mechanism, "front_inputs", _sensory_not_read)),
    "the newest vector leaves": (A, 0, _patch(HMTMechanism, "absorb", _newest_leaves)),
    "learned positions: the text begins at 0": (B, 1, _patch(HMTMechanism, "open", _text_at_zero)),
    "stage 1 reads the oldest vector": (A, 3, _patch(HMTMechanism, "recalled", _oldest_is_the_prompt)),
    "one softmax in the retrieval loss": (A, 5, _patch(player, "retrieval_loss", _softmax_once)),
    "layers get each other's rows": (A, 8, _patch(mechanism, "front_inputs", _front_in_wrong_layers)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(players: list[HMTPlayer], monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    case, step, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert not played(players[case], step).passed()
