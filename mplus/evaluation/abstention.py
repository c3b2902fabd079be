"""Knowing what is not there, over natural text: signs of whether the answer is in memory, compared and combined."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from mplus.environment import run_info
from mplus.errors import InputError, NotSupported
from mplus.evaluation.arms.base import Bench, Due
from mplus.evaluation.generating import Generated, Generation, answers
from mplus.evaluation.metrics.calibration import compare
from mplus.evaluation.retention import RetentionOptions, check_chunks, told
from mplus.evaluation.tasks.base import Protocol
from mplus.evaluation.texts import Texts
from mplus.evaluation.tracing import Seen, WatchingMechanism, scores
from mplus.hf.reading.override import reading_as
from mplus.memory.memory import Memory

FEATURES = ("entropy", "top_probability", "likelihood", "best_score", "mean_score", "score_margin", "attention_mass")
"""Signs, in the order of the columns:

- ``entropy``: of the answer's first token, in nats;
- ``top_probability``: of the likeliest first token;
- ``likelihood``: mean log-probability of the tokens generated;
- ``best_score``, ``mean_score``: the retriever's best and mean score over all rows, short-term ones included, mean over
  layers;
- ``score_margin``: best less mean, in standard deviations, mean over layers;
- ``attention_mass``: share of the last prompt token's attention that goes to memory, the begin row left out, mean over
  heads and layers; only for a decoder loaded with ``attn_implementation="eager"``, which keeps its weights.
"""


@torch.no_grad()
def abstention(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    *,
    options: RetentionOptions | None = None,
    generation: Generation | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Compare signs of whether an answer is in memory, on questions that were told and on some that were not.

    Episodes with even numbers calibrate; the others are judged.

    Args:
        model: a wrapped decoder with the mechanism "mplus"; put into eval mode.
        tokenizer: its tokenizer.
        protocol: with ``untold`` of at least 1.
        options, generation: as for ``retention``.
        name: what the report calls the model.

    Raises:
        InputError: the protocol asks nothing that was not told, or makes one episode only.
        NotSupported: another mechanism.
    """
    options = options or RetentionOptions()
    generation = generation or Generation.of(tokenizer, tokens=protocol.answer_tokens)
    model.eval()
    check_mechanism(model)
    bench = Bench(model, tokenizer, Texts(tokenizer), generation, options.separator)
    ages = options.chosen_ages(protocol.options.passages)
    episodes = protocol.episodes()
    if protocol.options.untold < 1 or len(episodes) < 2:
        raise InputError(
            "abstention needs untold questions, and two episodes to calibrate on one and judge the other, "
            f"got untold = {protocol.options.untold} and {len(episodes)} episodes"
        )
    check_chunks(bench, protocol, episodes)
    asked: list[Due] = []
    rows: list[Tensor] = []
    for due, memory in told(bench, episodes, ages, options):
        asked += due
        rows.append(features(bench, due, memory))
    found = torch.cat(rows)
    present = [column for column in range(found.shape[1]) if not bool(found[:, column].isnan().all())]
    return {
        "format": 1,
        "kind": "abstention",
        "protocol": protocol.name,
        **compare(
            found[:, present],
            [FEATURES[column] for column in present],
            torch.tensor([one.question.told for one in asked]),
            torch.tensor([one.episode.number % 2 == 0 for one in asked]),
        ),
        "settings": {
            "protocol": protocol.settings(),
            "ages": list(ages),
            "generation": attrs.asdict(generation),
            "calibrated_on": "episodes with even numbers",
            "memory": model.mplus_config.to_dict(),
        },
        "deviations": list(protocol.deviations),
        "circumstances": run_info(model=name, seeds={"protocol": protocol.options.seed, "memory": options.seed}),
    }


def check_mechanism(model: Any) -> None:
    """Raise NotSupported unless the decoder has M+ itself, with long-term memory: its reads are watched."""
    config = model.mplus_config
    name = config.mechanism.name
    if name != "mplus" or config.long_term_tokens == 0:
        raise NotSupported(
            f"this evaluation watches the retrieval of M+, and the decoder's mechanism is {name!r}"
            + (" without long-term memory" if name == "mplus" else "")
        )


def features(bench: Bench, due: Sequence[Due], memory: Memory) -> Tensor:
    """``[n, len(FEATURES)]`` float32; NaN in columns that this decoder cannot tell."""
    found: list[Tensor] = []
    size = bench.generation.batch
    for start in range(0, len(due), size):
        part = due[start : start + size]
        streams = memory.select([one.row for one in part])
        prompts = [bench.generation.prompt(bench.texts.ids(one.question.prompt), memory=True) for one in part]
        seen: dict[int, Seen] = {}
        with reading_as(bench.model, make=partial(WatchingMechanism, seen=seen)):
            made = answers(bench.model, bench.tokenizer, prompts, bench.generation, streams)
        mass = attention_mass(bench.model, prompts, streams)
        for row, one in enumerate(made):
            found.append(torch.tensor([*_of_answer(one), *_of_scores(bench.model.mplus_engine, seen, row), mass[row]]))
    return torch.stack(found)


def _of_answer(one: Generated) -> tuple[float, float, float]:
    return one.entropy, one.top, one.likelihood


def _of_scores(engine: Any, seen: dict[int, Seen], row: int) -> tuple[float, float, float]:
    layers = []
    for layer, one in seen.items():
        try:
            every = scores(engine, layer, one, row)
        except NotSupported:  # a retriever that ignores the text: there is no score to look at
            return (float("nan"),) * 3
        best, mean, spread = every.max(), every.mean(), every.std(correction=0).clamp(min=1e-6)
        layers.append(torch.stack([best, mean, (best - mean) / spread]))
    best, mean, margin = torch.stack(layers).mean(0).tolist()
    return best, mean, margin


def attention_mass(model: Any, prompts: Sequence[Sequence[int]], memory: Memory) -> list[float]:
    """For each prompt the share of its last token's attention that goes to memory rows; NaN without weights."""
    if model.mplus_installed.base_attention != "eager":
        return [float("nan")] * len(prompts)
    masses = []
    device = model.get_input_embeddings().weight.device
    for row, prompt in enumerate(prompts):  # one by one: no padding to tell from memory
        ids = torch.tensor([list(prompt)], device=device)
        output = model(input_ids=ids, memory=memory.select([row]), output_attentions=True, use_cache=False)
        layers = [weights for weights in output.attentions if weights is not None and weights.shape[-1] > len(prompt)]
        # Memory stands in front of the text, and the begin row in front of memory.
        shares = [weights[0, :, -1, 1 : -len(prompt)].float().sum(-1).mean() for weights in layers]
        masses.append(float(torch.stack(shares).mean()) if shares else 0.0)
    return masses
