"""Text that waits is read as if it stood in front of the prompt, behind the same memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.testing.rounding import InFloat64, check_close
from tests.memory import tiny

pytestmark = pytest.mark.two_computations

TAIL, PROMPT = tiny.ids(3, 5), tiny.prompts(1, 9)
EXACT = 1e-10
"""Of logits of size 5 in float64, a unit in the last place of which is 9e-16: this allows for 100,000 of them."""


def told(model: Any, *tails: Tensor | None, **options: Any) -> tuple[mplus.Memory, mplus.Memory]:
    """A memory with a few long-term rows, all of which a read brings back, in which ``tails`` wait; and one without."""
    memory = model.new_memory(batch_size=len(tails), **options)
    memory.write([tiny.ids(64, row) for row in range(len(tails))])
    before = memory.fork()
    memory.write(list(tails), source="chat")
    return memory, before


@torch.no_grad()
def logits(model: Any, prompt: Tensor, memory: mplus.Memory, **more: Any) -> Tensor:
    return model(prompt, memory=memory, **more).logits


def behind(tail: Tensor, prompt: Tensor = PROMPT) -> Tensor:
    return torch.cat([tail.expand(len(prompt), -1), prompt], 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_rows": "hidden"},
        {"memory_rows": "projected"},
        {"memory_rows": "projected", "memory_positions": "compressed", "position_span": 6},
        {"memory_rows": "hidden", "memory_positions": "constant"},
        {"memory_rows": "projected", "mechanism": "memoryllm"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_it_is_read_as_text_in_front_of_the_prompt(changes: dict[str, Any]) -> None:
    model = tiny.build(dtype=torch.float64, long_term_tokens=0, **changes)
    memory, before = told(model, TAIL)
    with InFloat64():
        found, expected = logits(model, PROMPT, memory), logits(model, behind(TAIL), before)[:, len(TAIL) :]
    assert float((found - expected).abs().max()) < EXACT
    assert float((logits(model, PROMPT, before) - expected).abs().max()) > 0.1, "it matters"


def test_it_retrieves_with_its_own_words() -> None:
    memory, before = told(tiny.variant("paper"), TAIL)
    assert before.stores[0].count(0) == 4 <= tiny.K0, "all come back, whatever asks"
    model = tiny.variant("paper")
    found, expected = logits(model, PROMPT, memory), logits(model, behind(TAIL), before)[:, len(TAIL) :]
    assert float((found - expected).abs().max()) < tiny.rounding()


def test_in_bfloat16_it_is_as_near_as_text_is() -> None:
    model = tiny.build(dtype=torch.bfloat16, memory_rows="hidden", long_term_tokens=0)
    memory, before = told(model, TAIL)
    found, plain = logits(model, PROMPT, memory), logits(model, behind(TAIL), before)[:, len(TAIL) :]
    twin, same = copy.deepcopy(model).double(), before.to(torch.float64)
    same.streams.engine = twin.mplus_engine
    with InFloat64():
        exact = logits(twin, behind(TAIL), same)[:, len(TAIL) :]
    check_close(found, plain, exact)


def test_where_positions_are_learned_the_text_goes_on_behind_it() -> None:
    model = BY_NAME["gpt2"].build(0).double()
    mplus.wrap(model, mplus.MPlusConfig.from_dict({**tiny.SIZES, "memory_rows": "hidden"}), check=False)
    memory, before = told(model, TAIL)
    found, expected = logits(model, PROMPT, memory), logits(model, behind(TAIL), before)[:, len(TAIL) :]
    assert float((found - expected).abs().max()) < EXACT
    reader = mplus.StaticReader(model.eval())
    state, further = reader.prefill(PROMPT, memory=memory, room=1), tiny.prompts(1, 1, 7)
    step, whole = reader.step(state, further), logits(model, torch.cat([PROMPT, further], 1), memory)
    assert float((step - whole[:, -1]).abs().max()) < EXACT


@pytest.mark.parametrize("rows", ["hidden", "projected"])
def test_each_row_of_a_batch_has_its_own(rows: str) -> None:
    model = tiny.build(dtype=torch.float64, memory_rows=rows)
    memory, _ = told(model, TAIL, None, TAIL[:1])
    prompt, mask = tiny.prompts(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :2] = 0
    together = logits(model, prompt, memory, attention_mask=mask)
    for row in range(3):
        alone = logits(model, prompt[row : row + 1, 2 * (row == 1) :], memory.select([row]))
        assert float((together[row : row + 1, 2 * (row == 1) :] - alone).abs().max()) < EXACT
    same = logits(model, prompt, memory.select([2]))  # one stream, read by all rows
    assert float((same[2:] - together[2:]).abs().max()) < EXACT


def test_an_answer_goes_on_from_it() -> None:
    model = tiny.build(dtype=torch.float64, memory_rows="projected")
    memory, before = told(model, TAIL)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    one, other = (
        model.generate(prompt, memory=read, attention_mask=torch.ones_like(prompt), **settings)
        for prompt, read in ((PROMPT, memory), (behind(TAIL), before))
    )
    assert torch.equal(one[:, -5:], other[:, -5:])
    static = mplus.StaticReader(model.eval()).prefill(PROMPT, memory=memory, room=1)
    assert float((static.logits - logits(model, PROMPT, memory)[:, -1]).abs().max()) < EXACT
    assert static.memory_rows == 1 + 4 + tiny.N + len(TAIL)


def test_only_where_something_waits_is_a_pass_run_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.variant("paper")
    memory, before = told(model, TAIL, TAIL)
    own, passes = model.mplus_engine.decoder.run, []
    monkeypatch.setattr(
        model.mplus_engine.decoder, "run", lambda text, **given: (passes.append(text), own(text, **given))[1]
    )
    logits(model, tiny.prompts(2), before)
    assert passes == []
    logits(model, tiny.prompts(2), memory)
    assert [list(text.shape) for text in passes] == [[2, 3]]


@pytest.mark.parametrize("rows", ["hidden", "projected"])
def test_what_is_read_of_it_is_kept_until_memory_or_weights_change(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(memory_rows=rows)
    memory, _ = told(model, TAIL)
    own, passes = model.mplus_engine.decoder.run, []
    monkeypatch.setattr(
        model.mplus_engine.decoder, "run", lambda text, **given: (passes.append(text), own(text, **given))[1]
    )

    def passes_of_a_read(of: Any = memory, prompt: Tensor = PROMPT) -> int:
        """Read it, see that a memory that was never read gives the same bits, and count the passes of the first."""
        passes.clear()
        found = logits(model, prompt, of)
        count = len(passes)
        assert torch.equal(found, logits(model, prompt, of.fork()))
        return count

    assert [passes_of_a_read() for _ in range(3)] == [1, 0, 0]
    assert passes_of_a_read(prompt=tiny.prompts(2, 8)) == 0, "another prompt, of two rows"
    memory.write(tiny.ids(1, 7), source="chat")
    assert [passes_of_a_read() for _ in range(2)] == [1, 0], "the tail has grown"
    weight = model.model.layers[0].mlp.down_proj.weight  # keys and values that are kept do not depend on it
    with torch.no_grad():
        weight.mul_(1.5)
    assert [passes_of_a_read() for _ in range(2)] == [1, 0]
    weight.data.mul_(0.5)  # leaves no trace but the numbers
    model.model.layers[0].mlp.down_proj.lora_A["read"].weight.data[-1, -1] += 1.0
    assert [passes_of_a_read() for _ in range(2)] == [1, 0]
    passes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, PROMPT, memory)
    model(PROMPT, memory=memory)  # gradients flow
    assert len(passes) == 2
    other = model.new_memory(eviction="lru")
    other.write(TAIL)
    assert [passes_of_a_read(other) for _ in range(2)] == [1, 1], "every read has to note what it retrieves"


def test_a_new_memory_of_the_published_kind_reads_it_alone() -> None:
    """Nothing is in front of the first text of published MemoryLLM, not even a begin row."""
    model = tiny.variant("memoryllm-published")
    memory, short = model.new_memory(), tiny.ids(3, 6)
    memory.write(short)
    found, expected = logits(model, PROMPT, memory), logits(model, behind(short), model.new_memory())[:, 3:]
    assert float((found - expected).abs().max()) < tiny.rounding("memoryllm-published")
