"""The refresh of LaMemo on a rotary decoder, against plain torch, and what it refuses."""

from __future__ import annotations

import math
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from mplus_lamemo.state import WindowState
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mplus
from mplus.errors import ConfigError, NotSupported
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.hf.pretrained.shipped import load_recall
from mplus.training import train

README = Path(__file__).parents[1] / "README.md"
VOCABULARY, WINDOW = 61, 9
State = dict[str, Any]


class Reference:
    """A Llama by its weights; ``sign`` is -1 where the look-ahead is mirrored."""

    def __init__(self, model: Any, window: int, sign: int, direction: Tensor | None = None) -> None:
        self.config, self.named = model.config, dict(model.state_dict())
        self.window, self.sign, self.direction = window, sign, direction
        self.size = self.config.hidden_size // self.config.num_attention_heads

    def weight(self, name: str) -> Tensor:
        return self.named[f"model.{name}.weight"]

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return hidden * scale * self.weight(name)

    def rotate(self, part: Tensor, places: Tensor) -> Tensor:
        """Rotate ``[n, h, D]``."""
        frequencies = 10000.0 ** (-torch.arange(0, self.size, 2).double() / self.size)
        angle = (places.double()[:, None] * frequencies)[:, None]
        first, second = part[..., : self.size // 2], part[..., self.size // 2 :]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(turned, -1)

    def segment(self, ids: Tensor, state: State | None, *, leaks: bool = True) -> tuple[Tensor, State]:
        """Return logits ``[q, V]`` and the next state; without ``leaks`` the window ends before the segment."""
        text = self.weight("embed_tokens")[ids]
        q, m = len(ids), 0 if state is None else len(state["embedded"])
        memory = text[:0] if state is None else state["embedded"]
        new: State = {"embedded": torch.cat([memory, text])[-self.window :], "vectors": [], "mass": [], "ahead": q}
        place = torch.arange(m + q)
        for layer in range(self.config.num_hidden_layers):
            name = f"layers.{layer}"
            normed = self.norm(torch.cat([memory, text]), f"{name}.input_layernorm")
            heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
            queries = (normed @ self.weight(f"{name}.self_attn.q_proj").T).view(m + q, heads, self.size)
            keys = (normed @ self.weight(f"{name}.self_attn.k_proj").T).view(m + q, groups, self.size)
            values = (normed @ self.weight(f"{name}.self_attn.v_proj").T).view(m + q, groups, self.size)
            keys, values = (part.repeat_interleave(heads // groups, 1) for part in (keys, values))
            turned = self.rotate(keys, place)
            scores = torch.einsum("ihd,jhd->ihj", self.rotate(queries[m:], place[m:]), turned) / math.sqrt(self.size)
            scores = scores.masked_fill((place[None] > place[m:, None])[:, None], -math.inf)
            vectors, mass = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), values), scores.logsumexp(-1)
            if state is not None:
                last = m if leaks else m - 1
                asked = queries[:m] if self.direction is None else queries[:m] + self.direction[layer]
                asked = self.rotate(asked, self.sign * place[:m])
                ahead = torch.einsum("ihd,jhd->ihj", asked, self.rotate(keys, self.sign * place)) / math.sqrt(self.size)
                see = (place[None] > place[:m, None]) & (place[None] > m - state["ahead"]) & (place[None] <= last)
                ahead = ahead.masked_fill(~see[:, None], -math.inf)
                found, seen = torch.einsum("ihj,jhd->ihd", ahead.softmax(-1).nan_to_num(), values), ahead.logsumexp(-1)
                alpha = torch.sigmoid(state["mass"][layer] - seen)[..., None]
                vectors = torch.cat([alpha * state["vectors"][layer] + (1 - alpha) * found, vectors])
                mass = torch.cat([torch.logaddexp(state["mass"][layer], seen), mass])
            new["vectors"].append(vectors[-self.window :])
            new["mass"].append(mass[-self.window :])
            whole = torch.cat([memory, text]) + vectors.flatten(1) @ self.weight(f"{name}.self_attn.o_proj").T
            inner = self.norm(whole, f"{name}.post_attention_layernorm")
            gate = functional.silu(inner @ self.weight(f"{name}.mlp.gate_proj").T)
            up = inner @ self.weight(f"{name}.mlp.up_proj").T
            whole = whole + (gate * up) @ self.weight(f"{name}.mlp.down_proj").T
            memory, text = whole[:m], whole[m:]
        return self.norm(text, "norm") @ self.named["lm_head.weight"].T, new


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).double().eval()


def wrapped(decoder: Any, *, options: dict[str, Any] | None = None, **fields: Any) -> Any:
    mechanism = {"name": "lamemo", **(options or {})}
    sizes = {"chunk_tokens": 6, "short_term_tokens": WINDOW}
    return mplus.wrap(decoder, mplus.MPlusConfig(**{"mechanism": mechanism, **sizes, **fields}))


@pytest.fixture(scope="module")
def model() -> Any:
    found = wrapped(llama())
    with torch.no_grad():
        found.mplus.direction.normal_(generator=torch.Generator().manual_seed(3))
    return found


def text(seed: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


LENGTHS = (6, 6, 2, 1, 5)
ROUNDED = 1e-5
"""Cosines and sines of the decoder are float32 numbers of size 1, those of the reference float64."""


@pytest.mark.parametrize("direction", ["mirrored", "as-is"])
def test_the_refresh_is_that_of_plain_torch(model: Any, direction: str) -> None:
    """Carried vectors and masses after segments of several lengths, and the logits of what is read behind them."""
    mirrored = direction == "mirrored"
    own = model if mirrored else wrapped(llama(), options={"direction": direction})
    vectors = own.mplus.direction.detach() if mirrored else None
    plain, state = Reference(llama(), WINDOW, -1 if mirrored else 1, vectors), None
    memory = own.new_memory()
    with torch.no_grad():
        for number, length in enumerate(LENGTHS):
            ids, asked = text(number, length), text(number + 20, 4)
            found = own(asked[None], memory=memory).logits[0]
            expected, _ = plain.segment(asked, state, leaks=False)
            assert torch.allclose(found, expected, atol=ROUNDED), number
            _, state = plain.segment(ids, state)
            memory.write(ids)
            rows = memory.states[0].window
            for layer, (values, mass) in enumerate(zip(state["vectors"], state["mass"], strict=True)):
                hidden = torch.cat([values.flatten(1), mass], 1)
                assert torch.allclose(rows[layer].need_hidden(), hidden, atol=ROUNDED), (number, layer)


def test_mirroring_and_direction_matter(model: Any) -> None:
    rows = []
    for own in (model, wrapped(llama()), wrapped(llama(), options={"direction": "as-is"})):
        memory = own.new_memory()
        memory.write(torch.cat([text(1, 6), text(2, 6)]))
        rows.append(memory.states[0].window[0].need_hidden())
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    assert not torch.allclose(rows[1], rows[2], atol=1e-3)


def test_nothing_leaks_into_older_places_but_the_first_token(model: Any) -> None:
    """Segments that differ behind their first token leave the same older places."""
    ends = []
    for seed in (5, 6):
        memory = model.new_memory()
        memory.write(text(1, 5))
        memory.write(torch.cat([text(4, 1), text(seed, 3)]))
        ends.append(memory.states[0].window)
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one.need_hidden()[:5], two.need_hidden()[:5])
        assert not torch.equal(one.need_hidden()[6:], two.need_hidden()[6:])


def test_windows_of_unequal_length_in_a_batch(model: Any) -> None:
    together = model.new_memory(3)
    together.write([text(1, 0), text(2, 4), text(3, 6)])
    together.write([text(1, 0), text(2, 0), text(4, 5)])
    alone = [model.new_memory() for _ in range(3)]
    for row, seeds in enumerate(((), ((2, 4),), ((3, 6), (4, 5)))):
        for seed, length in seeds:
            alone[row].write(text(seed, length))
    ids = torch.stack([text(seed, 5) for seed in (7, 8, 9)])
    with torch.no_grad():
        found = model(ids, memory=together).logits
        for row, memory in enumerate(alone):
            assert torch.allclose(found[row : row + 1], model(ids[row : row + 1], memory=memory).logits, atol=1e-10)


def test_forgetting_takes_back_what_older_places_took_in(model: Any) -> None:
    """What is left is as one segment of its tokens."""
    memory, other = model.new_memory(), model.new_memory()
    for number, source in enumerate(("a", "b", "a")):
        memory.write(text(number, 3), source=source)
    memory.forget("b")
    state = memory.states[0]
    assert bool(state.stale)
    assert state.tokens.tolist() == [*text(0, 3).tolist(), *text(2, 3).tolist()]
    other.write(torch.cat([text(0, 3), text(2, 3)]))
    ids = text(9, 4)
    with torch.no_grad():
        assert torch.allclose(model(ids[None], memory=memory).logits, model(ids[None], memory=other).logits)
    for one in (memory, other):
        one.write(text(7, 2))
    for one, two in zip(memory.states[0].window, other.states[0].window, strict=True):
        assert torch.allclose(one.need_hidden(), two.need_hidden())


def test_generation_behind_a_window(model: Any) -> None:
    memory, ids = model.new_memory(), text(3, 5)[None]
    memory.write(torch.cat([text(1, 6), text(2, 4)]))
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), memory=memory, **asked)
    with torch.no_grad():
        assert torch.equal(model(made[:, :-1], memory=memory).logits[0, 4:].argmax(-1), made[0, 5:])


def test_segments_and_windows_of_one_token() -> None:
    own = wrapped(llama(), chunk_tokens=1, short_term_tokens=1)
    memory = own.new_memory()
    memory.write(text(1, 4))
    assert memory.states[0].tokens.tolist() == text(1, 4)[-1:].tolist()
    assert bool(own(text(2, 1)[None], memory=memory).logits.isfinite().all())


def test_published_skips_and_adds_epsilon() -> None:
    own = wrapped(llama(), variant="published")
    options = own.mplus_engine.mechanism.options
    assert (options.window, options.epsilon) == ("present", 1e-6)
    ends = []
    for one in (own, wrapped(llama())):
        memory = one.new_memory()
        for number, length in enumerate((6, 1)):
            memory.write(text(number, length))
        ends.append(memory.states[0].window[0].need_hidden())
    assert not torch.allclose(*ends, atol=1e-3)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": {"direction": "left"}}, "direction must be"),
        ({"options": {"window": "next"}}, "window must be"),
        ({"options": {"epsilon": -1.0}}, "epsilon must be"),
        ({"options": {"heads": 4}}, "heads"),
        ({"retrieved_tokens": 4}, "nothing is retrieved"),
        ({"memory_tokens_per_chunk": 3}, "every token is a place"),
        ({"memory_positions": "constant"}, "right in front"),
        ({"drop_per_layer": False}, "drop_per_layer"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        wrapped(llama(), **fields)


def test_decoders_without_rotary_positions_are_refused() -> None:
    decoder = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=VOCABULARY)).eval()
    with pytest.raises(NotSupported, match="rotary"):
        wrapped(decoder)


def test_a_window_that_was_damaged_is_made_whole(model: Any) -> None:
    memory = model.new_memory()
    memory.write(text(1, 6))
    state: WindowState = memory.states[0]
    first, second = state.window
    damaged = state.with_rows({"window": [first.select(slice(2, None)), second.select(slice(None, 5))]})
    mended, lost = damaged.mended_with(memory.stores[0])
    assert [rows.birth.tolist() for rows in mended.window] == [[2, 3, 4]] * 2
    assert bool(mended.stale)
    assert lost == ["2 places of the window, which are not whole"]


@pytest.mark.parametrize("name", ["lamemo-tiny", pytest.param("lamemo-recall", marks=pytest.mark.nightly)])
def test_the_recipes_run(name: str) -> None:
    done = train(name, dry_run=True, progress=False)
    assert all(math.isfinite(float(record["total_loss"])) for record in done.records)
    assert bool(done.model.mplus.direction.any())


def test_a_decoder_answers_within_its_window_before_it_is_trained() -> None:
    """Of facts in a window of four; what is older is gone."""
    model, tokenizer = load_recall()
    sizes = {"chunk_tokens": 16, "short_term_tokens": 64, "adapters": False}
    model = mplus.wrap(mplus.unwrap(model), mplus.MPlusConfig(mechanism="lamemo", **sizes), check=False).eval()
    task, options = Facts(ages=(0, 1, 3, 4), streams=8, rounds=1, seed=3), RunOptions(streams=8, separator=" ")
    report = retention(GeneratedAnswers(model, tokenizer, task, options=options), ArmOptions(arms=("lamemo",)))
    right = {cell.age: cell.correct for cell in report.arm("lamemo").cells}
    assert right[0] + right[1] + right[3] >= 22  # of 24
    assert right[4] <= 2


@pytest.mark.nightly
def test_training_does_not_unlearn_the_window() -> None:
    """At ten times the learning rate it is right a quarter of the time."""
    done = train("lamemo-recall", progress=False)
    assert float(done.records[-1]["accuracy"]) >= 0.9


def test_the_readme_runs() -> None:
    """Its example prints what it says."""
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [said] = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with redirect_stdout(StringIO()) as printed:
        exec(compile(code, str(README), "exec"), {})
    assert printed.getvalue() == said
