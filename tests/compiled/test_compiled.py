"""Every shipped configuration of every kernel compiles for GPUs that need not be there, and fits into them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mplus.backends.triton.configs import ATTENTION, GATHER, SCORE, Tiles

pytest.importorskip("triton")

import triton

from tests.compiled.shipped import SHIPPED, compile_attention, compile_gather, compile_score

ROOT = Path(__file__).parent.parent.parent
SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Capability compiled for -> bytes of shared memory a program may have. What is compiled for 8.0 also runs on 8.6 and
8.9, which have the least, so theirs counts."""
PINNED = re.findall(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def complaints(needs, capability):
    """What keeps a compiled kernel from being shipped."""
    found = []
    if needs.shared > SHARED[capability]:
        found.append(f"{needs.shared} bytes of shared memory, of {SHARED[capability]}")
    if needs.stack:
        found.append(f"registers spilled into {needs.stack} bytes of stack")
    return found


def check(needs, capability):
    """Raise AssertionError on complaints; other releases than the pinned one spend registers in their own way."""
    if [triton.__version__] == PINNED:
        assert complaints(needs, capability) == []


def name_of(value):
    return getattr(value, "__name__", str(value)).removeprefix("compile_")


def test_one_release_is_pinned():
    assert len(PINNED) == 1


@pytest.mark.parametrize(
    "capability",
    # The smaller memory is what something hardly fits into; the test below this one compiles for both.
    [
        capability if capability == min(SHARED) else pytest.param(capability, marks=pytest.mark.nightly)
        for capability in SHARED
    ],
)
@pytest.mark.parametrize(("make", "key", "tiles"), SHIPPED, ids=name_of)
def test_shipped(make, key, tiles, capability):
    """With everything a call can ask for."""
    check(make(key, tiles, capability), capability)


@pytest.mark.parametrize("capability", SHARED)
def test_plain_text_without_memory(capability):
    """With nothing a call can ask for the compiler makes other choices."""
    key = (16, 128, "many")
    check(compile_attention(key, ATTENTION[key], capability, segments=0, switches=False), capability)


def test_whatever_the_strides_are():
    key = (16, 64, "few")
    check(compile_attention(key, ATTENTION[key], 80, segments=1, aligned=False), 80)


@pytest.mark.parametrize(("segments", "switches"), [(0, False), (2, True)])
def test_numbers_of_one(segments, switches):
    """One token, text of one key, memory of one row: the runtime makes constants of them."""
    key = (16, 64, "few")
    ones = ("batch", "length", "text", "rows_0", "rows_1", "window")
    check(compile_attention(key, ATTENTION[key], 80, segments=segments, switches=switches, ones=ones), 80)


def test_numbers_of_one_in_scoring_and_gathering():
    check(compile_score((16, 64), SCORE[16, 64], 80, ones=("length", "count", "m_b", "s_b")), 80)
    check(compile_gather(64, GATHER[64], 80, ones=("stored", "count")), 80)


def test_keys_are_copied_sixteen_bytes_at_a_time_while_computing():
    """Also where the segment that a block lies in is found in the loop."""
    key = (16, 128, "many")
    assembly = compile_attention(key, ATTENTION[key], 80).assembly
    assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+),", assembly)) == {"0x10"}


def test_a_sigmoid_takes_one_instruction():
    key = (16, 256)
    assembly = compile_score(key, SCORE[key], 80).assembly
    assert "tanh.approx.f32" in assembly
    assert "ex2.approx" not in assembly


def test_the_gate_turns_away_what_is_too_large():
    needs = compile_attention((16, 256, "few"), Tiles(16, 128, 4, 4), 90, segments=0, switches=False)
    assert "shared memory" in " ".join(complaints(needs, 90))


def test_the_gate_turns_away_what_spills():
    needs = compile_attention((16, 128, "many"), Tiles(32, 32, 1, 1), 80, segments=0, switches=False)
    assert "spilled" in " ".join(complaints(needs, 80))
