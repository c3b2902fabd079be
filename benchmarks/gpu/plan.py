"""The parts of a run on a GPU: what each runs, and the seconds that it may take."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define


@define(frozen=True)
class Part:
    """One process of a run.

    Attributes:
        name: on the command line and in results.
        target: ``module:function`` behind ``benchmarks.gpu.``; the function takes a ``Session``.
        seconds: that it may take at most.
        timed: it measures times, so that nothing runs beside it.
        interpreted: it starts kernels of our own, which a rehearsal interprets on the CPU.
        on_cpu: it needs no GPU, and is worth nothing beside one: it belongs to rehearsals only.
    """

    name: str
    target: str
    seconds: float
    timed: bool = False
    interpreted: bool = False
    on_cpu: bool = False


PARTS: Sequence[Part] = (
    Part("device", "device:describe", 60),
    Part("compiled", "compiled:compile_kernels", 300, on_cpu=True),
    # Gates: several run at a time.
    # Our kernel is compiled for every kind of request and dtype, for seconds each.
    Part("attention-triton-bfloat16", "gates.attention:triton_bfloat16", 130, interpreted=True),
    Part("attention-triton-float32", "gates.attention:triton_float32", 130, interpreted=True),
    Part("attention-triton-float16", "gates.attention:triton_float16", 130, interpreted=True),
    Part("static-reader", "gates.decoding:static_reader", 150),
    Part("attention-flex", "gates.attention:flex", 110),
    Part("attention-torch", "gates.attention:sdpa_and_reference", 60),
    Part("score-kernel", "gates.kernels:score", 90, interpreted=True),
    Part("gather-kernel", "gates.kernels:gather", 60, interpreted=True),
    Part("stores", "gates.stores:stores", 60),
    Part("tiered", "gates.stores:tiered_under_load", 60),
    Part("retrievers", "gates.retrievers:retrievers", 60),
    Part("faiss", "gates.retrievers:faiss_on_the_gpu", 60),
    Part("reading", "gates.reading:reads_and_writes", 110),
    Part("batch-reader", "gates.batch:batch_reader", 80),
    Part("saving", "gates.saving:saving", 60),
    Part("training", "gates.training:steps", 90),
    Part("activations", "gates.training:activations", 90),
    # Times: one at a time, those that decide what "auto" takes first.
    Part("bench-attention", "speed.benches:attention", 60, timed=True),
    Part("bench-gradient", "speed.gradient:gradient", 45, timed=True),
    Part("bench-decode", "speed.benches:decode", 90, timed=True),
    Part("bench-read", "speed.benches:read", 110, timed=True),
    Part("bench-batch", "speed.batch:batch", 80, timed=True),
    Part("bench-score", "speed.benches:score", 40, timed=True),
    Part("bench-attention-flex", "speed.benches:attention_flex", 60, timed=True),
)


def parts_of(names: Sequence[str] | None, *, rehearsal: bool) -> list[Part]:
    """Return the parts of a run: those named, or all. Raises ValueError for an unknown name."""
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"parts must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [part for part in PARTS if (names is None or part.name in names) and (rehearsal or not part.on_cpu)]
