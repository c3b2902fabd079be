"""Comparisons of a retrofitted decoder with the oracle, or with itself in another way.

Each function returns the largest absolute error between logits or rows of standard deviation one to three in float32;
`measure.py` records them, and `tests/hf/retrofit/test_architectures.py` asserts on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.retrofitted import K, Pair
from mplus.hf.reading.override import reading_as

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.quality.architectures.decoders import Architecture

TOLERANCE = 2e-5
HYBRID_TOLERANCE = 1e-4
"""What the recorded table is held to; tests measure what rounding does where they run (`tests/helpers/noise.py`).
Recurrences run step by step round differently, without a memory too."""

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
}
WRITTEN = (70, 16)
"""Tokens written to the two streams of an unequal memory: one STM is full, the other is not."""
PROMPTS = (11, 7)
"""Tokens of the two prompts of a padded batch."""


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference. Raises ValueError for unequal shapes."""
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shapes {list(a.shape)} and {list(b.shape)}")
    return (a - b).abs().max().item()


def stm_read(pair: Pair) -> tuple[float, float]:
    """Compare reading the STM with the oracle; return the error, and how much memory moves the logits."""
    memory = pair.memory(chunks=2)
    (view,) = memory.snapshot()
    ids = pair.text(9)
    expected = oracle.read(pair.plain, ids, _stm_rows(pair, view))
    moved = error(pair.plain(input_ids=ids).logits, expected)
    return error(pair.wrapped(input_ids=ids, memory=memory).logits, expected), moved


def retrieval_read(pair: Pair) -> float:
    """Compare reading the STM and retrieved rows with the oracle, which retrieves by a loop of its own."""
    memory = pair.memory()
    (view,) = memory.snapshot()
    ids = pair.text(9)
    expected = oracle.read_with_retrieval(pair.plain, ids, pair.retrieving(view), pair.rows(view))
    return error(pair.wrapped(input_ids=ids, memory=memory).logits, expected)


def write(pair: Pair, tokens: int, chunks: int) -> float:
    """Compare writing ``tokens`` tokens after ``chunks`` chunks with the oracle; return the worst layer's error."""
    memory = pair.memory(chunks=chunks) if chunks else pair.new_memory()
    (state,) = memory.states
    ids = pair.text(tokens)
    context = [rows.need_hidden()[-K:] for rows in state.row_lists()["stm"]]
    expected = oracle.write(pair.plain, ids, pair.begin, context, mark=pair.mark, k=K)
    pair.forget_longest_sequence()
    made = memory.engine.write(memory.snapshot(), ids).hidden
    return max(error(got[0], wanted) for got, wanted in zip(made, expected, strict=True))


def steps(architecture: Architecture, pair: Pair) -> float:
    """Compare prefill and steps with a cache with one full forward.

    What is retrieved depends on the prompt; the full forward retrieves with the first ten tokens, as the prefill does.
    """
    memory, ids = pair.memory(), pair.text(16)
    first = pair.wrapped(input_ids=ids[:, :10], memory=memory, use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    # State-space layers take one token at a time once they have a cache.
    parts = zip(range(10, 16), range(11, 17), strict=True) if architecture.hybrid else ((10, 11), (11, 14), (14, 16))
    for start, stop in parts:
        step = pair.wrapped(input_ids=ids[:, start:stop], memory=memory, past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    with reading_as(pair.wrapped, query_tokens=10):
        return error(torch.cat(logits, 1), pair.wrapped(input_ids=ids, memory=memory).logits)


def padded_batch(pair: Pair) -> float:
    """Compare two rows, one left-padded, with unequal memories, with each row alone; return the worse error."""
    ids, mask = _padded(pair)
    together = pair.wrapped(input_ids=ids, attention_mask=mask, memory=_unequal(pair)).logits
    worst = 0.0
    for row, tokens in enumerate(PROMPTS):
        alone = pair.wrapped(input_ids=ids[row : row + 1, -tokens:], memory=_alone(pair, row)).logits
        worst = max(worst, error(together[row : row + 1, -tokens:], alone))
    return worst


def greedy_generation(pair: Pair) -> bool:
    """Return whether greedy generation gives the tokens of the oracle."""
    memory = pair.memory(chunks=2)
    (view,) = memory.snapshot()
    ids = pair.text(8)
    expected = oracle.generate_greedy(pair.plain, ids, _stm_rows(pair, view), 6)
    return bool(pair.wrapped.generate(ids, memory=memory, max_new_tokens=6).tolist() == expected.tolist())


def generation(pair: Pair, search: str) -> bool:
    """Return whether a padded batch generates the same with and without a cache, and (but for sampling) row by row."""
    ids, mask = _padded(pair)
    memory = _unequal(pair)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {**SEARCHES[search], "max_new_tokens": 6, "use_cache": use_cache}
        found.append(pair.wrapped.generate(ids, attention_mask=mask, memory=memory, **options)[:, -6:].tolist())
    if search != "sampling":  # rows of a batch draw from one stream of random numbers
        rows = [
            pair.wrapped.generate(
                ids[row : row + 1, -tokens:], memory=_alone(pair, row), max_new_tokens=6, **SEARCHES[search]
            )[0, -6:].tolist()
            for row, tokens in enumerate(PROMPTS)
        ]
        found.append(rows)
    return all(one == found[0] for one in found)


def techniques(pair: Pair) -> float:
    """Compare the registered attention function with the cache view, another way to the same numbers."""
    memory, ids = pair.memory(), pair.text(9)
    by_function = pair.wrapped(input_ids=ids, memory=memory).logits
    retrofit = pair.wrapped.mplus_engine.retrofit
    retrofit.technique = "cache_view"
    try:
        return error(pair.wrapped(input_ids=ids, memory=memory).logits, by_function)
    finally:
        retrofit.technique = "attention"


def _stm_rows(pair: Pair, view: Any) -> list[Tensor]:
    return [torch.cat([begin, rows.hidden]) for begin, rows in zip(pair.begin, view.state.stm, strict=True)]


def _padded(pair: Pair) -> tuple[Tensor, Tensor]:
    filler = torch.zeros(1, PROMPTS[0] - PROMPTS[1], dtype=torch.int64)
    ids = torch.cat([pair.text(PROMPTS[0], seed=1), torch.cat([filler, pair.text(PROMPTS[1], seed=2)], 1)])
    mask = torch.ones_like(ids)
    mask[1, : filler.shape[1]] = 0
    return ids, mask


def _unequal(pair: Pair) -> Any:
    memory = pair.new_memory(batch_size=2)
    memory.write([pair.text(tokens, seed=3 + row)[0] for row, tokens in enumerate(WRITTEN)])
    return memory


def _alone(pair: Pair, row: int) -> Any:
    memory = pair.new_memory(seed=row)
    memory.write(pair.text(WRITTEN[row], seed=3 + row)[0])
    return memory
