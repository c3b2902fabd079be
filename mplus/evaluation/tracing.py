"""Tracing of reads: what each layer asked, what came back, how all rows would have scored, and signs made of that."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.backends.base import Segment
from mplus.errors import NotSupported
from mplus.evaluation.generating import Generation, answers
from mplus.evaluation.oracle import retrieves, written_from
from mplus.evaluation.texts import Tokenizer
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.override import WrappedMechanism, reading_as
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Attended, Project
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.memory.memory import Memory
from mplus.memory.state import StreamView
from mplus.stores.base import StoreView


def check_retrieves(model: MemoryModel) -> None:
    """Raise NotSupported unless reads of the decoder's memories bring rows back, so that there is something to see."""
    mechanism = model.mplus_engine.mechanism
    if not retrieves(mechanism):
        of_rows = isinstance(mechanism, MemoryMechanism)
        without = " without long-term memory" if of_rows and mechanism.uses_retriever else ""
        raise NotSupported(
            "this evaluation watches what reads bring back, and the decoder's mechanism is "
            f"{mechanism.name!r}{without}, whose reads bring no rows back"
        )


@define(frozen=True, eq=False)
class Seen:
    """One retrieval of one layer, for all batch rows.

    Attributes:
        hidden: ``[B, T, d]`` text after the layer's input norm.
        mask: ``[B, T]`` bool, the tokens that retrieve.
        found: what came back.
        views: the streams it came from.
        mechanism: retrieved.
    """

    hidden: Tensor
    mask: Tensor
    found: Sequence[Retrieved | None]
    views: Sequence[StreamView]
    mechanism: MemoryMechanism

    def searched(self, layer: int, row: int) -> StoreView:
        """Return the rows of a layer that could have come back for batch row ``row``."""
        return self.mechanism.searched(self.views[row], layer)


class TracingMechanism(WrappedMechanism):
    """Notes in ``seen``, by layer, what reads bring back; the last retrieval counts.

    Example:
        >>> from functools import partial
        >>> from mplus.hf.reading.override import reading_as
        >>> seen = {}
        >>> with torch.no_grad(), reading_as(model, around=partial(TracingMechanism, seen=seen)):
        ...     logits = model(input_ids=prompt, memory=memory).logits
        >>> count_rows(0, seen[0], 0, names={"s1"}).useful_retrieved
        8
    """

    def __init__(self, inner: MemoryMechanism, *, seen: dict[int, Seen]) -> None:
        super().__init__(inner)
        self.seen = seen

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        """Return the rows of a layer, as ``MemoryMechanism.retrieve``."""
        found = self.inner.retrieve(layer, hidden, mask, views)
        self.seen[layer] = Seen(hidden.detach(), mask, found, views, self.inner)
        return found

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | Attended | None:
        """Return what a layer sees, as ``MemoryMechanism.prefix``."""
        if self.inner.retrieves_in_open:
            self.seen[layer] = evolve(self.seen[layer], found=self.inner.retrieved(opened, layer))
        return self.inner.prefix(opened, layer, found, hidden, project)


@define(frozen=True, kw_only=True)
class Rows:
    """Rows of one question in one layer: in the LTM and retrieved, all of them and those the answer is in."""

    stored: int
    useful: int
    retrieved: int
    useful_retrieved: int
    useful_short_term: int

    def columns(self) -> Tensor:
        """Return ``[5]`` int64, in the order of ``mplus.evaluation.execution.base.RowCounts``."""
        rows = (self.useful, self.useful_retrieved, self.useful_short_term, self.stored, self.retrieved)
        return torch.tensor(rows, dtype=torch.int64)


def count_rows(layer: int, seen: Seen, row: int, names: Collection[str]) -> Rows:
    """Count for batch row ``row``, whose answer is in the sources ``names``."""
    view, found = seen.views[row], seen.found[row]
    store, standing = seen.searched(layer, row), seen.mechanism.standing(view, layer)
    numbers = [number for number, source in view.state.sources.items() if source.name in names]

    def useful(column: Tensor) -> int:
        return int(torch.isin(column, torch.tensor(numbers, dtype=column.dtype, device=column.device)).sum())

    return Rows(
        stored=store.count(layer),
        useful=int(written_from(view, store, layer, names).sum()),
        retrieved=0 if found is None else len(found.ids),
        useful_retrieved=0 if found is None else useful(found.rows.source),
        useful_short_term=0 if standing is None else useful(standing.source),
    )


@torch.no_grad()
def scores(engine: DecoderEngine, layer: int, seen: Seen, row: int, *, short_term: bool = True) -> Tensor:
    """Return ``[m]`` float32, the retriever's score of every long-term row, and every short-term one if asked.

    Raises:
        NotSupported: there is no retriever, or it does not score rows by queries and keys.
    """
    retriever = engine.mechanism.retriever
    if retriever is None:
        raise NotSupported(f"the mechanism {engine.mechanism.name!r} has no retriever that scores rows")
    stored = seen.searched(layer, row).keys(layer)
    parts = [] if stored is None else [stored]
    standing = seen.mechanism.standing(seen.views[row], layer)
    if short_term and standing is not None and len(standing):
        made = engine.keys(layer, standing.need_hidden()) if standing.key is None else standing.key
        parts += [] if made is None else [made]
    queries = retriever.project_queries(layer, seen.hidden[row : row + 1])
    keys = torch.cat([part.to(queries.device) for part in parts])
    scored: Tensor = retriever.score(layer, queries, seen.mask[row : row + 1], keys[None])
    return scored[0].float()


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
    model: MemoryModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], streams: Memory, generation: Generation
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


def _of_scores(engine: DecoderEngine, seen: dict[int, Seen], row: int) -> tuple[float, float, float]:
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


def attention_mass(model: MemoryModel, prompts: Sequence[Sequence[int]], memory: Memory) -> list[float]:
    """Return for each prompt the share of its last token's attention that goes to memory; NaN without weights."""
    of_rows = isinstance(model.mplus_engine.mechanism, MemoryMechanism)
    if not of_rows or model.mplus_installed.base_attention != "eager":
        return [float("nan")] * len(prompts)
    masses, first = [], 0 if model.mplus_engine.mechanism.empty_is_base else 1
    device = model.mplus_engine.device
    for row, prompt in enumerate(prompts):  # one by one: no padding to tell from memory
        ids = torch.tensor([list(prompt)], device=device)
        output = model(input_ids=ids, memory=memory.select([row]), output_attentions=True, use_cache=False)
        layers = [weights for weights in output.attentions if weights is not None and weights.shape[-1] > len(prompt)]
        # Memory stands in front of the text, and the begin row in front of memory.
        shares = [weights[0, :, -1, first : -len(prompt)].float().sum(-1).mean() for weights in layers]
        masses.append(float(torch.stack(shares).mean()) if shares else 0.0)
    return masses
