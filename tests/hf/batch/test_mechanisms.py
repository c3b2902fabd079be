"""Rows of mechanisms that others write: those that only put rows in front of a text, and those that do more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import mplus
from mplus.hf.batch.requests import RowRequest
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS
from tests.hf.batch.alone import Company, alone
from tests.hf.references import stir
from tests.mechanisms.gists import GistMechanism
from tests.mechanisms.reading.side_network import SideMechanism
from tests.mechanisms.test_foreign_reads import HalfMechanism
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.two_computations

NEW = 5
OTHERS = {"gists": GistMechanism, "half": HalfMechanism, "side": SideMechanism}
ALONE = {"half": "computes attention in its own way", "side": "changes the final hidden state"}


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    for name, mechanism in OTHERS.items():
        MECHANISMS.register(name, mechanism)
    yield
    for name in OTHERS:
        MECHANISMS.unregister(name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("adapters", [None, {"rank": 2}], ids=["plain", "adapted"])
def test_rows_of_every_mechanism(name: str, adapters: Any) -> None:
    sizes = {**tiny.SIZES, "memory_rows": "hidden", "adapters": adapters, "mechanism": name}
    if name == "side":
        sizes = {
            "chunk_tokens": 16,
            "min_chunk_tokens": 1,
            "retrieved_tokens": 16,
            "mechanism": name,
            "adapters": adapters,
        }
    decoder = load_decoder() if name == "side" else tiny.BY_NAME["llama"].build(0)
    model: Any = mplus.wrap(decoder, mplus.MPlusConfig.from_dict(sizes)).eval()
    stir(model)
    company = Company(mplus.BatchReader(model))
    assert ALONE.get(name, "") in "; ".join(company.reader.slow_because)
    written = [model.new_memory(seed=seed) for seed in range(3)]
    for seed, memory in enumerate(written[1:]):
        memory.write(tiny.ids(40 + 20 * seed, seed), source=f"s{seed}")
    asked = [RowRequest(one, tiny.ids(3 + place, place)) for place, one in enumerate([*written, None, written[2]])]
    answers = [alone(model, one, NEW) for one in asked]
    company.join(asked[:4], answers[:4])
    company.step()
    company.join(asked[4:], answers[4:])
    company.finish()
