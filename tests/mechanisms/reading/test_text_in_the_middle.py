"""Memory in the middle of a text (``Opened.insertion``) is read as the decoder reads it as text at that place."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import MechanismError, NotSupported
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS
from mplus.testing.rounding import InFloat64, allowed, error
from tests.helpers import noise
from tests.mechanisms.kv.memories import text
from tests.mechanisms.reading.middle import Middle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

BEGINS, TOLD = [4, 2], [11, 7]
REST = 9
PROMPT = max(BEGINS) + REST
WINDOWED = ["mistral-sliding", "gemma2", "gemma3", "cohere2", "gpt-oss"]
OTHERS = ["llama", "gpt2", "deepseek-v3", "smollm3", "stablelm"]
SIZES: dict[str, Any] = {"chunk_tokens": 16, "min_chunk_tokens": 1, "adapters": None, "memory_rows": "hidden"}


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    MECHANISMS.register("middle", Middle)
    yield
    MECHANISMS.unregister("middle")


@pytest.fixture(autouse=True)
def begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Middle, "begins", BEGINS)


@functools.cache
def decoders(name: str) -> tuple[Any, Any]:
    return BY_NAME[name].build(0), wrapped(BY_NAME[name].build(0))


def wrapped(decoder: Any, chunk: int = 16) -> Any:
    """The decoder with such a memory; its self-check reads with begins of one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Middle, "begins", [])
        return mplus.wrap(decoder, {"mechanism": "middle", **SIZES, "chunk_tokens": chunk})


def parts(row: int) -> tuple[Tensor, Tensor, Tensor]:
    return text(BEGINS[row], row), text(TOLD[row], 10 + row), text(REST, 20 + row)


def memory_of(model: Any, rows: int = 2) -> mplus.Memory:
    memory = model.new_memory(rows)
    memory.write([torch.cat(parts(row)[:2]) for row in range(rows)])
    return memory


def prompts() -> dict[str, Tensor]:
    """``[2, PROMPT]``, the shorter one padded on the left."""
    ids, mask = torch.full((2, PROMPT), 3), torch.zeros(2, PROMPT, dtype=torch.int64)
    for row in range(2):
        begin, _, rest = parts(row)
        ids[row, -len(begin) - REST :], mask[row, -len(begin) - REST :] = torch.cat([begin, rest]), 1
    return {"input_ids": ids, "attention_mask": mask}


def without_told(found: Tensor, row: int) -> Tensor:
    """Of ``[n, ...]`` for ``[begin | told | rest]``: what is for begin and rest."""
    return torch.cat([found[: BEGINS[row]], found[BEGINS[row] + TOLD[row] :]])


@torch.no_grad()
def as_text(plain: Any, row: int) -> Tensor:
    found: Tensor = plain(torch.cat(parts(row))[None]).logits[0]
    return without_told(found, row)


def check(name: str, found: Tensor, plain: Any = None) -> None:
    plain = decoders(name)[0] if plain is None else plain
    for row in range(2):
        wanted = as_text(plain, row)
        assert error(found[row, -len(wanted) :], wanted) <= noise.rounding(name)


@pytest.mark.parametrize("name", [*OTHERS, *WINDOWED])
def test_two_rows_with_begins_of_different_length_in_one_forward(name: str) -> None:
    plain, model = decoders(name)
    with torch.no_grad():
        found = model(**prompts(), memory=memory_of(model)).logits
        without = plain(**prompts()).logits
    check(name, found)
    assert error(found[:, -REST:], without[:, -REST:]) >= 0.5, "memory must matter for the comparison to mean anything"


@pytest.mark.parametrize("scaling", [{"rope_type": "yarn"}, {"rope_type": "linear"}], ids=str)
def test_scaled_rotations_are_those_of_the_text(scaling: dict[str, Any]) -> None:
    rope = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16, **scaling}
    llama = BY_NAME["llama"]
    scaled = dataclasses.replace(llama, options={**llama.options, "rope_parameters": rope})
    plain, model = scaled.build(0), wrapped(scaled.build(0))
    with torch.no_grad():
        found = model(**prompts(), memory=memory_of(model)).logits
    check("llama", found, plain)


@pytest.mark.parametrize("name", [*WINDOWED, "llama", "gpt2"])
@pytest.mark.parametrize("cut", [3, PROMPT - 2], ids=["inside a begin", "behind the begins"])
def test_a_cache_goes_on_wherever_it_was_left(name: str, cut: int) -> None:
    model, prompt = decoders(name)[1], prompts()
    memory = memory_of(model)
    with torch.no_grad():
        output = model(prompt["input_ids"][:, :cut], attention_mask=prompt["attention_mask"][:, :cut], memory=memory)
        steps = [output.logits]
        for place in range(cut, PROMPT):
            seen = {
                "attention_mask": prompt["attention_mask"][:, : place + 1],
                "past_key_values": output.past_key_values,
            }
            output = model(prompt["input_ids"][:, place : place + 1], memory=memory, **seen)
            steps.append(output.logits)
    check(name, torch.cat(steps, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"num_beams": 3}),
        ("llama", {"num_return_sequences": 2, "num_beams": 2}),
        ("llama", {"cache_implementation": "static"}),
        ("llama", {"prompt_lookup_num_tokens": 2}),
        ("llama", {"use_cache": False}),
        ("gemma3", {}),
        ("gemma3", {"cache_implementation": "static"}),
        ("mistral-sliding", {"num_beams": 2}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_it_generates_as_the_decoder_behind_the_text(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Middle, "begins", BEGINS[:1])
    plain, model = decoders(name)
    begin, told, rest = parts(0)
    steps: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    prompt, behind = torch.cat([begin, rest])[None], torch.cat([begin, told, rest])[None]
    made = model.generate(prompt, memory=memory_of(model, 1), **steps)
    wanted = plain.generate(behind, **steps)
    assert made[:, prompt.shape[1] :].tolist() == wanted[:, behind.shape[1] :].tolist()
    assert made[0, : prompt.shape[1]].tolist() == prompt[0].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_for_two_prompts_with_padding(cache: str) -> None:
    plain, model = decoders("gemma3")
    steps: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    made = model.generate(**prompts(), memory=memory_of(model), **steps)
    for row in range(2):
        behind = torch.cat(parts(row))[None]
        assert made[row, PROMPT:].tolist() == plain.generate(behind, **steps)[0, behind.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_decoder_reads_it_as_text(dtype: torch.dtype) -> None:
    exact = load_decoder().double()
    plain = copy.deepcopy(exact).to(dtype)
    model = wrapped(copy.deepcopy(plain), 64)
    told = [torch.cat(parts(row)[:2]) for row in range(2)]
    memory = model.new_memory(2)
    memory.write(told)
    with torch.no_grad():
        found = model(**prompts(), memory=memory).logits.double()
        for row in range(2):
            near = as_text(plain, row)
            with InFloat64():
                wanted = as_text(exact, row)
            assert error(found[row, -len(wanted) :], wanted) <= allowed(near, wanted)


def test_hidden_states_weights_loss_and_gradients_are_those_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Middle, "begins", BEGINS[:1])
    plain = BY_NAME["llama"].build(0, "eager")
    model = wrapped(BY_NAME["llama"].build(0, "eager"))
    memory = memory_of(model, 1)
    begin, told, rest = parts(0)
    prompt, whole = torch.cat([begin, rest])[None], torch.cat([begin, told, rest])[None]
    labels = whole.clone()
    labels[:, : len(begin) + len(told) + 1] = -100
    asked = {"output_hidden_states": True, "output_attentions": True}
    found = model(prompt, labels=without_told(labels[0], 0)[None], memory=memory, **asked)
    wanted = plain(whole, labels=labels, **asked)
    allow = noise.rounding("llama")
    assert error(found.loss, wanted.loss) <= allow
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert error(one[0], without_told(other[0], 0)) <= allow
    # Memory in front of all text, as in every result of mplus: the columns of the plain decoder in another order.
    order = [*range(len(begin), len(begin) + len(told)), *range(len(begin)), *range(-len(rest), 0)]
    for one, other in zip(found.attentions, wanted.attentions, strict=True):
        assert error(one[0], torch.cat([other[0][:, : len(begin)], other[0][:, -len(rest) :]], 1)[..., order]) <= allow
    found.loss.backward()
    assert all(bool(one.grad.abs().sum() > 0) for name, one in model.named_parameters() if "layers" in name)


def test_without_rows_the_decoder_is_asked_once_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Middle, "begins", [0])
    plain, model = decoders("llama")
    ran: list[Any] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *given: ran.append(given))
    ids = text(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, memory=model.new_memory()).logits, plain(ids).logits)
    hook.remove()
    assert len(ran) == 1


def test_decoders_that_attend_by_themselves_refuse_it_by_name() -> None:
    with pytest.raises(NotSupported, match="GPTJAttention computes attention by itself, so memory can only"):
        wrapped(BY_NAME["gptj"].build(0))


def test_a_mechanism_that_says_another_number_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Middle, "begins", BEGINS[:1])
    model = decoders("llama")[1]
    opens = Middle.open

    def one_more(*given: Any) -> Any:
        opened = opens(*given)
        assert opened.insertion is not None
        return evolve(opened, insertion=evolve(opened.insertion, rows=opened.insertion.rows + 1))

    monkeypatch.setattr(Middle, "open", one_more)
    with pytest.raises(MechanismError, match=r"must return the 12 rows that the Insertion of open says.*got 11"):
        model(torch.cat([parts(0)[0], parts(0)[2]])[None], memory=memory_of(model, 1))
