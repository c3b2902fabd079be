"""What HMT costs, reads, forgets and refuses."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_hmt.additions import HMTAdditions
from mplus_hmt.mechanism import HMTMechanism
from mplus_hmt.objective import HMTSegments
from mplus_hmt.recall import recall, retrieval_loss
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import mplus
from mplus.errors import ConfigError, InputError, MechanismError, NotSupported
from mplus.training import train
from mplus.training.batch import Batch
from mplus.training.decoder import TrainedDecoder, make_streams
from mplus.training.objectives import OBJECTIVES

VOCABULARY, L, K = 61, 10, 3
README = Path(__file__).parents[1] / "README.md"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=128)
    return LlamaForCausalLM(config).double().eval()


def opt(**sizes: int) -> OPTForCausalLM:
    torch.manual_seed(0)
    given = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    given = {"word_embed_proj_dim": 20, "max_position_embeddings": 64, **given}
    return OPTForCausalLM(OPTConfig(**given, vocab_size=VOCABULARY)).double().eval()


def wrapped(decoder: Any, *, options: dict[str, Any] | None = None, **fields: Any) -> Any:
    mechanism = {"name": "hmt", "sensory_tokens": K, **(options or {})}
    return mplus.wrap(decoder, mplus.MPlusConfig(**{"mechanism": mechanism, "chunk_tokens": L, **fields}))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"llama": wrapped(llama()), "opt": wrapped(opt())}


def text(seed: int, tokens: int = L) -> Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def written(model: Any, *segments: Tensor) -> mplus.Memory:
    memory = model.new_memory()
    for number, ids in enumerate(segments):
        memory.write(ids, source=f"s{number}")
    return memory


def test_a_write_runs_the_tokens_that_the_paper_says(models: dict[str, Any]) -> None:
    """``(round(L f) + 2 + L + k + 2) / L`` for each token, and a read a summary and a front of ``1 + k``."""
    model, seen = models["llama"], list[int]()
    memory = written(model, text(1), text(2))

    def counted(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        seen.append(
            next(named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None).shape[1]
        )

    handle = model.model.register_forward_pre_hook(counted, with_kwargs=True)
    memory.write(text(3))
    assert sum(seen) == round(L * 0.5) + 2 + L + K + 2
    seen.clear()
    with torch.no_grad():
        model(text(4, 7)[None], memory=memory)
    handle.remove()
    assert sum(seen) == round(L * 0.5) + 2 + 1 + K + 7


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_rows_of_a_batch_read_as_alone(models: dict[str, Any], kind: str) -> None:
    """Lists of 0, 1 and 3 vectors, 0, 2 and 3 sensory tokens, and texts of unequal length behind padding."""
    model = models[kind]
    alone = [model.new_memory(), written(model, text(1, 2)), written(model, text(2), text(3), text(4))]
    together = model.new_memory(3)
    together.write([text(9, 0), text(9, 0), text(2)])
    together.write([text(9, 0), text(9, 0), text(3)])
    together.write([text(9, 0), text(1, 2), text(4)])
    texts = [text(5, 9), text(6, 4), text(7, 6)]
    ids = torch.stack([nn.functional.pad(one, (9 - len(one), 0), value=1) for one in texts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(one), (9 - len(one), 0)) for one in texts])
    with torch.no_grad():
        found = model(ids, attention_mask=mask, memory=together).logits
        for row, (one, memory) in enumerate(zip(texts, alone, strict=True)):
            assert torch.allclose(found[row, 9 - len(one) :], model(one[None], memory=memory).logits[0], atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_generation_goes_on_for_longer_than_a_segment(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    memory, ids = written(model, text(1), text(2)), text(5)[None]
    asked = {"max_new_tokens": 2 * L, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), memory=memory, **asked)
    assert made.shape[1] == 3 * L
    with torch.no_grad():
        whole = model(made[:, :-1], memory=memory).logits[0, L - 1 :]
    assert torch.equal(whole.argmax(-1), made[0, L:])
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), memory=memory, num_beams=3, **asked)
    assert beams.shape[1] == 3 * L


def test_what_is_read_is_the_front_as_embeddings(models: dict[str, Any]) -> None:
    """The decoder alone, over ``[P ; sensory ; text]``, gives the logits of a read."""
    model = models["opt"]
    memory, ids = written(model, text(1), text(2)), text(3)
    decoder, views = model.mplus_engine.decoder, memory.streams.versioned_snapshot()[1]
    with torch.no_grad():
        embedded = decoder.embed(ids[None])
        prompt = model.mplus_engine.mechanism.recalled(decoder, views, embedded, adapter="read").prompt
        front = torch.cat([prompt, decoder.embed(text(2)[None, -K:]), embedded], 1)
        alone = model(inputs_embeds=front).logits[:, 1 + K :]
        assert torch.allclose(model(ids[None], memory=memory).logits, alone, atol=1e-10)


def test_the_newest_vectors_stay() -> None:
    memory = written(wrapped(llama(), long_term_tokens=2), text(1), text(2), text(3))
    assert memory.stores[0].gather(0, memory.stores[0].ids(0)).birth.tolist() == [1, 2]


def test_forgetting_takes_the_sensory_tokens_of_the_source(models: dict[str, Any]) -> None:
    memory = written(models["llama"], text(1), text(2))
    memory.forget("s0")
    assert memory.states[0].sensory.tolist() == text(2)[-K:].tolist()
    memory.forget("s1")
    assert memory.states[0].sensory.tolist() == []


def test_segments_of_one_token() -> None:
    model = wrapped(llama(), chunk_tokens=1)
    memory = model.new_memory()
    memory.write(text(1, 3))
    assert memory.stores[0].count(0) == 3
    assert bool(model(text(2, 1)[None], memory=memory).logits.isfinite().all())


def test_without_recall_the_newest_vector_is_read() -> None:
    model = wrapped(llama(), options={"recall": False})
    assert {name for name, _ in model.mplus.named_parameters()} == {"first"}
    memory = written(model, text(1), text(2))
    store = memory.stores[0]
    newest = store.gather(0, store.ids(0)).need_hidden()[-1:]
    views = memory.streams.versioned_snapshot()[1]
    decoder = model.mplus_engine.decoder
    found = model.mplus_engine.mechanism.recalled(decoder, views, decoder.embed(text(3)[None]), adapter="read")
    assert torch.equal(found.prompt[0], newest)


def test_query_tokens_say_how_much_of_a_text_is_summarised(models: dict[str, Any]) -> None:
    """What comes behind them changes nothing in front of it."""
    model, memory = models["llama"], written(models["llama"], text(1), text(2))
    ids, other = text(3)[None], torch.cat([text(3)[:2], text(4)[2:]])[None]
    with torch.no_grad():
        for asked, same in (({"query_tokens": 2}, True), ({}, False)):
            first, second = (model(one, memory=memory, **asked).logits[:, :2] for one in (ids, other))
            assert torch.equal(first, second) == same


def test_published_lets_padding_count() -> None:
    """The defect by which the variant "published" breaks the clause on padding, unless there is one vector at most."""
    model = wrapped(llama(), options={"recall_width": 8, "recall_dtype": None}, variant="published")
    assert model.mplus_config.long_term_tokens == 100
    memory, ids = written(model, text(1), text(2)), text(3)[None]
    padded, mask = (nn.functional.pad(one, (4, 0)) for one in (ids, torch.ones_like(ids)))
    with torch.no_grad():
        found = model(padded, attention_mask=mask, memory=memory).logits[:, 4:]
        assert not torch.allclose(found, model(ids, memory=memory).logits, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- recall and its loss


def test_recall_of_nothing_and_of_one_vector() -> None:
    parts = HMTAdditions(4, 6, scale=1.0)
    memory, summary = torch.randn(2, 2, 4), torch.randn(2, 1, 4)
    found = recall(parts, summary, memory, torch.tensor([0, 1]))
    assert torch.equal(found.prompt[0], parts.first)
    assert torch.equal(found.prompt[1, 0], memory[1, 0])
    assert found.scores is not None
    assert found.scores[:, 0].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_flat_recall_from_the_width_on() -> None:
    parts, narrow = HMTAdditions(4096, 4096, scale=1.0), HMTAdditions(4, 4096, scale=1.0)
    lengths = torch.tensor([3])
    with torch.no_grad():
        for own, changes in ((parts, True), (narrow, False)):
            width = own.first.shape[1]
            memory, summary = torch.randn(1, 3, width), torch.randn(1, 1, width)
            flat, usual = (recall(own, summary, memory, lengths, flat=flat).scores for flat in (True, False))
            assert flat is not None
            assert usual is not None
            assert torch.equal(flat, usual) != changes


def test_retrieval_loss() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    wanted = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(retrieval_loss(scores, wanted)) == pytest.approx(0.6931, abs=1e-4)
    assert float(retrieval_loss(scores, wanted, twice=True)) == pytest.approx(
        -float(scores[0].log_softmax(0)[0]), abs=1e-6
    )
    assert float(retrieval_loss(scores, wanted * 0)) == 0.0
    with pytest.raises(InputError, match="positives"):
        retrieval_loss(scores, wanted[:, :2])


# ---------------------------------------------------------------------- training


def batch(sources: tuple[int, int] = (0, 1)) -> Batch:
    ids = torch.stack([text(1), text(2)])[None]
    texts = text(3)[None, None]
    labels = torch.cat([texts[:, :, 1:], torch.full((1, 1, 1), -100)], 2)
    return Batch(
        chunks=ids,
        sources=torch.tensor([sources]),
        texts=texts,
        labels=labels,
        mask=torch.ones_like(texts, dtype=torch.bool),
        text_sources=torch.tensor([[sources[0]]]),
    )


def test_both_stages_of_training(models: dict[str, Any]) -> None:
    """The first one reaches no parameter of recall; the second one all, and its retrieval loss too."""
    model = models["llama"]
    model.requires_grad_(True)
    reached = {}
    for recalls in (False, True):
        model.zero_grad()
        streams = make_streams(model.mplus_engine, range(1), seed=0)
        weight = 0.05 if recalls else 0.0
        objective = HMTSegments(HMTSegments.Options(chunks=2, recall=recalls, retrieval_loss=weight))
        found = objective(TrainedDecoder(model), streams, batch(), None)
        found.loss.backward()
        reached[recalls] = {name for name, p in model.mplus.named_parameters() if p.grad is not None and p.grad.any()}
        assert ("retrieval_loss" in found.metrics) == recalls
    model.requires_grad_(False)
    assert reached == {False: {"first"}, True: {"first", "topic", "query.weight", "key.weight"}}


def test_the_objective_is_for_hmt() -> None:
    assert OBJECTIVES.get("hmt") is HMTSegments
    model = mplus.wrap(llama(), mplus.MPlusConfig(mechanism="kv", chunk_tokens=L))
    with pytest.raises(ConfigError, match="'kv'"):
        HMTSegments()(TrainedDecoder(model), make_streams(model.mplus_engine, range(1), seed=0), batch(), None)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": {"summary": 0.0}}, "summary must be"),
        ({"options": {"sensory_tokens": -1}}, "sensory_tokens must be"),
        ({"options": {"recall_dtype": "float8"}}, "recall_dtype must be"),
        ({"options": {"recall_width": 0}}, "recall_width must be"),
        ({"options": {"sensory_token": 3}}, "sensory_token"),
        ({"long_term_tokens": 0}, "at least 1"),
        ({"short_term_tokens": 5}, "no short-term memory"),
        ({"memory_tokens_per_chunk": 2}, "leaves one vector"),
        ({"retrieved_tokens": 4}, "recalled from"),
        ({"drop_per_layer": False}, "drop_per_layer"),
        ({"chunk_tokens": None, "options": {"sensory_tokens": 500}}, "sensory_tokens must leave room"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        wrapped(llama(), **fields)


def test_segments_fit_into_learned_positions(models: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="64 learned positions"):
        wrapped(opt(), chunk_tokens=60)
    assert wrapped(opt(), chunk_tokens=None).mplus_config.chunk_tokens == 64 - 2 - K
    with pytest.raises(InputError, match="learned positions"):
        models["opt"](text(1, 63)[None], memory=written(models["opt"], text(1)))


def test_decoders_that_cannot_be_read_so_are_refused(models: dict[str, Any]) -> None:
    mechanism = models["llama"].mplus_engine.mechanism
    shape = models["llama"].mplus_engine.decoder.shape
    with pytest.raises(NotSupported, match="carry no memory"):
        HMTMechanism.build(evolve(shape, hybrid=True), mechanism.config, mechanism.options)
    with pytest.raises(MechanismError, match="recall=false"):
        recall(HMTAdditions(4, None, 1.0), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.tensor([1]))


def test_the_readme_runs() -> None:
    """Its example prints what it says."""
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [said] = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with redirect_stdout(StringIO()) as printed:
        exec(compile(code, str(README), "exec"), {})
    assert printed.getvalue() == said


@pytest.mark.parametrize("name", ["hmt-tiny", pytest.param("hmt-recall", marks=pytest.mark.nightly)])
def test_the_recipes_run(name: str) -> None:
    done = train(name, dry_run=True, progress=False)
    assert next(record["stage"] for record in done.records) == "without-recall"
    assert all(torch.isfinite(torch.tensor(float(record["total_loss"]))) for record in done.records)
