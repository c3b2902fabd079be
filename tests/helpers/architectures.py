"""Parameters of tests that run over the architectures of ``benchmarks.quality.architectures.decoders``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.quality.architectures.decoders import PURE, Architecture

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

REPRESENTATIVE = frozenset(
    {
        "llama",
        "mistral-sliding",
        "gemma2",
        "gpt2",
        "gpt-oss",
        "deepseek-v3",
        "stablelm",
        "falcon-new",
        "bloom",
        "codegen",
        "phi3-longrope",
        "qwen3-next",
    }
)
"""Every kind of position, mask and attention that the table has; the others are tested in fewer ways but nightly."""


def every(architectures: Iterable[Architecture] = PURE, *, representative: bool = False) -> pytest.MarkDecorator:
    """Run a test with ``architecture`` set to each of ``architectures``; on every change to representative ones only
    where these suffice."""
    return pytest.mark.parametrize(
        "architecture",
        [
            pytest.param(
                a, id=a.name, marks=pytest.mark.nightly if representative and a.name not in REPRESENTATIVE else ()
            )
            for a in architectures
        ],
    )


def variants(architectures: Iterable[Architecture] = PURE) -> Iterator[tuple[Architecture, str, bool]]:
    """Each architecture in each attention implementation, and whether that is to be tested on every change.

    On every change: in every implementation where it is representative, otherwise in the one a decoder has by itself.
    """
    for architecture in architectures:
        for implementation in architecture.implementations:
            own = implementation == architecture.implementations[-1]
            yield architecture, implementation, own or architecture.name in REPRESENTATIVE


def every_variant(architectures: Iterable[Architecture] = PURE) -> pytest.MarkDecorator:
    """Run a test with ``architecture, implementation`` set to ``variants``."""
    return pytest.mark.parametrize(
        ("architecture", "implementation"),
        [
            pytest.param(a, i, id=f"{a.name}-{i}", marks=() if always else pytest.mark.nightly)
            for a, i, always in variants(architectures)
        ],
    )


def every_variant_with(
    name: str, values: Iterable[Any], always: Container[Any], architectures: Iterable[Architecture] = PURE
) -> pytest.MarkDecorator:
    """As ``every_variant``, with ``name`` set to each of ``values``: nightly only, unless it is among ``always`` or the
    architecture is representative."""
    values = list(values)
    return pytest.mark.parametrize(
        ("architecture", "implementation", name),
        [
            pytest.param(
                a,
                i,
                value,
                id=f"{a.name}-{i}-{value}",
                marks=() if usual and (value in always or a.name in REPRESENTATIVE) else pytest.mark.nightly,
            )
            for a, i, usual in variants(architectures)
            for value in values
        ],
    )
