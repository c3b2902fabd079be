"""Every kind of decoder and mechanism has its rows, stepped together or one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import retrofit
from mplus.errors import InputError
from mplus.hf.batch.requests import RowRequest
from tests.hf.batch.alone import Company, alone
from tests.hf.references import ids, stir

pytestmark = pytest.mark.two_computations

NEW = 5
TOGETHER = ("llama", "qwen3", "gpt-neox", "phi", "gpt2")
ONE_BY_ONE = {"gemma2": "layers of other kinds", "bloom": "ALiBi", "jamba": "carry no memory", "deepseek-v3": ""}
FURTHER = ("mistral", "qwen2", "phi3", "opt", "opt-post-norm", "olmo2", "mixtral", "qwen3-moe", "granite", "smollm3")


@pytest.mark.parametrize(
    "name", [*TOGETHER, *ONE_BY_ONE, *(pytest.param(name, marks=pytest.mark.nightly) for name in FURTHER)]
)
def test_rows_of_every_decoder(name: str) -> None:
    pair = retrofit(BY_NAME[name])
    stir(pair.wrapped)
    model = pair.wrapped.eval()
    reasons = mplus.BatchReader(model).slow_because
    assert ONE_BY_ONE.get(name, "") in "; ".join(reasons)
    assert bool(reasons) == (name in ONE_BY_ONE and name != "deepseek-v3")
    memory, other = pair.memory(), pair.memory(seed=1, chunks=1)
    company = Company(mplus.BatchReader(model))
    asked = [
        RowRequest(one, ids(1, tokens, seed=tokens)[0], max_new_tokens=NEW)
        for one, tokens in ((memory, 7), (None, 4), (other, 5), (memory, 2))
    ]
    answers = [alone(model, one, NEW) for one in asked]
    company.join(asked[:3], answers[:3])
    company.step()
    company.join(asked[3:], answers[3:])
    company.leave(company.reader.rows[:1])
    company.finish()


def test_learned_positions_end() -> None:
    pair = retrofit(BY_NAME["gpt2"])
    model = pair.wrapped.eval()
    most = model.config.n_positions
    reader = mplus.BatchReader(model)
    (long, short) = reader.join([(None, ids(1, most - 1)[0]), (None, ids(1, 3)[0])])
    assert (long.room, short.room) == (1, most - 3)
    reader.step([1, 1])
    with pytest.raises(InputError, match=r"no position left for another token of the rows \[0\]"):
        reader.step([1, 1])
    reader.leave(long)
    reader.step([1])


def test_a_row_of_the_wrapped_decoder_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = retrofit(BY_NAME["bloom"])
    model: Any = pair.wrapped.eval()
    reader = mplus.BatchReader(model)
    one, two = reader.join([(pair.memory(), ids(1, 3)[0]), (None, ids(1, 4)[0])])
    prepare = model.prepare_inputs_for_generation

    def failing(given: torch.Tensor, **inputs: Any) -> Any:
        if given.shape[1] == 4:
            raise RuntimeError("no more memory")
        return prepare(given, **inputs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", failing)
    for _ in range(2):
        logits = reader.step([1, 2])
        assert logits[0].isnan().all()
        assert logits[1].isfinite().all()
        assert isinstance(one.error, RuntimeError)
    assert two.error is None
    reader.leave(one)
    assert reader.rows == [two]
