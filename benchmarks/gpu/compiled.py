"""Kernels compiled ahead of time, for the GPUs with least shared memory and for Hopper, on a machine without any."""

from __future__ import annotations

from benchmarks.gpu.session import Session

CAPABILITIES = (80, 90)


def compile_kernels(session: Session) -> None:
    """Compile every configuration that ships, or one of each kernel in a rehearsal of seconds."""
    from tests.compiled.shipped import SHIPPED

    makers = {make: (make, key, tiles) for make, key, tiles in reversed(SHIPPED)}
    for make, key, tiles in makers.values() if session.few else SHIPPED:
        for capability in CAPABILITIES[:1] if session.few else CAPABILITIES:
            with session.gate(f"{make.__name__}/{key}/{capability}") as gate:
                needs = make(key, tiles, capability)
                session.write("compiled", kernel=make.__name__, key=key, capability=capability, shared=needs.shared)
                gate.holds(needs.stack == 0, f"registers are spilled into {needs.stack} bytes of stack")
