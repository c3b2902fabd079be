"""Retriever keys and queries of recall-tiny, from text in which no sentence comes twice.

Many memories are told facts of the little language, each fact once per memory and never twice with the same value. The
rows they write in one layer make up one large long-term memory; what is asked are questions of the language, read by
the decoder with the memory that was told the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import ConfigError
from mplus.facts.episodes import Episode, lay_out
from mplus.facts.language import Language
from mplus.mechanisms.short_term.batched_prefix import ScoreSelector
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.memory.report import progress_bar
from mplus.training.decoder import TrainedDecoder, make_batched_streams

CHUNK_TOKENS, TAIL = 16, 4
"""As recall-tiny was trained."""


@define(frozen=True, eq=False)
class Asked:
    """The keys of one layer's rows, and the queries of questions about them.

    Attributes:
        keys: ``[m, r]`` in the order of writing.
        queries: ``[Q, T, r]``, projected from the words of a question each.
        facts: what was written, for a record.
    """

    keys: Tensor
    queries: Tensor
    facts: dict[str, Any]


def tellings(language: Language, memories: int, chunks: int, seed: int) -> list[Episode]:
    """Draw what each memory is told; no sentence comes twice, in all of them together.

    Raises:
        ConfigError: the language has too few sentences.
    """
    generator = torch.Generator().manual_seed(seed)
    people = torch.tensor(language.people[False])
    facts = (torch.arange(language.relations)[:, None] * language.names + people).flatten()
    facts = facts[torch.randperm(len(facts), generator=generator)]
    parts, values = len(facts) // chunks, min(map(language.values, range(0, language.facts, language.names)))
    if memories > parts * values:
        raise ConfigError(
            f"memories must be at most {parts * values} with {chunks} chunks each, as there are {len(facts)} facts "
            f"with {values} values, got {memories}"
        )
    first = torch.randint(values, (language.facts,), generator=generator).tolist()
    made = []
    for memory in range(memories):
        turn, part = divmod(memory, parts)
        told = facts[part * chunks : (part + 1) * chunks]
        order: list[int] = told[torch.randperm(chunks, generator=generator)].tolist()
        said = [(first[fact] + turn) % values for fact in order]
        made.append(lay_out(language, order, said, chunk_tokens=CHUNK_TOKENS, tail=TAIL, generator=generator))
    return made


@torch.no_grad()
def write_and_ask(model: Any, layer: int, memories: int, chunks: int, questions: int, seed: int = 0) -> Asked:
    """Return the keys of all rows written in ``layer``, and the queries of questions about facts told at any time.

    Args:
        model: recall-tiny or another decoder trained on the language, in eval mode.
        layer: index among the layers that carry memory.
        memories, chunks: told, and chunks told to each.
        questions: asked in all, rounded up to a multiple of ``memories``.
        seed: of everything that is drawn.
    """
    language, engine, config = Language(), model.mplus_engine, model.mplus_config
    episodes = tellings(language, memories, chunks, seed)
    streams = make_batched_streams(engine, range(memories), seed=seed, long_term_tokens=config.long_term_tokens)
    rows = memories * config.memory_tokens_per_chunk
    keys = torch.empty(chunks * rows, engine.layout.key_size)
    with progress_bar("writing", chunks, None, chunks, unit="chunks") as advance:
        for place in range(chunks):
            update = streams.encode(torch.stack([episode.chunks[place] for episode in episodes]))
            streams.absorb(update, torch.tensor([episode.facts[place] for episode in episodes]))
            keys[place * rows : (place + 1) * rows] = engine.keys(layer, update.hidden[layer].flatten(0, 1))
            advance(1)
    sentences = {pair for episode in episodes for pair in zip(episode.facts, episode.values, strict=True)}
    return Asked(
        keys,
        _queries(model, layer, streams, episodes, language, -(-questions // memories), seed),
        {
            "memories": memories,
            "chunks": chunks,
            "text_tokens": memories * chunks * CHUNK_TOKENS,
            "distinct_sentences": len(sentences),
            "distinct_facts": len({fact for fact, _ in sentences}),
            "rows": keys.shape[0],
            "width": keys.shape[1],
            "layer": layer,
            "seed": seed,
        },
    )


def _queries(
    model: Any,
    layer: int,
    streams: BatchedStreams,
    episodes: Sequence[Episode],
    language: Language,
    each: int,
    seed: int,
) -> Tensor:
    """Return queries ``[memories * each, T, r]`` of questions about chunks that were told at random times."""
    generator = torch.Generator().manual_seed(seed + 1)
    asked = []
    for episode in episodes:
        chosen = torch.randint(len(episode.facts), (each,), generator=generator).tolist()
        questions = [language.question(episode.facts[place]) for place in chosen]
        asked.append([[language.ids[word] for word in question] for question in questions])
    texts = torch.tensor(asked)
    retriever = model.mplus_engine.mechanism.retriever
    read = TrainedDecoder(model).read(
        streams, texts, queries=torch.ones_like(texts, dtype=torch.bool), selector=ScoreSelector(retriever)
    )
    return retriever.project_queries(layer, read.layers[layer].text.flatten(0, 1))  # type: ignore[no-any-return]
