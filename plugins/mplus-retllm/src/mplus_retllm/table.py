"""The table of triples: exact matches first, else fields are exchanged for near ones by locality-sensitive hashing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import normalize

from mplus_retllm.calls import Query


def bucket(planes: Tensor, vector: Tensor) -> Tensor:
    """Return ``[p]`` bool, on which side of each plane ``[p, w]`` a vector ``[w]``, or each of ``[n, w]``, lies."""
    return vector @ planes.T > 0


def random_planes(tables: int, planes: int, width: int, seed: int) -> Tensor:
    """Return ``[t, p, w]``, planes of hash tables, drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tables, planes, width, generator=generator)


@define(frozen=True, eq=False)
class Neighbours:
    """Finds the nearest of some terms among those in the same bucket.

    Attributes:
        vectors: of terms, ``[n, w]`` for n of them.
        planes: makes ``[t, p, w]``, the planes of t hash tables, for vectors of a width; terms are looked for in each.
    """

    vectors: Callable[[Sequence[str]], Tensor]
    planes: Callable[[int], Tensor]

    def nearest(self, term: str, terms: Sequence[str]) -> str | None:
        """Return the term with the largest cosine in a bucket of ``term``, the first of equals; None: there is none."""
        if not terms:
            return None
        vectors = self.vectors([term, *terms]).float()
        near = torch.zeros(len(terms), dtype=torch.bool)
        for planes in self.planes(vectors.shape[1]):
            sides = bucket(planes, vectors)
            near |= (sides[1:] == sides[0]).all(1)
        if not near.any():
            return None
        vectors = normalize(vectors, dim=-1)
        cosines = (vectors[1:] @ vectors[0]).masked_fill(~near, -torch.inf)
        return terms[int(cosines.argmax())]


def matches(rows: Sequence[Sequence[str]], query: Query, neighbours: Neighbours, *, newest: bool = False) -> list[int]:
    """Return the numbers of the rows that a query finds, in the order of writing; of equal rows the first one.

    Rows that have all given fields; where there are none, each given field that stands in no row of its column is
    exchanged for the nearest term of this column, and rows that have all of these.

    Args:
        rows: triples, oldest first.
        query: one or two fields given, None for the others.
        neighbours: finds near terms.
        newest: of rows with the same first two fields only the newest counts, which is ours: the paper returns both
            "Obama" and "Biden" as presidents.
    """
    found = _having(rows, query)
    if not found:
        exchanged: list[str | None] = []
        for column, given in enumerate(query):
            terms = list(dict.fromkeys(row[column] for row in rows))
            unknown = given is not None and given not in terms
            exchanged.append(neighbours.nearest(given, terms) if unknown and given is not None else given)
            if unknown and exchanged[-1] is None:
                return []
        found = _having(rows, exchanged)
    if newest:
        last = {tuple(row[:2]): number for number, row in enumerate(rows)}
        found = [number for number in found if tuple(rows[number]) == tuple(rows[last[tuple(rows[number][:2])]])]
    once: dict[tuple[str, ...], int] = {}
    for number in found:
        once.setdefault(tuple(rows[number]), number)
    return list(once.values())


def _having(rows: Sequence[Sequence[str]], query: Sequence[str | None]) -> list[int]:
    given = [(column, value) for column, value in enumerate(query) if value is not None]
    return [number for number, row in enumerate(rows) if all(row[column] == value for column, value in given)]
