"""Which parameters each objective trains, and what it leaves in the streams."""

from __future__ import annotations

import pytest
import torch

from mplus.errors import ConfigError, NotSupported
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE, Batch
from mplus.training.decoder import TrainedDecoder, make_batched_streams
from mplus.training.objectives import OBJECTIVES
from mplus.training.objectives.full_memory import predicted_tokens
from mplus.training.objectives.losses import RetrieverLoss
from tests.memory import tiny

pytestmark = pytest.mark.two_computations

STREAMS, CHUNKS, TEXTS, TOKENS = 2, 2, 3, 6
GROUPS = ("write adapter", "read adapter", "mark", "begin", "queries", "keys")

# Spec: what the released training gives gradient to, with single_context as a mode of its own. The retriever gets one
# wherever texts are about something that was written.
TABLE = {
    "plain_lm": {"read adapter", "begin"},
    "two_chunk": {"write adapter", "mark", "begin"},
    "two_chunk read": {"write adapter", "read adapter", "mark", "begin"},
    "multi_chunk": {"read adapter", "begin", "queries", "keys"},
    "single_context": {"write adapter", "read adapter", "mark", "begin", "queries", "keys"},
    "repeat": {"write adapter", "read adapter", "mark", "begin", "queries", "keys"},
    "revisit": {"read adapter", "begin", "queries", "keys"},
    "window": set(),
}
OPTIONS = {"two_chunk read": {"reader": "read"}, "multi_chunk": {"chunks": 2}, "single_context": {"chunks": 2}}


RETRIEVER = {"query_proj": "queries", "key_proj": "keys", "encoder_query_proj": "encoder queries"}


def group_of(name: str) -> str:
    if ".lora_" in name:
        return f"{name.split('.lora_')[1].split('.')[1]} adapter"
    if name.startswith("mplus."):
        part = name.split(".")[1:]
        return part[0] if part[0] != "retriever" else RETRIEVER[part[1]]
    return "decoder"


def collate(seed=0, first=0):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(2, tiny.VOCAB_SIZE, (STREAMS, TEXTS, TOKENS), generator=generator)
    sources = torch.arange(first, first + CHUNKS).expand(STREAMS, -1)
    windows = torch.randint(2, tiny.VOCAB_SIZE, (STREAMS, 9), generator=generator)
    return Batch(
        chunks=torch.randint(2, tiny.VOCAB_SIZE, (STREAMS, CHUNKS, tiny.CHUNK), generator=generator),
        sources=sources,
        texts=texts,
        labels=texts.clone(),
        mask=torch.ones_like(texts, dtype=torch.bool),
        text_sources=torch.tensor([[first, first + 1, NO_SOURCE]] * STREAMS),
        windows=windows,
        window_labels=windows.clone(),
        window_mask=torch.ones_like(windows, dtype=torch.bool),
    )


def prepared(**changes):
    model = tiny.build(**changes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) != "decoder")
    streams = make_batched_streams(model.mplus_engine, range(STREAMS), seed=0, long_term_tokens=tiny.CAPACITY)
    with torch.no_grad():
        for batch in range(5):
            streams.write(torch.full((STREAMS, tiny.CHUNK), batch + 2), torch.full((STREAMS,), 100 + batch))
    return model, streams


def run(model, streams, name, batch=None, loss=None):
    cls = OBJECTIVES.get(name.split()[0])
    objective = cls(cls.Options(**OPTIONS.get(name, {})))
    outcome = objective(TrainedDecoder(model), streams, batch or collate(), loss or RetrieverLoss())
    return objective, outcome


def trained(model):
    return {
        group_of(name) for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }


@pytest.mark.parametrize("name", [name for name in TABLE if name != "window"])
def test_which_parameters_get_gradient(name):
    model, streams = prepared()
    _, outcome = run(model, streams, name, collate(first=103 if name == "revisit" else 0))
    outcome.loss.backward()
    assert trained(model) == TABLE[name]


def test_the_table_has_every_objective():
    assert {name.split()[0] for name in TABLE} == set(OBJECTIVES.names())


def test_a_window_trains_the_decoder_alone():
    model, streams = prepared()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _, outcome = run(model, streams, "window")
    outcome.loss.backward()
    assert trained(model) == {"decoder"}
    bare = collate().windows
    expected = model(input_ids=bare).logits[:, :-1].log_softmax(-1).gather(2, bare[:, 1:, None]).mean()
    torch.testing.assert_close(outcome.loss, -expected)


def test_a_window_needs_data_that_makes_windows():
    model, streams = prepared()
    batch = collate()
    without = Batch(
        chunks=batch.chunks,
        sources=batch.sources,
        texts=batch.texts,
        labels=batch.labels,
        mask=batch.mask,
        text_sources=batch.text_sources,
    )
    with pytest.raises(ConfigError, match="'window' needs a data set that makes windows"):
        run(model, streams, "window", without)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("plain_lm", 0), ("revisit", 0), ("window", 0), ("two_chunk", 1), ("multi_chunk", 2), ("single_context", 2)],
)
def test_how_many_chunks_are_written(name, rows):
    model, streams = prepared()
    before = streams.clock
    run(model, streams, name)
    assert streams.clock == before + rows * tiny.K


@pytest.mark.parametrize(("name", "graph"), [("two_chunk", False), ("multi_chunk", False), ("single_context", True)])
def test_what_is_written_keeps_its_graph_only_in_single_context(name, graph):
    model, streams = prepared()
    run(model, streams, name)
    assert all(rows.requires_grad == graph for rows in streams.stm)


def test_two_chunk_reads_the_new_rows_alone():
    model, streams = prepared()
    _, first = run(model, streams, "two_chunk")
    _, other = prepared()
    other.ltm = [type(rows)(STREAMS, model.mplus_engine.layout, tiny.CAPACITY) for rows in other.ltm]
    _, second = run(model, other, "two_chunk")
    assert torch.equal(first.loss, second.loss)


def test_the_retriever_loss_leaves_the_decoder_alone_unless_told_otherwise():
    grads = []
    for detach in (True, False):
        model, streams = prepared()
        weights = [p for n, p in model.named_parameters() if group_of(n) == "write adapter"]
        _, with_loss = run(model, streams, "single_context", loss=RetrieverLoss(detach=detach, weight=1.0))
        _, without = run(*prepared_like(model), "single_context", loss=RetrieverLoss(detach=detach, weight=0.0))
        first = torch.autograd.grad(with_loss.loss, weights)
        second = torch.autograd.grad(without.loss, weights)
        grads.append(max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)))
    assert grads[0] < 1e-6
    assert grads[1] > 1e-4


@pytest.mark.parametrize("negatives", ["stream", "batch"])
def test_encoder_queries_learn_which_rows_come_from_the_newest_source(negatives):
    model, streams = prepared(retriever={"name": "linear", "width": 8, "encoder_queries": True})
    loss = RetrieverLoss(weight=0.0, encoder_weight=1.0, negatives=negatives, candidates=1000)
    _, outcome = run(model, streams, "multi_chunk", loss=loss)
    outcome.loss.backward()
    assert trained(model) == TABLE["multi_chunk"] - {"queries"} | {"encoder queries"}
    plain, _ = prepared()
    with pytest.raises(NotSupported, match="'linear' has no encoder queries"):
        run(plain, prepared()[1], "multi_chunk", loss=loss)


def prepared_like(model):
    _, streams = prepared()
    engine = model.mplus_engine
    streams.decoder, streams.additions = engine.decoder, engine.mechanism.additions
    return model, streams


@pytest.mark.parametrize("name", ["single_context", "multi_chunk", "two_chunk"])
def test_gradient_checkpointing_changes_nothing(name):
    grads = []
    for checkpointing in (False, True):
        model, streams = prepared()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _, outcome = run(model, streams, name, loss=RetrieverLoss(candidates=1000))
        outcome.loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for parameter, grad in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], grad, rtol=1e-5, atol=1e-7)


def test_logits_are_computed_from_the_token_in_front_of_the_first_label_on():
    labels = torch.full((2, 2, 6), IGNORE_INDEX)
    assert predicted_tokens(labels) == 1
    labels[1, 0, 4] = 7
    labels[0, 1, 5] = 7
    assert predicted_tokens(labels) == 3
    labels[0, 0, 0] = 7  # nothing predicts the first token
    assert predicted_tokens(labels) == 6
