"""What a case may be beside a trace of M+: bounds and measures, skipped steps, JSON files, a missing player."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mplus.cli import app
from mplus.errors import CheckpointError
from mplus.interop import BehaviourPlayer, CaseReport, TracePlayer, Unavailable, replay
from mplus.interop.golden import REPLAYS, STEPS

GOLDENS = Path(__file__).parents[1] / "goldens"


class HalfPlayer(TracePlayer):
    """Is off by 1e-3 in everything, and skips the last step."""

    quantities = ("logits", "bank")
    tolerance = 2e-3
    tolerances = {"bank": 1e-4}  # noqa: RUF012 - as a package writes it

    def __len__(self):
        return 2

    def play(self, report, *, reset=False):
        report.measure("logits", "step 0", torch.tensor([1.001]), torch.tensor([1.0]))
        yield
        report.skip("step 1 (decode)", "the [local] cache overflows")
        yield


class ColourPlayer(BehaviourPlayer):
    system = "colours"

    def compute(self, name, given):
        if name == "hidden":
            raise Unavailable("nobody sees it")
        return {"colour": given["colour"], "place": [1, 2.0 + given.get("off", 0.0)]}


@pytest.fixture(autouse=True)
def players():
    REPLAYS.register("half", HalfPlayer)
    REPLAYS.register("colours", ColourPlayer)
    yield
    REPLAYS.unregister("half")
    REPLAYS.unregister("colours")


def colour(number, *, name="seen", system="colours", expected=None, **given):
    right = {"colour": given.get("colour", "red"), "place": [1, 2.0]}
    given = {"colour": "red", **given}
    expected = right if expected is None else expected
    return {"id": f"c-{number}", "system": system, "behaviour": name, "given": given, "expected": expected}


def folder_with(folder, *cases, model="half"):
    if model:
        (folder / "a").mkdir()
        (folder / "a" / STEPS).write_text(json.dumps({"model": model}))
    if cases:
        (folder / "text.json").write_text(json.dumps({"what": "colours", "cases": list(cases)}))
    return folder


def run(folder):
    result = CliRunner().invoke(app, ["replay", str(folder)], env={"COLUMNS": "400"})
    return result.exit_code, result.output + (result.stderr or "")


# ---------------------------------------------------------------- bounds, measures, skipped steps


def test_a_player_says_its_bounds_and_what_cannot_be_had(tmp_path, monkeypatch):
    folder = folder_with(tmp_path)
    status, output = run(folder)
    assert status == 0, output
    assert "a: passed, 2 steps replayed (auto, float32); largest error 1.0e-03, allowed 0.002\n" in output
    assert "skipped: step 1 (decode): the [local] cache overflows" in output
    assert "1 of 1 cases passed; 1 steps skipped, as named above" in output
    monkeypatch.setattr(HalfPlayer, "tolerance", 5e-4)
    assert run(folder)[0] == 1
    monkeypatch.setattr(HalfPlayer, "tolerances", {"logits": 2e-3})
    status, output = run(folder)
    assert status == 0
    assert "max abs error 1.0e-03 (allowed 0.002)" in output


def test_a_case_of_which_everything_is_skipped_has_not_passed():
    report = CaseReport("case", "half", "sdpa", "float32", steps=1)
    report.demand("ids", "start", 1, 1)
    assert report.passed()
    report.skip("step 0", "for a reason")
    assert not report.passed(), "what was compared is the state before the first step"


def test_errors_are_measured_as_the_format_of_the_case_says():
    ours, recorded = torch.tensor([101.0, 1.0]), torch.tensor([100.0, 1.5])
    for scale, error in (("none", 1.0), ("entry", 0.5 / 2.5), ("tensor", 1.0 / 100)):
        report = CaseReport("case", "half", "sdpa", "float32", scale=scale)
        report.measure("logits", "there", ours, recorded)
        assert report.errors["logits"] == pytest.approx(error)
    report = CaseReport("case", "half", "sdpa", "float32", scale="tensor")
    report.measure("logits", "there", torch.tensor([0.5]), torch.tensor([0.25]))
    assert report.errors["logits"] == 0.25, "small tensors are not blown up"


def test_the_measure_and_the_bounds_of_a_player_reach_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(HalfPlayer, "error_scale", "entry")
    (report,) = replay(folder_with(tmp_path))
    assert report.errors["logits"] == pytest.approx(1e-3 / 2, rel=1e-3)
    assert (report.bound("logits"), report.bound("bank")) == (2e-3, 1e-4)


# ---------------------------------------------------------------- JSON files


def test_groups_of_a_json_file_are_cases(tmp_path):
    folder = folder_with(tmp_path, colour(0), colour(1, name="hidden"))
    (folder / "other.json").write_text('["no cases"]')
    (folder / "config.json").write_text('{"cases": 3}')
    status, output = run(folder)
    assert status == 2, "a JSON file that is no object is damaged"
    (folder / "other.json").unlink()
    status, output = run(folder)
    assert status == 0, output
    assert (
        "text.json, colours: passed, 2 steps replayed (auto, float32); largest error 0.0e+00, allowed 1e-06" in output
    )
    assert "skipped: c-1 (hidden): nobody sees it" in output
    assert "2 of 2 cases passed" in output
    assert run(folder / "text.json")[0] == 0


@pytest.mark.parametrize(
    ("case", "where"),
    [
        (colour(0, off=1e-5), "c-0, place, item 1"),
        (colour(0, colour="blue", expected={"colour": "red", "place": [1, 2.0]}), "c-0, colour"),
        (colour(0, expected={"colour": "red", "place": [1.0, 2.0, 3]}), "c-0, place, length"),
        (colour(0, expected={"colour": "red"}), "c-0, names of fields"),
        (colour(0, expected={"colour": "red", "place": [True, 2.0]}), "c-0, place, item 0"),
        (colour(0, expected=[]), "c-0"),
    ],
)
def test_what_differs_in_a_behaviour_is_found(case, where, tmp_path):
    folder = folder_with(tmp_path, case, model=None)
    (report,) = replay(folder)
    assert not report.passed()
    assert where in report.differences["seen"]


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([colour(0), colour(0)], "each with an id of its own"),
        ([{**colour(0), "given": None}], "must have id, system, behaviour, given and expected"),
        ([{"id": "x", "system": "colours"}], "must have id, system, behaviour, given and expected"),
        ([{**colour(0), "system": None}], "must say which system it is about"),
        ([3], "must say which system it is about"),
    ],
)
def test_damaged_json_files(cases, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        replay(folder_with(tmp_path, *cases, model=None))


def test_a_player_without_cases_in_its_file(tmp_path):
    folder = folder_with(tmp_path, colour(0, system="shapes"), model=None)
    with pytest.raises(CheckpointError, match="must have cases of the system 'colours', and has none"):
        ColourPlayer(folder / "text.json", "auto", torch.float32)


# ---------------------------------------------------------------- cases that nothing plays


def test_the_others_are_played_where_a_package_is_missing(tmp_path):
    shutil.copytree(GOLDENS / "memoryllm_b", tmp_path / "memoryllm_b")
    folder = folder_with(tmp_path, colour(0), colour(1, system="shapes"), model="rwkv")
    status, output = run(folder)
    assert status == 1
    assert "memoryllm_b: passed" in output
    assert "text.json, colours: passed" in output
    assert "2 of 4 cases passed" in output
    *_, first, second = output.strip().splitlines()
    assert first.startswith("a: NOT PLAYED: model in ")
    assert "got 'rwkv': install the package that announces a trace player of this name in the entry-point" in first
    assert second.startswith("text.json, shapes: NOT PLAYED: system of a case in ")
    reports = replay(folder)
    assert [report.passed() for report in reports] == [False, True, True, False]
    assert [report.unplayed is None for report in reports] == [False, True, True, False]


def test_a_broken_package_is_named_too(tmp_path):
    REPLAYS.register("broken", "nowhere:Player")
    try:
        status, output = run(folder_with(tmp_path, colour(0), model="broken"))
    finally:
        REPLAYS.unregister("broken")
    assert status == 1
    assert "a: NOT PLAYED: trace player 'broken' of " in output
    assert "text.json, colours: passed" in output
