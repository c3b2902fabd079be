"""Every registered attention backend, how one is chosen, and what is particular to ours."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.backends import BACKENDS, merge, parts
from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.choose import BackendChooser, choose
from mplus.backends.flex import FlexBackend
from mplus.backends.joined import joined_keys_values
from mplus.backends.merge import MergeBackend
from mplus.backends.reference import ReferenceBackend
from mplus.backends.sdpa import SdpaBackend
from mplus.errors import NotSupported, UnknownNameError
from mplus.registry import Registry
from mplus.testing import suites
from mplus.testing.attention import exact_attention, plain_attention
from mplus.testing.backends import BackendConformance
from mplus.testing.drawing import RequestShape
from mplus.testing.strategies import CONFORMANCE, request_shapes
from tests.helpers.docstrings import run_examples
from tests.helpers.gradients import MERGE_CASES, check_merge, leaves_of, rebuilt, without_nan

pytestmark = pytest.mark.two_computations

globals().update(suites(BackendConformance, BACKENDS))
del globals()["TestTritonBackendConformance"]  # runs on GPUs, or interpreted: tests/interpreted has its suite
del globals()["TestFlexBackendConformance"]  # a second for every request on a CPU: TestFlex has some


def test_the_example_of_the_class_does_what_it_says():
    run_examples(AttentionBackend, torch=torch, AttentionRequest=AttentionRequest)


class TestMeasure:
    """The two yardsticks of the suite, by hand and against PyTorch."""

    def test_exact_attention_by_hand(self):
        """A query of 1 over memory keys 0 and 2, of which the second is a filler, and a text key of 1."""
        ones = torch.ones(1, 1, 1, 1)
        memory = torch.tensor([0.0, 2.0])[None, None, :, None]
        request = RequestShape(batch=1, groups=1, key_heads=1, queries=1, past=0, width=1, value_width=1).build()
        segment = attrs.evolve(
            request.segments[0], keys=memory, values=torch.tensor([10.0, torch.nan])[None, None, :, None]
        )
        segment = attrs.evolve(segment, lengths=torch.tensor([1]))
        request = attrs.evolve(request, queries=ones, keys=ones, values=20 * ones, scale=1.0, segments=(segment,))
        output, weights = exact_attention(request)
        share = torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
        assert weights.flatten().tolist() == [share[0], 0, share[1]]
        assert output.item() == pytest.approx(10 * share[0] + 20 * share[1])

    @CONFORMANCE
    @given(shape=request_shapes(mask="bool", sinks=True), softcap=st.sampled_from([None, 2.0]))
    def test_plain_attention_agrees_with_exact_attention(self, shape, softcap):
        request = shape.build(torch.float64, softcap=softcap)
        torch.testing.assert_close(plain_attention(request), exact_attention(request)[0])

    def test_exact_attention_is_that_of_pytorch_without_memory(self):
        request = RequestShape(queries=5, past=0, segments=(), fillers=()).build(torch.float64)
        expected = torch.nn.functional.scaled_dot_product_attention(
            request.queries, request.keys, request.values, is_causal=True, scale=request.scale, enable_gqa=True
        )
        torch.testing.assert_close(exact_attention(request)[0], expected)


class TestReference:
    @CONFORMANCE
    @given(
        shape=request_shapes(sinks=True),
        softcap=st.sampled_from([None, 2.0]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    )
    def test_accepts_everything_and_rounds_only_the_result(self, shape, softcap, dtype):
        request = shape.build(dtype, softcap=softcap, need_weights=True)
        assert ReferenceBackend().unsupported_reasons(request) == []
        exact, weights = exact_attention(request)
        result = ReferenceBackend().attend(request)
        precise = 1e-5 if dtype != torch.float64 else 1e-12
        rounding = torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 else 0
        torch.testing.assert_close(result.output.double(), exact, atol=precise, rtol=rounding)
        torch.testing.assert_close(result.weights.double(), weights, atol=precise, rtol=rounding)


class TestSdpa:
    @pytest.fixture
    def calls(self, monkeypatch):
        seen = []
        attention = torch.nn.functional.scaled_dot_product_attention

        def spy(*args, **kwargs):
            seen.append(kwargs)
            return attention(*args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        return seen

    @pytest.mark.parametrize(
        ("shape", "mask", "causal"),
        [
            (RequestShape(queries=1), False, False),
            (RequestShape(queries=1, fillers=("some",)), True, False),
            (RequestShape(queries=4, past=0, segments=(), fillers=()), False, True),
            (RequestShape(queries=4, past=0, segments=(0,)), False, True),
            (RequestShape(queries=4, past=2, segments=(), fillers=()), True, False),
            (RequestShape(queries=4, past=0), True, False),
        ],
    )
    def test_hands_over_the_least_mask(self, calls, shape, mask, causal):
        SdpaBackend().attend(shape.build())
        (call,) = calls
        assert (call["attn_mask"] is not None, call["is_causal"]) == (mask, causal)

    @pytest.mark.parametrize("segments", [(), (5,)], ids=str)
    @pytest.mark.parametrize("kind", ["bool", "additive", "smallest"])
    def test_no_kernel_meets_a_query_without_a_key(self, calls, kind, segments):
        """What comes of it, forward and backward, differs between kernels and devices."""
        request = RequestShape(mask="padded", segments=segments, fillers=("all",) * len(segments)).build()
        if kind != "bool":
            masked = -torch.inf if kind == "additive" else torch.finfo(torch.float32).min
            request = attrs.evolve(request, mask=torch.zeros(request.mask.shape).masked_fill(~request.mask, masked))
        SdpaBackend().attend(request)
        mask = calls[0]["attn_mask"]
        assert bool((mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float32).min / 2).any(-1).all())

    def test_masks_are_not_spread_over_heads_and_batch(self, calls):
        SdpaBackend().attend(RequestShape().build())
        assert calls[0]["attn_mask"].shape == (1, 1, 3, 5 + 5)

    def test_reasons_are_complete(self):
        request = RequestShape(sinks=True, softcap=30.0).build(need_weights=True)
        segment = attrs.evolve(request.segments[0], keys=request.segments[0].keys.half())
        reasons = SdpaBackend().unsupported_reasons(attrs.evolve(request, segments=(segment,)))
        assert len(reasons) == 4
        for reason, words in zip(
            reasons,
            ["softcap=30.0", "sinks [4]", "need_weights=True", "segments[0].keys are torch.float16"],
            strict=True,
        ):
            assert reason.startswith(words)


class TestMerge:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Arguments of every call of the kernel."""
        seen = []
        kernel = parts._kernel

        def spy(*args, **kwargs):
            seen.append((args, kwargs))
            return kernel(*args, **kwargs)

        monkeypatch.setattr(parts, "_kernel", spy)
        return seen

    def test_memory_is_neither_joined_nor_repeated(self, calls):
        request = RequestShape(batch=2, groups=4, segments=(5, 7), fillers=("none", "none"), shared=True).build()
        MergeBackend().attend(request)
        for segment, (args, _) in zip(request.segments, calls[:2], strict=True):
            assert args[1].data_ptr() == segment.keys.data_ptr()
            assert args[2].data_ptr() == segment.values.data_ptr()
            assert args[0].shape == (1, 2, 2 * 4 * 3, 4), "the rows of the batch and of the group in one call"

    def test_no_kernel_meets_empty_keys(self, calls):
        """It would end the process."""
        shape = RequestShape(batch=3, segments=(0, 4), fillers=("none", "some"), seed=1)
        request = shape.build()
        request = attrs.evolve(
            request, segments=(request.segments[0], attrs.evolve(request.segments[1], lengths=torch.tensor([0, 4, 1])))
        )
        MergeBackend().attend(request)
        assert [args[1].shape[2] for args, _ in calls] == [4, 1, 5]

    @pytest.mark.parametrize("name", MERGE_CASES)
    def test_gradients_are_exact(self, name):
        """To the precision of float64."""
        check_merge(merge, name)

    @pytest.mark.parametrize(
        "name", ["own memory, none fillers, causal text", "shared memory, some fillers, padded text"]
    )
    def test_gradients_are_those_of_differences(self, name):
        request = without_nan(MERGE_CASES[name].build(torch.float64))
        leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
        assert torch.autograd.gradcheck(lambda *given: MergeBackend().attend(rebuilt(request, given)).output, leaves)

    @pytest.mark.parametrize("worthwhile", [True, False])
    def test_one_token_with_a_bias_does_not_take_what_is_joined(self, worthwhile):
        request = RequestShape(queries=1, bias="all").build()
        joined = SimpleNamespace(worthwhile=worthwhile, keys_values=lambda: joined_keys_values(request))
        found = MergeBackend().attend(attrs.evolve(request, joined=joined)).output
        torch.testing.assert_close(found.double(), exact_attention(request)[0], atol=1e-6, rtol=0)

    def test_reasons_are_complete(self):
        request = RequestShape(softcap=30.0, value_width=3).build(need_weights=True, dropout=0.5)
        segment = attrs.evolve(request.segments[0], keys=request.segments[0].keys.half())
        request = attrs.evolve(request, segments=(segment,)), attrs.evolve(request, queries=request.queries.to("meta"))
        reasons = MergeBackend().unsupported_reasons(request[0])
        words = ["segments[0].keys are torch.float16", "values have width 3", "softcap=30.0", "dropout=0.5", "need_w"]
        assert len(reasons) == len(words)
        assert all(reason.startswith(start) for reason, start in zip(reasons, words, strict=True))
        assert MergeBackend().unsupported_reasons(request[1])[0].startswith("queries are on meta")


class TestFlex:
    """Forward on a CPU. Nothing else of it has been run: it has no gradient there, and its kernels are for GPUs."""

    suite = type("FlexConformance", (BackendConformance,), {"implementation": FlexBackend})()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "shape",
        [
            RequestShape(),
            RequestShape(queries=1, segments=(), fillers=()),
            RequestShape(segments=(3, 0, 4), fillers=("some", "none", "all"), value_width=3),
            RequestShape(shared=True, batch=3, groups=1, window=2, padding=1),
            RequestShape(mask="additive", per_head=True, softcap=2.0, sinks=True, fillers=("some",)),
            RequestShape(mask="padded", segments=(), fillers=(), sinks=True),
            RequestShape(mask="smallest", queries=6, past=0),
            RequestShape(bias="all", segments=(3, 2), fillers=("some", "none")),
            RequestShape(bias="heads", mask="additive", softcap=2.0, sinks=True),
        ],
    )
    def test_is_right(self, shape, dtype):
        request = shape.build(dtype)
        assert FlexBackend().unsupported_reasons(request) == []
        self.suite.check_output(request)

    def test_reasons_are_complete(self):
        request = RequestShape().build(need_weights=True, dropout=0.5)
        segment = attrs.evolve(request.segments[0], keys=request.segments[0].keys.half())
        queries = request.queries.clone().requires_grad_()
        request = attrs.evolve(request, segments=(segment,), queries=queries)
        reasons = FlexBackend().unsupported_reasons(request)
        words = ["dropout=0.5", "need_weights=True", "segments[0].keys are torch.float16", "a tensor requires a grad"]
        assert len(reasons) == len(words)
        assert all(reason.startswith(start) for reason, start in zip(reasons, words, strict=True))


class Picky(AttentionBackend):
    """Refuses whatever has sinks."""

    name = "picky"
    made = 0

    def __init__(self):
        type(self).made += 1

    def unsupported_reasons(self, request):
        return ["sinks: none of them here"] if request.sinks is not None else []

    def attend(self, request):
        return AttentionResult(request.queries)


class TestChoosing:
    @pytest.fixture
    def registry(self, monkeypatch):
        registry = Registry(
            "backend",
            group="mplus.backends",
            base="mplus.backends.base:AttentionBackend",
            builtin={
                "merge": "mplus.backends.merge:MergeBackend",
                "reference": "mplus.backends.reference:ReferenceBackend",
                "sdpa": "mplus.backends.sdpa:SdpaBackend",
            },
            discover=lambda group: [],
        )
        registry.register("picky", Picky)
        monkeypatch.setattr("mplus.backends.choose.BACKENDS", registry)
        monkeypatch.setattr("mplus.backends.choose.ORDER", ("merge", "sdpa", "reference"))
        monkeypatch.setattr(Picky, "made", 0)
        return registry

    def test_auto_takes_the_first_that_can(self, registry):
        assert isinstance(choose("auto", RequestShape().build()), MergeBackend)
        assert isinstance(choose("auto", RequestShape(value_width=3).build()), SdpaBackend)
        assert isinstance(choose("auto", RequestShape(softcap=30.0).build()), ReferenceBackend)

    def test_auto_leaves_a_plugin_alone_that_does_not_ask_for_it(self, registry, monkeypatch):
        assert not Picky.auto
        monkeypatch.setattr(ReferenceBackend, "unsupported_reasons", lambda self, request: ["not today"])
        with pytest.raises(NotSupported, match=r"reference: not today$"):
            choose("auto", RequestShape(softcap=30.0).build())

    def test_auto_asks_plugins_that_say_so_first_and_by_name(self, registry, monkeypatch, caplog):
        class Another(Picky):
            name = "another"

        monkeypatch.setattr(Picky, "auto", True)
        registry.register("another", Another)
        registry.register("broken", "mplus_no_such_module:Backend")
        with caplog.at_level("INFO", "mplus.backends.choose"):
            assert type(choose("auto", RequestShape(softcap=30.0).build())) is Another
        assert "backend 'auto' leaves one out: backend 'broken'" in caplog.text
        assert "a plug-in that asks to be taken first" in caplog.text
        assert isinstance(choose("auto", RequestShape(sinks=True).build()), MergeBackend)  # both refuse sinks

    def test_a_named_backend_runs_or_says_why_not(self, registry):
        assert isinstance(choose("picky", RequestShape(softcap=30.0).build()), Picky)
        request = RequestShape(sinks=True, softcap=30.0, fillers=("some",)).build()
        with pytest.raises(NotSupported) as error:
            choose("sdpa", request)
        message = str(error.value)
        assert all(reason in message for reason in SdpaBackend().unsupported_reasons(request))
        assert "'sdpa'" in message
        assert "queries [2, 4, 3, 4] float32" in message
        assert "memory [2, 2, 5, 4] float32 with fillers" in message

    def test_when_nobody_can_everybodys_reasons_are_given(self, registry, monkeypatch):
        monkeypatch.setattr(Picky, "auto", True)
        monkeypatch.setattr(ReferenceBackend, "unsupported_reasons", lambda self, request: ["not today"])
        with pytest.raises(NotSupported, match=r"picky: sinks: none of.*merge: .*sdpa: sinks.*reference: not today"):
            choose("auto", RequestShape(sinks=True, value_width=3).build())

    def test_a_backend_that_does_not_say_that_it_adds_a_bias_gets_none(self, registry):
        request = RequestShape(bias="heads").build()
        assert isinstance(choose("picky", RequestShape().build()), Picky)
        with pytest.raises(NotSupported, match=r"with a bias.* the backend does not say"):
            choose("picky", request)

    def test_a_bias_that_is_learned_goes_where_it_gets_a_gradient(self, registry):
        request = RequestShape(bias="heads").build()
        assert isinstance(choose("auto", request), MergeBackend)
        (segment,) = request.segments
        segment = attrs.evolve(segment, bias=segment.bias.requires_grad_())
        assert isinstance(choose("auto", attrs.evolve(request, segments=(segment,))), SdpaBackend)

    @pytest.mark.parametrize(("name", "dtypes"), [("merge", 1), ("sdpa", 1), ("reference", 0)])
    def test_a_bias_of_another_dtype(self, registry, name, dtypes):
        request = RequestShape(bias="one").build(torch.bfloat16)
        (segment,) = request.segments
        wide = attrs.evolve(request, segments=(attrs.evolve(segment, bias=segment.bias.float()),))
        reasons = [
            one for one in registry.get(name)().unsupported_reasons(wide) if "segments[0].bias are torch.f" in one
        ]
        assert len(reasons) == dtypes

    def test_an_unknown_name_is_refused_at_once(self, registry):
        with pytest.raises(UnknownNameError, match="sdpo"):
            BackendChooser("sdpo")

    def test_a_chooser_makes_each_backend_once_and_others_not_at_all(self, registry):
        chooser = BackendChooser("picky")
        assert chooser.choose(RequestShape().build()) is chooser.choose(RequestShape(queries=1).build())
        assert Picky.made == 1
        BackendChooser().choose(RequestShape().build())
        assert Picky.made == 1

    def test_every_backend_taken_is_logged_once_with_the_reason(self, registry, caplog):
        caplog.set_level(logging.INFO, logger="mplus")
        chooser = BackendChooser()
        for _ in range(2):
            chooser.choose(RequestShape().build())
            chooser.choose(RequestShape(softcap=30.0).build())
        first, second = (record.getMessage() for record in caplog.records)
        assert "'merge'" in first
        assert "order of preference" in first
        assert "'reference'" in second
        assert "softcap=30.0" in second
        caplog.clear()
        for _ in range(2):
            BackendChooser("sdpa").choose(RequestShape().build())
        assert [record.getMessage().endswith("named in the configuration") for record in caplog.records] == [True, True]
