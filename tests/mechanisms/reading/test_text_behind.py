"""A mechanism may put a text behind its rows (``text_offset``): it is read as the decoder reads it there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import InputError, NotSupported
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.base import Absorbed, MemoryMechanism
from mplus.mechanisms.decoder import side_by_side
from mplus.mechanisms.opened import Opened
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.rows import MemoryRows
from tests.helpers import noise
from tests.mechanisms.kv.memories import text
from tests.mechanisms.kv.memories import wrapped as wrapped_kv

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from mplus.backends.base import Segment
    from mplus.mechanisms.decoder import Decoder, Project, Text
    from mplus.memory.state import StreamView


class NoState(StreamState):
    def row_lists(self) -> dict[str, Any]:
        return {}

    def with_rows(self, rows: Any) -> NoState:
        return self


class TextBehind(MemoryMechanism):
    """Puts in front of a text what the layers received for the first one that was written, at positions 0, 1, ..."""

    name, State, uses_retriever, keeps = "behind", NoState, False, frozenset({"hidden"})  # type: ignore[assignment]

    def new_state(self, layout: Any, columns: Any = None) -> NoState:
        return NoState()

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        return Update(decoder.run(text.need_ids(), collect={"inputs"}).inputs)

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        births = torch.arange(state.clock, state.clock + update.hidden[0].shape[0])
        for layer, hidden in enumerate(update.hidden):
            context.store.append(layer, MemoryRows(hidden, births, torch.full_like(births, source)))
        return Absorbed(evolve(state, clock=state.clock + len(births)), 0, 0)

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        return Opened(views, text_offset=torch.tensor([self.prefix_rows(view) for view in views]))

    def prefix(
        self, opened: Opened, layer: int, found: Any, hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | None:
        rows = side_by_side([view.store.gather(layer, view.store.ids(layer)).need_hidden() for view in opened.views])
        return (project(evolve(rows, positions=torch.arange(rows.hidden.shape[1])[None])),)

    def prefix_rows(self, view: StreamView) -> int:
        return view.store.count(0)


FRONTS = (11, 7)
NAMES = ["llama", "gpt2", "opt"]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    MECHANISMS.register("behind", TextBehind)
    yield
    MECHANISMS.unregister("behind")


@functools.cache
def decoders(name: str) -> tuple[Any, Any]:
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 1, "adapters": None, "memory_rows": "hidden"}
    return BY_NAME[name].build(0), mplus.wrap(BY_NAME[name].build(0), {"mechanism": "behind", **sizes})


def memory_of(model: Any, rows: int) -> mplus.Memory:
    memory = model.new_memory(rows)
    memory.write([text(FRONTS[row], row) for row in range(rows)])
    return memory


@torch.no_grad()
def as_text(name: str, row: int, prompt: Tensor) -> Tensor:
    """``[T, V]``: the decoder alone, reading the first text and behind it ``prompt``."""
    found: Tensor = decoders(name)[0](torch.cat([text(FRONTS[row], row), prompt])[None]).logits[0, FRONTS[row] :]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fronts_of_different_length_padding_and_a_cache(name: str) -> None:
    model, prompt = decoders(name)[1], text(9, 5)
    memory = memory_of(model, 2)
    padded, mask = torch.stack([prompt, prompt]), torch.ones(2, 9, dtype=torch.int64)
    padded[1, :4], mask[1, :4] = 3, 0
    with torch.no_grad():
        whole = model(padded, attention_mask=mask, memory=memory).logits
        first = model(padded[:, :6], attention_mask=mask[:, :6], memory=memory)
        cache = first.past_key_values
        steps = [first.logits]
        for place in range(6, 9):
            seen = {"attention_mask": mask[:, : place + 1], "past_key_values": cache}
            steps.append(model(padded[:, place : place + 1], memory=memory, **seen).logits)
    allow = noise.rounding(name)
    for found in (whole, torch.cat(steps, 1)):
        assert float((found[0] - as_text(name, 0, prompt)).abs().max()) <= allow
        assert float((found[1, 4:] - as_text(name, 1, prompt[4:])).abs().max()) <= allow


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_it_generates_as_the_decoder_behind_the_text(name: str, options: dict[str, Any]) -> None:
    (plain, model), prompt = decoders(name), text(6, 5)[None]
    steps: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(prompt, memory=memory_of(model, 1), **steps)
    behind = torch.cat([text(FRONTS[0])[None], prompt], 1)
    assert made[0, 6:].tolist() == plain.generate(behind, **steps)[0, behind.shape[1] :].tolist()


@functools.cache
def kv_on_learned_positions() -> Any:
    """256 positions, of which up to 1 + 120 are memory's where a text leaves so many."""
    return wrapped_kv("gpt2", chunk_tokens=40, retrieved_tokens=120, context_chunks=None)


def test_more_positions_than_were_learned_are_refused_before_anything_runs() -> None:
    model = decoders("gpt2")[1]
    memory = memory_of(model, 1)
    assert model(text(245, 1)[None], memory=memory).logits.shape[1] == 245
    ran: list[Any] = []
    hook = model.transformer.h[0].register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[1]))
    said = "256 learned positions, and the text behind 11 rows of memory needs 257: use a shorter text"
    with pytest.raises(InputError, match=said):
        model(text(246, 1)[None], memory=memory)
    with pytest.raises(InputError, match=said):
        model.generate(text(240, 1)[None], memory=memory, max_new_tokens=7)
    hook.remove()
    assert not ran
    assert model.generate(text(240, 1)[None], memory=memory, max_new_tokens=6, pad_token_id=0).shape == (1, 246)


def test_chunks_that_would_be_written_behind_more_positions_than_were_learned_are_refused() -> None:
    memory = kv_on_learned_positions().new_memory()
    memory.write(text(120))
    with pytest.raises(InputError, match="256 learned positions, and 40 tokens behind 241 rows of memory need 281"):
        memory.write(text(160, 3))
    assert memory.states[0].tokens == 240  # chunks before it were written


def test_behind_learned_positions_nothing_is_chosen_anew() -> None:
    model = kv_on_learned_positions()
    memory = model.new_memory()
    memory.write(text(80))
    said = "retrieve_every does not go with the mechanism 'kv' here: its rows sit at positions 0, 1, "
    with pytest.raises(NotSupported, match=said):
        model(text(9)[None], memory=memory, retrieve_every=2)
    with pytest.raises(NotSupported, match=said):
        model.generate(text(9)[None], memory=memory, retrieve_every=2, max_new_tokens=4)
