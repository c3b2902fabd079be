"""The harm report against losses computed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import mplus
from mplus.errors import ConfigError, InputError
from mplus.evaluation.harm import HarmOptions, harm
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.shipped import load_decoder
from mplus.hf.reading.override import reading_as
from tests.evaluation.bench import SmallTokenizer, model
from tests.evaluation.chat.small import KV, tokenizer
from tests.memory.tiny import K0, N, build, rounding

pytestmark = pytest.mark.two_computations

LOSS = 2 * rounding()
"""How far two losses may be apart: a logit and the logarithm of a sum of exponentials of logits are rounded."""
OPTIONS = {"text_tokens": 12, "known_tokens": 4, "pieces": 5, "batch": 2, "unrelated_tokens": 160}


def words(start, count):
    return " ".join(f"word{number}" for number in range(start, start + count))


def run(decoder=None, held_out=None, **changes):
    options = HarmOptions(**{**OPTIONS, **changes})
    held_out = words(0, 70) if held_out is None else held_out
    return harm(decoder or model(), SmallTokenizer(), held_out, words(30, 400), options=options, progress=False)


def test_losses_by_hand():
    report = run(bos=1)
    assert report["pieces"] == 5
    assert report["predicted_tokens"] == 5 * 8
    tokenizer = SmallTokenizer()
    ids = torch.tensor(Texts(tokenizer).ids(words(0, 70)))[:60].view(5, 12)
    text = torch.cat([torch.ones(5, 1, dtype=torch.int64), ids], 1)
    with torch.no_grad():
        logits = model()(input_ids=text).logits
    loss = float(cross_entropy(logits[:, 4:-1].flatten(0, 1), text[:, 5:].flatten()))
    assert report["nats_per_token"]["none"] == pytest.approx(loss, abs=LOSS)
    assert report["perplexity"]["none"] == pytest.approx(math.exp(loss), rel=LOSS)
    empty = model().new_memory(batch_size=5)
    with torch.no_grad():
        logits = model()(input_ids=text, memory=empty).logits
    loss = float(cross_entropy(logits[:, 4:-1].flatten(0, 1), text[:, 5:].flatten()))
    assert report["nats_per_token"]["empty"] == pytest.approx(loss, abs=LOSS)
    change = report["change_percent"]["empty"]
    assert change["percent"] == pytest.approx(
        100 * (report["perplexity"]["empty"] / report["perplexity"]["none"] - 1), rel=1e-6
    )
    assert change["interval"][0] < change["percent"] < change["interval"][1]
    assert report["memory_rows_by_layer"] == {"short_term": [N] * 3, "long_term": [28] * 3}
    assert report["unrelated_tokens_written"] == 160
    assert json.loads(json.dumps(report)) == report


def test_retrieval_sees_only_what_is_known():
    report = run()
    texts = Texts(SmallTokenizer())
    ids = torch.tensor(texts.ids(words(0, 70)))[:60].view(5, 12)
    memory = model().new_memory()
    memory.write(texts.ids(words(30, 400))[:160], progress=False)
    losses = {}
    for limit in (4, 12):
        with torch.no_grad(), reading_as(model(), query_tokens=limit):
            logits = [model()(input_ids=row[None], memory=memory).logits[0] for row in ids]
        pairs = zip(logits, ids, strict=True)
        losses[limit] = sum(float(cross_entropy(one[3:-1], row[4:])) for one, row in pairs) / 5
    assert report["nats_per_token"]["unrelated"] == pytest.approx(losses[4], abs=LOSS)
    assert losses[12] != pytest.approx(losses[4], rel=1e-3)  # all of the text would retrieve other rows


def test_results_do_not_depend_on_the_batch():
    one, other = run(batch=1), run(batch=5)
    for way, loss in one["nats_per_token"].items():
        assert other["nats_per_token"][way] == pytest.approx(loss, abs=LOSS)


def test_as_much_as_fills_the_memory():
    report = harm(
        model(), SmallTokenizer(), words(0, 40), words(30, 400),
        options=HarmOptions(**{**OPTIONS, "unrelated_tokens": None}), progress=False,
    )  # fmt: skip
    assert report["memory_rows_by_layer"] == {"short_term": [N] * 3, "long_term": [40] * 3}
    assert K0 < 40


def test_without_retrieval():
    report = run(build(mechanism="memoryllm"), bos=1, bos_with_memory=False)
    assert report["memory_rows_by_layer"]["long_term"] == [0] * 3
    assert math.isfinite(report["nats_per_token"]["unrelated"])


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"known_tokens must be below text_tokens \(12\), got 12"):
        HarmOptions(text_tokens=12, known_tokens=12)
    with pytest.raises(InputError, match=r"text_tokens \(12\) tokens, it has 3"):
        run(held_out=words(0, 3))
    with pytest.raises(InputError, match="must not be part of the held-out one"):
        harm(model(), SmallTokenizer(), words(0, 400), words(30, 40), options=HarmOptions(**OPTIONS))


def test_of_whole_chunks_it_is_said_where_nothing_came_back():
    story = (
        "Lily had a red ball. She put the red ball into a big box. The box was under the bed in her room. "
        "One day her brother Tom looked for the ball, and did not find it. "
    )
    told = "The king of the north kept nine old ships in a harbour of ice, and no one ever saw them sail. " * 6
    settings = HarmOptions(text_tokens=24, known_tokens=8, pieces=3)
    for score, changed in ((1e9, False), (0, True)):
        kv = mplus.wrap(load_decoder(), {**KV, "min_score": score}, check=False)
        report = harm(kv, tokenizer(), story * 4, told, options=settings, progress=False)
        found = [report[name] for name in ("pieces_without_chunks", "of_these_identical")]
        assert found == ([0, 0] if changed else [3, 3])
        assert (report["change_percent"]["unrelated"]["percent"] != 0) == changed
        assert report["change_percent"]["empty"]["percent"] == 0
