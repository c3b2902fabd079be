"""Signs of whether an answer is in memory, from reads and generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mplus.errors import NotSupported
from mplus.evaluation.generating import Generation, answers
from mplus.evaluation.tracing import Seen, TracingMechanism, scores
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
- ``attention_mass``: share of the last prompt token's attention that goes to memory, without the begin row that M+ and
  MemoryLLM put in front of an empty memory too, mean over heads and layers; only for a decoder loaded with
  ``attn_implementation="eager"``, which keeps its weights.
"""


NO_SCORES = (float("nan"),) * 3


def features(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], streams: Memory, generation: Generation
) -> Tensor:
    """Return ``[n, len(FEATURES)]`` float32 for the prompts of n streams; NaN where this decoder cannot tell."""
    seen: dict[int, Seen] = {}
    with reading_as(model, around=partial(TracingMechanism, seen=seen)):
        made = answers(model, tokenizer, prompts, generation, streams)
    mass = attention_mass(model, prompts, streams)
    rows = [
        (one.entropy, one.top, one.likelihood, *_of_scores(model.mplus_engine, seen, row), mass[row])
        for row, one in enumerate(made)
    ]
    return torch.tensor(rows)


def _of_scores(engine: Any, seen: dict[int, Seen], row: int) -> tuple[float, float, float]:
    layers = []
    for layer, one in seen.items():
        try:
            every = scores(engine, layer, one, row)
        except NotSupported:  # no retriever, or one that ignores the text: there is no score to look at
            return NO_SCORES
        best, mean, spread = every.max(), every.mean(), every.std(correction=0).clamp(min=1e-6)
        layers.append(torch.stack([best, mean, (best - mean) / spread]))
    if not layers:
        return NO_SCORES
    best, mean, margin = torch.stack(layers).mean(0).tolist()
    return best, mean, margin


def attention_mass(model: Any, prompts: Sequence[Sequence[int]], memory: Memory) -> list[float]:
    """Return for each prompt the share of its last token's attention that goes to memory; NaN without weights."""
    if model.mplus_installed.base_attention != "eager":
        return [float("nan")] * len(prompts)
    masses, first = [], 0 if model.mplus_engine.mechanism.empty_is_base else 1
    device = model.get_input_embeddings().weight.device
    for row, prompt in enumerate(prompts):  # one by one: no padding to tell from memory
        ids = torch.tensor([list(prompt)], device=device)
        output = model(input_ids=ids, memory=memory.select([row]), output_attentions=True, use_cache=False)
        layers = [weights for weights in output.attentions if weights is not None and weights.shape[-1] > len(prompt)]
        # Memory stands in front of the text, and the begin row in front of memory.
        shares = [weights[0, :, -1, first : -len(prompt)].float().sum(-1).mean() for weights in layers]
        masses.append(float(torch.stack(shares).mean()) if shares else 0.0)
    return masses
