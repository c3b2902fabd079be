"""What can be said of the Triton backend and its kernels without running any."""

from __future__ import annotations

import importlib.util

import attrs
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mplus.backends.choose import choose
from mplus.backends.triton import usable
from mplus.backends.triton.backend import TritonBackend
from mplus.backends.triton.configs import (
    ATTENTION,
    GATHER,
    MOST_SEGMENTS,
    SCORE,
    WIDEST,
    attention_tiles,
    gather_tiles,
    padded,
    score_tiles,
    splits_for,
)
from mplus.backends.triton.gather import plain_gather_rotated
from mplus.backends.triton.usable import reasons_against
from mplus.errors import NotSupported
from mplus.retrievers import scores
from mplus.testing.drawing import RequestShape

CUDA = torch.device("cuda", 0)


class TestReasons:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        """A GPU of which one can only ask what it is; Ampere."""
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
        monkeypatch.setattr(usable, "_installed", lambda: True)
        usable._reasons_against_gpu.cache_clear()
        yield
        usable._reasons_against_gpu.cache_clear()

    def test_nothing_against_an_ampere_gpu(self):
        assert reasons_against(CUDA) == []

    def test_older_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        assert reasons_against(CUDA) == ["compute capability 7.5: the kernels need 8.0 or newer"]

    def test_gpus_of_others(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        (reason,) = reasons_against(CUDA)
        assert "ROCm 6.4" in reason

    @pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
    def test_other_devices(self, device):
        (reason,) = reasons_against(torch.device(device))
        assert f"device {device}" in reason

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(usable, "_installed", lambda: False)
        (reason,) = reasons_against(CUDA)
        assert "pip install 'mplus[triton]'" in reason

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    def test_interpreting_has_to_be_turned_on_first(self):
        (reason,) = reasons_against(torch.device("cpu"), interpret=True)
        assert "TRITON_INTERPRET=1" in reason

    def test_of_requests_are_complete(self):
        request = RequestShape(mask="bool", segments=(1,) * 6, fillers=("none",) * 6).build(torch.float64)
        wide = torch.zeros(*request.queries.shape[:3], WIDEST + 1, dtype=torch.float64)
        low = attrs.evolve(request.segments[0], keys=request.segments[0].keys.bfloat16())
        request = attrs.evolve(
            request, queries=wide, segments=(low, *request.segments[1:]), dropout=0.5, need_weights=True
        )
        reasons = TritonBackend().unsupported_reasons(request)
        beginnings = [
            "device cpu",
            "queries are torch.float64",
            "segments[0].keys are torch.bfloat16 and queries torch.float64",
            f"heads of width {WIDEST + 1} and 4",
            f"6 memory segments: the kernel takes {MOST_SEGMENTS}",
            "mask [2, 1, 3, 5] torch.bool",
            "dropout=0.5",
            "need_weights=True",
        ]
        for reason, beginning in zip(reasons, beginnings, strict=True):
            assert reason.startswith(beginning)

    def test_empty_segments_do_not_count(self):
        request = RequestShape(segments=(1,) * 4 + (0,) * 3, fillers=("none",) * 7).build()
        assert [reason[:6] for reason in TritonBackend().unsupported_reasons(request)] == ["device"]

    def test_a_choice_by_name_says_why_not(self):
        with pytest.raises(NotSupported, match=r"'triton' cannot run .*device cpu"):
            choose("triton", RequestShape().build())

    def test_auto_takes_another_on_a_cpu(self):
        assert choose("auto", RequestShape().build()).name == "merge"


class TestTiles:
    @pytest.mark.parametrize("bits", [16, 32])
    def test_every_width_up_to_the_widest_has_tiles(self, bits):
        for width in range(1, WIDEST + 1):
            for rows in (1, 16, 17, 5000):
                assert attention_tiles(bits, width, rows) in ATTENTION.values()
            assert score_tiles(bits, width) in SCORE.values()
            assert gather_tiles(width) in GATHER.values()
            assert padded(width) >= width

    def test_wider_heads_do_not_get_the_tiles_of_narrower_ones(self):
        assert attention_tiles(16, 64, 99) == ATTENTION[16, 64, "many"]
        assert attention_tiles(16, 65, 16) == ATTENTION[16, 128, "few"]
        assert attention_tiles(32, 65, 17) == ATTENTION[32, 256, "many"]
        assert score_tiles(16, 65) == SCORE[16, 256]

    def test_a_tile_is_a_power_of_two(self):
        assert [padded(width) for width in (1, 16, 17, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]

    @pytest.mark.parametrize(
        ("programs", "blocks", "processors", "splits"),
        [(8, 200, 132, 16), (200, 200, 132, 1), (8, 5, 132, 2), (8, 1, 132, 1), (1, 0, 132, 1), (8, 200, 1, 1)],
    )
    def test_keys_are_split_where_programs_are_few(self, programs, blocks, processors, splits):
        assert splits_for(programs, blocks, processors) == splits


def test_rotation_is_that_of_transformers():
    rows = torch.randn(7, 3 * (12 + 5))
    indices = torch.tensor([6, 0, 3, 3])
    angles = torch.rand(4, 6).repeat(1, 2)
    keys, values = torch.zeros(3, 4, 12), torch.zeros(3, 4, 5)
    plain_gather_rotated(rows, indices, angles.cos(), angles.sin(), keys, values)
    old = rows[indices][:, : 3 * 12].view(4, 3, 12).transpose(0, 1)
    expected, _ = apply_rotary_pos_emb(old[None], old[None], angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(keys, expected[0])
    assert torch.equal(values[2, 1], rows[0, 36 + 10 :])


class TestScoreRows:
    """Which scores the retriever leaves to the kernel."""

    @pytest.fixture
    def calls(self, monkeypatch):
        seen = []

        def spy(queries, mask, keys):
            seen.append(queries)
            return torch.full((1, keys.shape[0]), float(len(seen)))

        monkeypatch.setattr(scores, "sigmoid_means", spy)
        return seen

    def test_none_on_a_cpu(self, calls):
        scores.score_rows("sigmoid_mean", [torch.ones(2, 3)], torch.ones(4, 3))
        assert calls == []

    def test_sigmoid_mean_where_nothing_speaks_against_it(self, calls, monkeypatch):
        monkeypatch.setattr(scores, "reasons_against_scoring", lambda text, keys: [])
        texts = [torch.ones(2, 3), torch.ones(5, 3)]
        found = scores.score_rows("sigmoid_mean", texts, torch.ones(4, 3))
        assert found.tolist() == [[1.0] * 4, [2.0] * 4]
        assert [list(call.shape) for call in calls] == [[1, 2, 3], [1, 5, 3]]
        scores.score_rows("mean_dot", texts, torch.ones(4, 3))
        assert len(calls) == 2
