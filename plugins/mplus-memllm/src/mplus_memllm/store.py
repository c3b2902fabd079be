"""The store of triples: tables of names, and queries by the distance of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define
from torch import Tensor
from torch.nn.functional import normalize

from mplus_memllm.calls import Query

ENTITIES, RELATIONS, TRIPLES = 300, 25, 31
"""Names that are nearest to those of a query, at most, and triples of a pair of them."""
EXACT = 0.001
"""Score below which a triple counts as an exact match."""


@define(frozen=True)
class Thresholds:
    """Distances (1 - cosine) below which names are near.

    Attributes:
        entity, relation: of one name.
        score: of the mean of both.
    """

    entity: float
    relation: float
    score: float


@define(frozen=True)
class Match:
    """A triple that a query found.

    Attributes:
        score: mean distance of its names from those of the query; 0 for an exact match.
        row: its number in the table.
    """

    score: float
    row: int


@define(frozen=True, eq=False)
class Tables:
    """Triples, each once, and the names in them, all in the order in which they came.

    Attributes:
        triples: unique.
        entities: subjects and objects.
        relations: names of relations.
    """

    triples: tuple[tuple[str, ...], ...]
    entities: tuple[str, ...]
    relations: tuple[str, ...]

    @staticmethod
    def of(writes: Sequence[Sequence[str]]) -> Tables:
        """Return the tables after some writes."""
        triples = tuple(dict.fromkeys(tuple(triple) for triple in writes))
        entities = dict.fromkeys(name for triple in triples for name in (triple[0], triple[2]))
        return Tables(triples, tuple(entities), tuple(dict.fromkeys(triple[1] for triple in triples)))

    def query(
        self,
        query: Query,
        vectors: Callable[[Sequence[str]], Tensor],
        thresholds: Thresholds,
        *,
        exact_wins: bool = True,
    ) -> list[Match]:
        """Return the triples that a query finds, best first; of equal ones the first that was written.

        Args:
            query: the name of an entity and that of a relation.
            vectors: of names, ``[n, w]`` for n of them.
            thresholds: of distances.
            exact_wins: where there is an exact match, only exact matches count.
        """
        column, name = (0, query[0]) if query[2] is None else (2, query[2])
        entities = _near(name or "", self.entities, vectors, thresholds.entity, ENTITIES)
        relations = _near(query[1], self.relations, vectors, thresholds.relation, RELATIONS)
        rows: dict[tuple[str, str], list[int]] = {}
        for row, triple in enumerate(self.triples):
            rows.setdefault((triple[column], triple[1]), []).append(row)
        found = [
            Match((one + other) / 2, row)
            for entity, one in entities.items()
            for relation, other in relations.items()
            if (one + other) / 2 < thresholds.score
            for row in rows.get((entity, relation), ())[:TRIPLES]
        ]
        found.sort(key=lambda match: (match.score, match.row))
        if exact_wins and found and found[0].score < EXACT:
            found = [match for match in found if match.score < EXACT]
        return found


def _near(
    name: str, names: Sequence[str], vectors: Callable[[Sequence[str]], Tensor], below: float, most: int
) -> dict[str, float]:
    """Return the names nearest to one, with their distances, nearest first."""
    if not names:
        return {}
    found = normalize(vectors([name, *names]).double(), dim=-1)
    distances = (1 - found[1:] @ found[0]).clamp(min=0)
    order = distances.argsort(stable=True)[:most]
    near = ((names[at], float(distances[at])) for at in order.tolist())
    return {one: distance for one, distance in near if distance < below}
