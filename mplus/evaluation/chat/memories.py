"""Memories of one decoder, one after the other, on the same questions: one report with the arms of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from attrs import asdict, evolve

from mplus.config import JsonValue, MPlusConfig, options_of
from mplus.errors import InputError, UnknownNameError
from mplus.evaluation.execution.base import Due
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.generating import cache_bytes
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.retention import retention
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.model.wrapping import unwrap, wrap
from mplus.hf.pretrained.load import from_pretrained
from mplus.hf.types import PreTrainedModel
from mplus.mechanisms import MECHANISMS
from mplus.registry import NameRegistry
from mplus.retrievers import RETRIEVERS

BASELINES = ("none", "window", "full-context", "ceiling")
"""Arms that read no memory; "bm25" and "snapkv" may be asked for too."""
EVERY_RETRIEVER = "*"
"""In a label ``MECHANISM:*``: every retriever that the mechanism's registry has."""


def memory_configs(labels: Iterable[str]) -> dict[str, MPlusConfig | Path]:
    """Return the memory behind each label, in that order.

    A label is the name of a mechanism, ``MECHANISM:RETRIEVER``, ``MECHANISM:*`` for all of its retrievers, a config
    as JSON, which is called by its mechanism, or ``LABEL=FOLDER``: what was trained for an equal decoder and saved.

    Example:
        >>> list(memory_configs(["notes", '{"mechanism": "kv", "chunk_tokens": 64}']))
        ['notes', 'kv']

    Raises:
        UnknownNameError, ConfigError: a mechanism, retriever or option that there is not.
        InputError: two memories with the same label.
    """
    found: dict[str, MPlusConfig | Path] = {}
    for label in (one for given in labels for one in _each_retriever(given)):
        config: MPlusConfig | Path
        if "=" in label and not label.startswith("{"):
            label, _, folder = label.partition("=")  # noqa: PLW2901 - the label that it goes by
            config = Path(folder)
            if not (config / "config.json").is_file():
                raise InputError(
                    f"{label}={folder} must name a folder with a saved memory model, and has no config.json"
                )
        elif label.startswith("{"):
            config = MPlusConfig.from_dict(json.loads(label))
            label = str(config.mechanism.name)  # noqa: PLW2901 - the label that it goes by
        else:
            name, _, retriever = label.partition(":")
            MECHANISMS.get(name)
            config = MPlusConfig.from_dict({"mechanism": name, **({"retriever": retriever} if retriever else {})})
        if label in found:
            raise InputError(f"memories must have different labels, got {label!r} twice")
        found[label] = config
    return found


def _each_retriever(label: str) -> Iterator[str]:
    name, _, retriever = label.partition(":")
    if retriever != EVERY_RETRIEVER or label.startswith("{") or "=" in label:
        yield label
        return
    registry: NameRegistry[Any] = getattr(MECHANISMS.get(name), "retrievers", RETRIEVERS)
    for one in registry.names():
        yield f"{name}:{one}"


def wrapped_each(
    decoder: PreTrainedModel, configs: Mapping[str, MPlusConfig | Path]
) -> Iterator[tuple[str, MemoryModel]]:
    """Yield one decoder wrapped for each memory in turn; it is unwrapped again in between and at the end."""
    for label, config in configs.items():
        model = from_pretrained(config, base=decoder) if isinstance(config, Path) else wrap(decoder, config)
        try:
            yield label, cast("MemoryModel", model)
        finally:
            unwrap(model)


@torch.no_grad()
def compare_memories(
    executions: Iterable[tuple[str, GeneratedAnswers]],
    arms: Sequence[str] | None = None,
    *,
    options: ArmOptions | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Ask the same questions of several memories, and of the decoder without any.

    An arm of a mechanism goes by the label of its memory: of the label "kv:words", "kv:words", "kv:words-text" and so
    on. Arms without memory run once, and so does the oracle of a mechanism.

    Example:
        >>> each = wrapped_each(decoder, memory_configs(["kv:*", "notes"]))  # doctest: +SKIP
        >>> executions = ((label, GeneratedAnswers(model, tokenizer, task, chat=chat)) for label, model in each)
        >>> report = compare_memories(executions)  # doctest: +SKIP

    Args:
        executions: by label, made when they are asked for; of equal decoders, tasks and settings.
        arms: names of those that are wanted; None: all but "bm25" and "snapkv".
        options: settings of arms.
        name: what the report calls the model.
        progress: show bars; None: on a terminal.

    Raises:
        As ``mplus.evaluation.retention.retention``; UnknownNameError for an arm that none of the memories has.
    """
    settings = options or ArmOptions()  # of every memory the same, but for its arms and window
    reports: list[Report] = []
    memories: dict[str, JsonValue] = {}
    known, tried = set[str](), set[str]()
    for label, execution in executions:
        usable = _names(label, execution, first=not reports)
        known |= usable.keys()
        wanted = {name: own for name, own in usable.items() if name not in tried}
        if arms is None:
            wanted = {name: own for name, own in wanted.items() if name not in ("bm25", "snapkv")}
        else:
            wanted = {name: own for name, own in wanted.items() if name in arms}
        tried |= wanted.keys()
        memories[label] = {"digest": digest(execution), **execution.model.mplus_config.to_dict()}
        if not wanted and reports:
            continue  # all of its arms were asked before, or none is wanted: nothing to tell it for
        report = retention(
            execution, _settled(settings, execution, tuple(wanted.values())), name=name, progress=progress
        )
        renamed = {own: name for name, own in wanted.items()}
        reports.append(evolve(report, arms=[_measured(arm, renamed, execution) for arm in report.arms]))
    if missing := [one for one in arms or () if one not in known]:
        raise UnknownNameError(f"an arm must be one of {', '.join(sorted(known))}, got {', '.join(missing)}")
    if not reports:
        raise InputError("there must be at least one memory to compare, got none")
    first = reports[0]
    return evolve(
        first,
        arms=[arm for report in reports for arm in report.arms],
        theory=(),
        settings={**first.settings, "memory": memories},
    )


def _names(label: str, execution: GeneratedAnswers, first: bool) -> dict[str, str]:
    """Return the names of arms in the report -> those that they have in this execution."""
    mechanism = str(execution.model.mplus_config.mechanism.name)
    own = execution.memory_arms.own
    of_rows = (mechanism, f"{mechanism}-oracle") if mechanism == "mplus" else (mechanism,)
    reading = of_rows if own is None else execution.memory_arms.reading
    oracle = f"{mechanism}-oracle"
    found = {arm if arm == oracle else arm.replace(mechanism, label, 1): arm for arm in reading}
    return {**{arm: arm for arm in (*BASELINES, "bm25", "snapkv") if first}, **found}


def _settled(options: ArmOptions, execution: GeneratedAnswers, arms: tuple[str, ...]) -> ArmOptions:
    """Return the options of a chat model: a window is as long as the decoder reads, and counts as it is."""
    positions = getattr(execution.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    positions = options.positions or positions
    window = options.window_tokens
    if window is None and positions is not None:
        asked = (Due(one, 0, number, 0) for one in execution.episodes for number in range(len(one.questions)))
        longest = max((len(execution.question(due)) for due in asked), default=0)
        window = max(positions - longest - execution.answer_tokens, 1)
    return evolve(options, arms=arms, window_tokens=window, window_converged=0.0)


def _measured(arm: Arm, renamed: Mapping[str, str], execution: GeneratedAnswers) -> Arm:
    """Return an arm under its name in the report, with its bytes per token told beside those of the decoder's cache."""
    details = dict(arm.details)
    if arm.state_bytes is not None:
        texts, separator = execution.texts, execution.options.separator
        told = max(
            sum(texts.count(passage.text + separator) for passage in episode.passages) for episode in execution.episodes
        )
        details["state_bytes_per_token"] = round(arm.state_bytes / told, 1)
        # What the decoder's own cache takes for a token of text.
        ids = torch.zeros(1, 1, dtype=torch.int64, device=execution.model.mplus_engine.device)
        cache = cache_bytes(execution.model(input_ids=ids, use_cache=True).past_key_values)
        details["cache_bytes_per_token_bf16"] = (
            cache * torch.bfloat16.itemsize // execution.model.mplus_engine.dtype.itemsize
        )
    return evolve(arm, name=renamed[arm.name], details=details)


def digest(execution: GeneratedAnswers) -> str:
    """Return 12 hexadecimal digits of everything that decides an execution's answers but the weights.

    That includes the options that a config leaves to its mechanism and retriever, with the values they have.
    """
    parts = [execution.settings(ArmOptions(), {}), execution.chat and execution.chat.begin, _options(execution)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _options(execution: GeneratedAnswers) -> list[dict[str, JsonValue]]:
    """Return all options of an execution's mechanism, and of what retrieves for it, if anything does."""
    mechanism, config = execution.model.mplus_engine.mechanism, execution.model.mplus_config
    registry = getattr(mechanism, "retrievers", None)
    found = [asdict(mechanism.options)]
    if registry is not None and config.long_term_tokens != 0:
        found.append(asdict(options_of(registry.get(config.retriever.name), config.retriever.options)))
    return found
