"""WeightsState: the weights that rows were made with, as plain data to compare, explain and save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

from attrs import define, field

from mplus.config import JsonValue

MADE_WITH = "made_with"
"""Under this name a fingerprint says what the rows of each stream were made with."""
PARTIAL = "partial "
"""Begins a digest that leaves out weights which were elsewhere (offloaded, sharded); it fits no other process."""


class AdapterFacts(TypedDict):
    """An ``AdapterState`` as plain data."""

    names: list[str]
    scaling: dict[str, str]
    contents: dict[str, str]


class WeightsFacts(TypedDict):
    """A ``WeightsState`` as plain data."""

    adapters: AdapterFacts
    base: str
    key_adapters: AdapterFacts
    key_base: str


class MadeWith(TypedDict):
    """The entry of a fingerprint: different states of weights, and for each stream the number of its own."""

    sets: list[WeightsFacts]
    streams: list[int]


@define(frozen=True)
class AdapterState:
    """The adapters that act on some modules.

    Attributes:
        names: those of the user that are active, in the order in which they act.
        scaling: by name, what their updates are multiplied by.
        contents: by name, a digest of their tensors; also of mplus' own adapter for reading.
    """

    names: tuple[str, ...] = ()
    scaling: Mapping[str, str] = field(factory=dict)
    contents: Mapping[str, str] = field(factory=dict)

    def differences(self, now: AdapterState) -> list[str]:
        """Return the differences of ``now``, in words; empty where there are none."""
        if self.names != now.names:
            return [f"made under adapters {list(self.names)}, now {list(now.names)}"]
        found = [
            f"made with adapter {name!r} scaled by {scale}, now the scaling is {now.scaling.get(name)}"
            for name, scale in self.scaling.items()
            if now.scaling.get(name) != scale
        ]
        names = [name for name in {**self.contents, **now.contents} if not self._has_contents_of(now, name)]
        return found + [f"the weights (contents) of adapter {name!r} have changed" for name in names]

    def _has_contents_of(self, other: AdapterState, name: str) -> bool:
        return same(self.contents.get(name, ""), other.contents.get(name, ""))


NONE = AdapterState()


@define(frozen=True)
class WeightsState:
    """The weights that keys and values, and retriever keys, are computed with.

    Attributes:
        adapters: acting on norms and attention projections of the layers that carry memory.
        base: digest of all other weights there.
        key_adapters: acting on what retriever keys are computed with.
        key_base: digest of all other weights that they are computed with.
    """

    adapters: AdapterState = NONE
    base: str = ""
    key_adapters: AdapterState = NONE
    key_base: str = ""

    def of_projection(self, now: WeightsState) -> list[str]:
        """Return the differences of ``now`` for keys and values, in words."""
        base = [] if same(self.base, now.base) else ["the weights of the base model have changed"]
        return self.adapters.differences(now.adapters) + base

    def of_retrieval(self, now: WeightsState) -> list[str]:
        """Return the differences of ``now`` for retriever keys, in words."""
        base = [] if same(self.key_base, now.key_base) else ["the weights of norms or of the retriever have changed"]
        return self.key_adapters.differences(now.key_adapters) + base

    def facts(self) -> WeightsFacts:
        """Return the state as plain data, for files."""
        return {
            "adapters": _facts(self.adapters),
            "base": self.base,
            "key_adapters": _facts(self.key_adapters),
            "key_base": self.key_base,
        }

    @staticmethod
    def from_facts(facts: WeightsFacts) -> WeightsState:
        """Make the state of which ``facts`` returned this. Raises ValueError when it is something else."""
        try:
            return WeightsState(
                _from_facts(facts["adapters"]), str(facts["base"]),
                _from_facts(facts["key_adapters"]), str(facts["key_base"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"must say what rows were made with, got {facts!r}") from error


def made_with(weights: Iterable[WeightsState | None]) -> dict[str, JsonValue]:
    """Return the entry of a fingerprint: the different states among those of streams, and the number of each."""
    sets: list[WeightsState] = []
    numbers: list[int] = []
    for each in weights:
        known = each or WeightsState()
        if known not in sets:
            sets.append(known)
        numbers.append(sets.index(known))
    made: MadeWith = {"sets": [known.facts() for known in sets], "streams": numbers}
    return {MADE_WITH: cast("JsonValue", made)}


def weights_of(fingerprint: Mapping[str, JsonValue], streams: int) -> list[WeightsState]:
    """Return what the rows of each of ``streams`` streams were made with, by a fingerprint's entry ``MADE_WITH``.

    Raises ValueError when it is something else.
    """
    facts = cast("MadeWith", fingerprint[MADE_WITH])
    try:
        sets, numbers = [WeightsState.from_facts(one) for one in facts["sets"]], list(facts["streams"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"fingerprint.{MADE_WITH} must give sets and streams, got {facts!r}") from error
    if len(numbers) != streams or not all(type(number) is int and 0 <= number < len(sets) for number in numbers):
        raise ValueError(
            f"fingerprint.{MADE_WITH} must give each of {streams} streams one of {len(sets)} sets, got {numbers}"
        )
    return [sets[number] for number in numbers]


def same(one: str, other: str) -> bool:
    """Return True if two digests are of the same weights, as far as they tell."""
    return one == other or (one.startswith(PARTIAL) != other.startswith(PARTIAL))


def _facts(adapters: AdapterState) -> AdapterFacts:
    return {"names": list(adapters.names), "scaling": dict(adapters.scaling), "contents": dict(adapters.contents)}


def _from_facts(facts: AdapterFacts) -> AdapterState:
    scaling, contents = facts["scaling"], facts["contents"]
    return AdapterState(
        tuple(map(str, facts["names"])),
        {str(name): str(scale) for name, scale in scaling.items()},
        {str(name): str(digest) for name, digest in contents.items()},
    )
