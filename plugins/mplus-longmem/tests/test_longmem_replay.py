"""Traces of the published code are done again, and mistakes are found by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_longmem.bank import ChunkSearch, Heads
from mplus_longmem.mechanism import LongMemMechanism
from mplus_longmem.replay import LongMemPlayer
from mplus_longmem.side_network import SideNetwork
from torch import Tensor, nn

from mplus.errors import CheckpointError
from mplus.interop import CaseReport, replay

GOLDENS = Path(__file__).parent / "goldens"
Plant = Callable[[pytest.MonkeyPatch, LongMemPlayer], None]


@pytest.mark.parametrize("case", ["longmem_a", "longmem_b"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_trace_of_the_published_code_is_done_again(case: str, reset: bool) -> None:
    (report,) = replay(GOLDENS / case, reset=reset)
    assert report.passed(), (report.errors, report.equal, report.differences)
    assert report.worst <= 1.0, "units in the last place of a bank in half precision"
    wanted = {"logits", "gradients", "chunk ids", "evicted chunks", "mean keys", "joint attention"}
    assert wanted <= {*report.errors, *report.equal}
    assert not report.skipped


def test_a_case_without_its_tensors_is_damaged(tmp_path: Path) -> None:
    for name in ("config.json", "steps.json"):
        (tmp_path / name).write_bytes((GOLDENS / "longmem_a" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"must hold trace\.safetensors"):
        replay(tmp_path)


@pytest.fixture(scope="module")
def players() -> dict[str, LongMemPlayer]:
    return {name: LongMemPlayer(GOLDENS / f"longmem_{name}", "auto", torch.float32) for name in ("a", "b")}


def in_plan(**changes: Any) -> Plant:
    return lambda patch, player: patch.setattr(side_of(player), "plan", evolve(side_of(player).plan, **changes))


def side_of(player: LongMemPlayer) -> SideNetwork:
    return player.mechanism.additions


def without_mechanism_rule(name: str, replaced: Callable[..., Any]) -> Plant:
    return lambda patch, player: patch.setattr(LongMemMechanism, name, replaced)


def kept_remainder(self: LongMemMechanism, projected: Tensor) -> tuple[Tensor, Tensor, int]:
    count, size = len(projected), self.options.chunk_size
    padded = nn.functional.pad(projected, (0, 0, 0, -count % size))
    rows = self.additions.search.heads.chunked(padded)
    return rows, torch.full((len(rows),), size, dtype=torch.int32), count


def newest_leave(self: LongMemMechanism, told: int, new: int, context: Any) -> int:
    held = context.store.count(0)
    if held + new < context.capacity:
        return 0
    leaving = min(2 * told // self.options.chunk_size, held)
    context.store.remove(0, context.store.ids(0)[held - leaving :])
    return leaving


def patched(owner: Any, name: str, change: Callable[[Any], Any]) -> Plant:
    """Plant ``change(the method as it is)`` in its place."""
    return lambda patch, player: patch.setattr(owner, name, change(getattr(owner, name)))


MISTAKES: dict[str, tuple[str, Plant]] = {
    "a gate of text alone": (
        "a",
        lambda patch, player: patch.setattr("mplus_longmem.side_network.gated", lambda text, reads, bias: text),
    ),
    "text is not multiplied by what the gate leaves": (
        "a",
        lambda patch, player: patch.setattr(
            "mplus_longmem.side_network.gated",
            lambda text, reads, bias: torch.stack(
                [
                    one if read is None else one + bias.sigmoid()[:, None, None] * read.output
                    for one, read in zip(text, reads, strict=True)
                ]
            ),
        ),
    ),
    "nothing leaves before it must": ("a", without_mechanism_rule("_make_room", lambda self, told, new, context: 0)),
    "the newest chunks leave": ("a", without_mechanism_rule("_make_room", newest_leave)),
    "every row has a bank of its own": ("b", without_mechanism_rule("_texts", lambda self, projected: list(projected))),
    "the remainder is kept": ("a", without_mechanism_rule("_chunks", kept_remainder)),
    "missing neighbours are left out": (
        "b",
        lambda patch, player: patch.setattr(side_of(player).search, "zero_neighbours", False),
    ),
    "fewer chunks are read": (
        "a",
        lambda patch, player: patch.setattr(
            player.mechanism, "config", evolve(player.mechanism.config, retrieved_tokens=1)
        ),
    ),
    "the bank is that of the next layer": ("a", in_plan(bank_layer=4)),
    "the first side layer reads": ("a", in_plan(reader=0)),
    "residuals of other layers": ("a", in_plan(cuts=(0, 2, 3, 6))),
    "the last residual is not normed": (
        "a",
        lambda patch, player: patch.setattr(side_of(player), "normed_last", False),
    ),
    "norms of the side network are those of the decoder": (
        "a",
        lambda patch, player: patch.setattr("mplus_longmem.replay.SIDE_EPS", 1e-6),
    ),
    "scores of the bank are not scaled": (
        "a",
        patched(ChunkSearch, "_read", lambda own: lambda self, queries, found, scale: own(self, queries, found, 1.0)),
    ),
    "all heads read what the first one chose": (
        "a",
        patched(
            ChunkSearch,
            "search",
            lambda own: lambda self, queries, found: own(self, queries, found)[:1].expand(len(queries), -1, -1),
        ),
    ),
    "every token reads what the last one chose": (
        "a",
        patched(
            ChunkSearch,
            "search",
            lambda own: lambda self, queries, found: own(self, queries, found)[:, -1:].expand(-1, queries.shape[1], -1),
        ),
    ),
    "the worst chunks are read": (
        "a",
        patched(ChunkSearch, "search", lambda own: lambda self, queries, found: own(self, -queries, found)),
    ),
    "values of the bank are its keys": (
        "a",
        patched(Heads, "split", lambda own: lambda self, rows: (own(self, rows)[0], own(self, rows)[0])),
    ),
    "means are those of rounded keys": (
        "b",
        patched(Heads, "means", lambda own: lambda self, rows, tokens: own(self, rows.half().float(), tokens)),
    ),
    "means are sums": (
        "a",
        patched(Heads, "means", lambda own: lambda self, rows, tokens: own(self, rows, tokens) * tokens[:, None]),
    ),
    "distances of the heads are swapped": (
        "a",
        lambda patch, player: patch.setattr(
            "mplus_longmem.backbone.slopes", lambda heads: torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).flip(0)
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(
    players: dict[str, LongMemPlayer], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    case, plant = MISTAKES[mistake]
    player = players[case]
    player.memory = None
    plant(monkeypatch, player)
    report = CaseReport(
        case, "longmem", "auto", "float32", tolerance=player.tolerance, tolerances=player.tolerances,
        scale=player.error_scale,
    )  # fmt: skip
    for _ in player.play(report):
        report.steps += 1
        if not report.passed():
            return
    pytest.fail("the trace agrees with it")
