"""Episode: the facts told to one stream, in chunks, until it starts anew; and text that a person types."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import ConfigError, InputError
from mplus.facts.language import BEGIN, FILLERS, PAD, STOP, Language


@define(frozen=True, eq=False)
class Episode:
    """One fact per chunk, all different.

    Attributes:
        facts: per chunk, the number of its fact.
        values: per chunk, the number of the value.
        chunks: ``[E, n]`` int64, the sentence at a random place among fillers, the last ``tail`` tokens all fillers.
    """

    facts: list[int]
    values: list[int]
    chunks: Tensor


def draw_facts(
    language: Language,
    count: int,
    held_out: bool,
    siblings: float,
    generator: torch.Generator,
    one_relation: bool = False,
) -> list[int]:
    """Draw ``count`` different facts.

    Args:
        held_out: take names never seen together in training, else only those seen.
        siblings: share of facts about a person of whom something else was told before.
        one_relation: all facts of the episode are of one relation, so that the names alone tell them apart.

    Raises:
        ConfigError: the language has too few facts.
    """
    people = torch.tensor(language.people[held_out])
    most = len(people) * (1 if one_relation else language.relations)
    if count > most:
        raise ConfigError(
            f"an episode must have at most {most} chunks, as many as there are "
            f"{'held-out' if held_out else 'trained'} facts to tell, got {count}: raise firsts, lasts or relations"
        )
    if one_relation:
        relation = int(torch.randint(language.relations, (1,), generator=generator))
        chosen = people[torch.randperm(len(people), generator=generator)[:count]]
        return [relation * language.names + person for person in chosen.tolist()]
    fresh = iter(people[torch.randperm(len(people), generator=generator)].tolist())
    chance = torch.rand(count, 2, generator=generator).tolist()
    relations = torch.rand(count, language.relations, generator=generator).argsort(1).tolist()
    facts: list[int] = []
    untold: dict[int, list[int]] = {}
    known: list[int] = []  # people of whom something is told and something is not
    for place in range(count):
        again, which = chance[place]
        person = next(fresh, None) if again >= siblings or not known else None
        if person is None:
            at = int(which * len(known))
            person = known[at]
            if len(untold[person]) == 1:  # nothing is left to tell of this person afterwards
                known[at] = known[-1]
                known.pop()
        else:
            untold[person] = relations[place]
            if language.relations > 1:
                known.append(person)
        facts.append(untold[person].pop() * language.names + person)
    return facts


def make_episode(
    language: Language, facts: list[int], *, chunk_tokens: int, tail: int, generator: torch.Generator
) -> Episode:
    """Draw values for ``facts`` and lay the sentences out in chunks of ``chunk_tokens``."""
    return lay_out(language, facts, None, chunk_tokens=chunk_tokens, tail=tail, generator=generator)


def lay_out(
    language: Language,
    facts: list[int],
    values: list[int] | None,
    *,
    chunk_tokens: int,
    tail: int,
    generator: torch.Generator,
) -> Episode:
    """Lay sentences out as ``make_episode`` does, with the ``values`` that are given; None: drawn."""
    count = len(facts)
    ids = language.ids
    fillers = torch.tensor([ids[word] for word in FILLERS])
    chunks = fillers[torch.randint(len(fillers), (count, chunk_tokens), generator=generator)]
    chance = torch.rand(count, 2, generator=generator).tolist()
    if values is None:
        values = [int(c[0] * language.values(fact)) for c, fact in zip(chance, facts, strict=True)]
    for place, (fact, value) in enumerate(zip(facts, values, strict=True)):
        sentence = torch.tensor([ids[word] for word in language.sentence(fact, value)])
        start = int(chance[place][1] * (chunk_tokens - tail - len(sentence) + 1))
        chunks[place, start : start + len(sentence)] = sentence
    return Episode(facts, values, chunks)


def recall_tokenizer(language: Language | None = None) -> Any:
    """Return the tokenizer of the language; every word it does not know becomes a filler."""
    from mplus.hf.decoders.tokenizers import word_tokenizer  # transformers, which drawing facts does not need

    vocabulary = (language or Language()).vocabulary
    return word_tokenizer(vocabulary, unknown=FILLERS[0], pad=PAD, begin=BEGIN)


def told_chunk(language: Language, sentence: str, chunk_tokens: int, generator: torch.Generator) -> Tensor:
    """Return ids ``[chunk_tokens]``: a sentence that tells a fact, with fillers around it as in training.

    Raises:
        InputError: it tells no fact of this language; the message says what one looks like.
    """
    spoken = sentence.lower().replace(STOP, " ").split()
    fact = language.fact(" ".join(spoken[:4]))
    value = spoken[4:]
    accepted = [language.value(fact, number) for number in range(language.values(fact))]
    if value not in accepted:
        raise InputError(
            f"a fact must end in a {language.relation(fact)}, such as {' '.join(accepted[0])} or "
            f"{' '.join(accepted[-1])}, got {' '.join(value)!r}"
        )
    ids = [language.ids[word] for word in [*spoken, STOP]]
    fillers = torch.tensor([language.ids[word] for word in FILLERS])
    chunk = fillers[torch.randint(len(fillers), (chunk_tokens,), generator=generator)]
    chunk[1 : 1 + len(ids)] = torch.tensor(ids)
    return chunk
