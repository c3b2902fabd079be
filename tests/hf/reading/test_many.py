"""Many memories are read in one forward, each row as its memory is read alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import InputError, MemoryMismatchError, NotSupported, ReadTogetherError
from mplus.hf.adapters.lora import LowRankFactor
from mplus.hf.model.static_reader import merged_projections, running_decoder
from mplus.hf.reading.generating import generate_in
from mplus.hf.reading.many.joint import joint_groups, read_many
from mplus.hf.reading.reading import retrieved_sources
from mplus.hf.retrofit.context import with_merged
from mplus.testing.rounding import error
from tests.mechanisms.kv.memories import wrapped
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

TOKENS = (0, 4, 20, 60, 210)
"""Written to the memories: nothing, text that waits, short-term rows, and long-term rows of which few or many."""


def memories(model: Any, tokens: Sequence[int] = TOKENS, **options: Any) -> list[Memory]:
    """Memories of unequal size, with sources of their own."""
    made = [model.new_memory(seed=number, **options) for number in range(len(tokens))]
    for number, (memory, count) in enumerate(zip(made, tokens, strict=True)):
        if count:
            memory.write(tiny.ids(count, seed=number), source=f"text {number}")
    return made


def texts(rows: int, lengths: Sequence[int] = (7, 3, 5, 9, 4)) -> list[Tensor]:
    """Prompts of unequal length."""
    return [tiny.ids(lengths[row % len(lengths)], seed=500 + row) for row in range(rows)]


@torch.no_grad()
def together(model: Any, some: Sequence[Memory], prompts: Sequence[Tensor]) -> tuple[Any, Any]:
    """The output of one forward over all prompts, padded on the left, and its reading."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    reading = read_many(model.mplus_engine, some)
    return generate_in(model, reading, model, input_ids=ids, attention_mask=mask, use_cache=True), reading


@torch.no_grad()
def alone(model: Any, memory: Memory, prompt: Tensor) -> Any:
    return model(prompt[None], memory=memory, use_cache=True, output_sources=True)


def rounding(model: Any) -> float:
    """How far logits may be apart that are computed in two ways, in the dtype of the decoder."""
    return tiny.rounding() * torch.finfo(model.dtype).eps / torch.finfo(torch.float32).eps


def compare(model: Any, some: Sequence[Memory], prompts: Sequence[Tensor]) -> None:
    output, reading = together(model, some, prompts)
    sources = retrieved_sources(reading)
    for row, (memory, prompt) in enumerate(zip(some, prompts, strict=True)):
        expected = alone(model, memory, prompt)
        found = output.logits[row : row + 1, -len(prompt) :]
        assert error(found, expected.logits) <= rounding(model), f"row {row}"
        here, there = ([rows for rows in each if rows] for each in (sources[row], expected.memory_sources[0]))
        assert [[(r.source, r.age) for r in rows] for rows in here] == [
            [(r.source, r.age) for r in rows] for rows in there
        ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("paper", "projected"), ("paper", "hidden"), ("paper", "both"), ("published", None), ("memoryllm", None)],
)
def test_each_row_reads_its_own_memory_as_alone(name: str, kind: str | None) -> None:
    model = tiny.variant(name)
    some = memories(model, memory_rows=kind)
    compare(model, some, texts(5))
    compare(model, [some[3], some[0], some[3], some[4]], texts(4))  # one memory twice
    compare(model, [some[4]] * 2, texts(2))


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"memory_positions": "compressed", "position_span": 5}])
def test_also_in_half_precision_and_wherever_rows_sit(changes: dict[str, Any]) -> None:
    model = tiny.build(**changes)
    compare(model, memories(model), texts(5))


def test_memories_of_keys_and_values_too() -> None:
    model = wrapped()
    compare(model, memories(model, (0, 9, 20, 60)), texts(4, (9, 4, 6, 12)))


def test_those_that_cannot_be_read_are_named_and_the_rest_is_not_read() -> None:
    model, other = tiny.variant("paper"), tiny.variant("memoryllm")
    good, wide = memories(model, (130,))[0], model.new_memory(batch_size=2)
    with pytest.raises(ReadTogetherError, match=r"2 of 4 memories cannot be read.*\[1\] MemoryMismatchError") as failed:
        read_many(model.mplus_engine, [good, other.new_memory(), good, wide])
    assert sorted(failed.value.errors) == [1, 3]
    assert all(isinstance(error, MemoryMismatchError) for error in failed.value.errors.values())
    with pytest.raises(InputError, match="at least one memory"):
        read_many(model.mplus_engine, [])


def test_whatever_they_keep_of_a_row_one_forward_reads_them_but_not_by_two_tokenizers() -> None:
    model = tiny.variant("paper")
    some = [memories(model, (130,), memory_rows=kind)[0] for kind in ("projected", "hidden", "both")]
    compare(model, some, texts(3))
    some.append(model.new_memory(tokenizer=object()))
    assert joint_groups(model.mplus_engine, some) == [[0, 1, 2], [3]]
    with pytest.raises(NotSupported, match="sort them with joint_groups"):
        read_many(model.mplus_engine, some)


def test_text_that_waits_is_read_once_for_all_reads_of_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny.variant("paper"), list[int]()
    some = memories(model, (3, 130, 2, 1))  # all of three texts waits
    run = model.mplus_engine.decoder.run
    monkeypatch.setattr(model.mplus_engine.decoder, "run", lambda ids, **to: passes.append(len(ids)) or run(ids, **to))
    alone(model, some[0], texts(1)[0])
    together(model, some, texts(4))
    assert passes == [1, 2], "what a read alone had read is not read again"
    compare(model, some[::-1], texts(4))
    compare(model, [some[2], some[2], some[0]], texts(3))
    assert passes == [1, 2]


def test_with_the_adapter_merged_the_same_is_read_without_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny.variant("paper"), list[int]()
    some = memories(model, (20, 130, 210), memory_rows="projected")
    compare(model, some, texts(3))  # from here on begin and short-term rows are known
    merged = merged_projections(model, running_decoder(model, "read"))
    forward = LowRankFactor.forward
    monkeypatch.setattr(LowRankFactor, "forward", lambda factor, x: calls.append(1) or forward(factor, x))
    plain, _ = together(model, some, texts(3))
    assert calls
    calls.clear()
    with with_merged(model, merged):
        output, _ = together(model, some, texts(3))
        assert not calls
        assert error(output.logits[:, -1], plain.logits[:, -1]) <= rounding(model)
        model(texts(1)[0][None], memory=some[1])  # gradients are those of the factors
    assert calls
    calls.clear()
    together(model, some, texts(3))
    assert calls


def test_short_term_rows_are_turned_once_for_all_reads_of_a_memory() -> None:
    model = tiny.variant("paper")
    some = memories(model, memory_rows="projected")
    compare(model, some, texts(5))
    prepared = [model.mplus_engine.prepared(one, one.version, model.mplus_engine.watch.look()) for one in some]
    turned = [dict(one.short_term) for one in prepared]
    assert all(turned[2:])
    together(model, some[::-1], texts(5))
    for one, before in zip(prepared, turned, strict=True):
        assert one.short_term.keys() == before.keys()
        assert all(one.short_term[key] is before[key] for key in before)
