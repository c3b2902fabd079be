"""Which prompts are read in one forward, and what becomes of those that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence

from mplus.errors import ReadTogetherError
from mplus.hf.batch.prompts import ReadPrompt, read_alone, read_together
from mplus.hf.batch.requests import RowRequest
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.installed import WrappedModel
from mplus.hf.reading.forward import check_memory
from mplus.hf.reading.many.joint import joint_groups
from mplus.hf.reading.override import mechanism_for_reads
from mplus.hf.text.engine import TextEngine
from mplus.memory.memory import Memory

PADDING = 256
"""Columns of padding that one forward may have beside as many as it has tokens: a forward more costs about as much."""
LARGEST = 8192
"""Columns of one forward, padding included, but for a single prompt that is longer."""

Found = ReadPrompt | Exception


def read_prompts(model: WrappedModel, requests: Sequence[RowRequest], *, together: bool) -> list[Found]:
    """Read prompts with their memories; return of each what was read, or why it could not be.

    Args:
        model: a wrapped decoder.
        requests: sound ones.
        together: read in one forward what goes together; else one after the other.
    """
    found: dict[int, Found] = {}
    alone = list(range(len(requests)))
    if together:
        alone, groups = _sorted(model.mplus_engine, requests, found)
        for group in groups:
            found.update(zip(group, _read_group(model, [requests[place] for place in group]), strict=True))
    found.update({place: _tried(model, requests[place]) for place in alone})
    return [found[place] for place in range(len(requests))]


def _sorted(
    engine: DecoderEngine, requests: Sequence[RowRequest], found: dict[int, Found]
) -> tuple[list[int], list[list[int]]]:
    """Return places of requests that are read alone, and of those read together; errors go to ``found``."""
    alone, kinds = [], dict[Hashable, list[int]]()
    for place, request in enumerate(requests):
        try:
            kind = _kind(engine, request)
        except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
            found[place] = error
            continue
        if kind is None:
            alone.append(place)
        else:
            kinds.setdefault(kind, []).append(place)
    groups = [group for places in kinds.values() for group in _of_one_kind(engine, requests, places, found)]
    packed = [part for group in groups for part in _packed(group, [len(one.ids) for one in requests])]
    return alone + [part[0] for part in packed if len(part) == 1], [part for part in packed if len(part) > 1]


def _kind(engine: DecoderEngine, request: RowRequest) -> Hashable:
    """Return a key that is equal for requests that one forward can read together; None: for no two."""
    asked = (request.min_score, request.query_tokens is None, request.retrieval_query is None)
    if request.memory is None and request.retrieve_every is None:
        return (False, *asked)
    if request.memory is None or request.retrieve_every is not None or isinstance(engine, TextEngine):
        return None
    check_memory(engine, request.memory)
    mechanism, views = mechanism_for_reads(engine), request.memory.streams.versioned_snapshot()[1]
    # Without a prefix the decoder reads with no adapter, and one adapter acts on all rows of a forward.
    if len(views) != 1 or not (engine.adapter("read") is None or mechanism.has_prefix(views[0])):
        return None
    most, further = engine.shape.max_positions, 0
    if most is not None and (mechanism.retrieves_in_open or engine.shape.positions == "learned"):
        needed = len(request.ids) + request.max_new_tokens + mechanism.prefix_rows(views[0])
        # Where positions are scarce, what is read depends on how many are kept free.
        further = request.max_new_tokens if needed > most else 0
    return (True, *asked, further)


def _of_one_kind(
    engine: DecoderEngine, requests: Sequence[RowRequest], places: list[int], found: dict[int, Found]
) -> list[list[int]]:
    """Return the places of requests of one kind whose memories go together; errors go to ``found``."""
    memories = [memory for place in places if isinstance(memory := requests[place].memory, Memory)]
    if not memories:
        return [places]
    try:
        return [[places[at] for at in group] for group in joint_groups(engine, memories)]
    except ReadTogetherError as failed:
        found.update({places[at]: error for at, error in failed.errors.items()})
        rest = [place for at, place in enumerate(places) if at not in failed.errors]
        return _of_one_kind(engine, requests, rest, found) if rest else []


def _packed(places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield parts of ``places`` of which each makes a forward with little padding; ``lengths``: of all prompts."""
    part, tokens = list[int](), 0
    for place in sorted(places, key=lengths.__getitem__):
        columns, tokens = (len(part) + 1) * lengths[place], tokens + lengths[place]
        if part and (columns > 2 * tokens + PADDING or columns > LARGEST):
            yield part
            part, tokens = [], lengths[place]
        part.append(place)
    if part:
        yield part


def _read_group(model: WrappedModel, requests: Sequence[RowRequest]) -> Sequence[Found]:
    """Read requests in one forward; where it fails, one by one, so that only those that cannot be read are refused."""
    try:
        return read_together(model, requests)
    except Exception as failed:  # noqa: BLE001 - whoever is at fault fails again
        found = [_tried(model, request) for request in requests]
        if not any(isinstance(one, Exception) for one in found):
            warnings.warn(
                f"{len(requests)} prompts could not be read together, and were read one by one: {failed!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        return found


def _tried(model: WrappedModel, request: RowRequest) -> Found:
    try:
        return read_alone(model, request)
    except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
        return error
