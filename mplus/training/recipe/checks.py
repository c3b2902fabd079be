"""What must hold between the settings of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import getattr_static

from mplus.config import options_of
from mplus.errors import ConfigError
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.build import memory_mechanism
from mplus.mechanisms.short_term.batched_streams import can_be_batched
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever
from mplus.training.recipe.recipe import SIZES, Entry, Recipe, Stage, Validation
from mplus.training.recipe.tables import DataSet, NewTokenizer, error_prefix

PRECISION = 1e-6


def check(recipe: Recipe) -> None:
    """Raise ConfigError where settings contradict each other; the message begins with the place."""
    for where, rule in RULES.items():
        with error_prefix(where):
            rule(recipe)
    names = [stage.name for stage in recipe.stages]
    for place, stage in enumerate(recipe.stages):
        if names.count(stage.name) > 1:
            raise ConfigError(f"stages: every stage must have a name of its own, got {stage.name!r} twice")
        with error_prefix(f"stages: {place} ({stage.name})"):
            _check_stage(recipe, stage)
    if recipe.validation is not None:
        with error_prefix("validation"):
            _check_validation(recipe, recipe.validation)


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    if (model.path is None) == (model.build is None):
        given = "both" if model.path is not None else "neither"
        raise ConfigError(f"exactly one of path and build must be given, got {given}")
    if recipe.optimizer.parameters == "all" and model.dtype != "float32":
        raise ConfigError(f"dtype must be 'float32' where optimizer.parameters is 'all', got {model.dtype!r}")
    if model.tokenizer is not None and not isinstance(model.tokenizer, str | NewTokenizer):
        raise ConfigError(f"tokenizer must be a name or a table, got {model.tokenizer!r}")
    if isinstance(model.tokenizer, NewTokenizer):
        if model.build is None:
            raise ConfigError("a new tokenizer must go with build: the decoder at path knows the tokens of its own")
        for name in model.tokenizer.data:
            if _known(recipe, name).kind != "documents":
                raise ConfigError(
                    f"tokenizer.data must name data sets of kind 'documents', got {name!r} of kind "
                    f"{recipe.data[name].kind!r}"
                )


def _check_optimizer(recipe: Recipe) -> None:
    if recipe.optimizer.parameters == "adapters":
        mechanism = memory_mechanism(recipe.memory.mechanism.name)
        builds_nothing = getattr_static(mechanism, "build") is getattr_static(MemoryMechanism, "build")
        if recipe.memory.adapters is None and builds_nothing:
            raise ConfigError(
                "parameters must be 'all' where memory.adapters is None, got 'adapters': the mechanism "
                f"{mechanism.name!r} has no parameters of its own that could be trained"
            )
        if recipe.model.build is not None:
            raise ConfigError("parameters must be 'all' for a decoder that is built from nothing, got 'adapters'")

    options, names = recipe.optimizer, [stage.name for stage in recipe.stages]
    if options.fall_from is not None and options.fall_from not in names:
        raise ConfigError(f"fall_from must name a stage ({', '.join(names)}), got {options.fall_from!r}")
    if options.fall_from is not None and options.schedule_steps is not None:
        raise ConfigError(
            f"fall_from and schedule_steps must not both be given, got {options.fall_from!r} and "
            f"{options.schedule_steps}"
        )


def _check_memory(recipe: Recipe) -> None:
    memory_mechanism(recipe.memory.mechanism.name)
    if recipe.memory.variant != "paper":
        raise ConfigError(f"variant must be 'paper' for training, got {recipe.memory.variant!r}")
    if recipe.memory.bytes_budget is not None:
        raise ConfigError(
            "bytes_budget must be left out of a recipe, since in training a stream holds long_term_tokens rows per "
            f"layer, got {recipe.memory.bytes_budget!r}: set long_term_tokens, and give the budget to new_memory of "
            "the trained decoder"
        )


def _check_data(recipe: Recipe) -> None:
    if recipe.memory.chunk_tokens is not None:  # else when the decoder is there
        check_chunks(recipe, recipe.memory.chunk_tokens)


def check_chunks(recipe: Recipe, most: int) -> None:
    """Raise ConfigError where data has longer chunks than the ``most`` tokens that one write takes."""
    for name, data in recipe.data.items():
        sizes = getattr(data.parsed, "chunk_tokens", 0)
        longest = max(sizes) if isinstance(sizes, tuple) else sizes
        if longest > most:
            raise ConfigError(f"{name}.chunk_tokens must be at most memory.chunk_tokens ({most}), got {longest}")


RULES: dict[str, Callable[[Recipe], None]] = {
    "model": _check_model,
    "optimizer": _check_optimizer,
    "memory": _check_memory,
    "data": _check_data,
}


def _check_stage(recipe: Recipe, stage: Stage) -> None:
    for place, entry in enumerate(stage.objectives):
        with error_prefix(f"objectives: {place} ({entry.name})"):
            _check_entry(recipe, stage, entry)
    _check_probabilities(stage.main)
    _check_sizes(recipe, stage)
    _check_episodes(recipe, stage.objectives)
    if stage.revisit is not None and not any(entry.objective.writes for entry in stage.main):
        raise ConfigError("revisit must go with an objective that writes, got none in this stage")
    if stage.long_term:
        _check_long_term(recipe)
    if stage.retriever_loss is not None:
        _check_retriever(recipe, stage)
    if stage.until is not None:
        _check_until(stage)
    elif stage.on_failure == "restart":
        raise ConfigError("on_failure must go with until, got 'restart' and nothing that could be missed")


def _check_entry(recipe: Recipe, stage: Stage, entry: Entry) -> None:
    if entry.objective.needs_cache:
        raise ConfigError(f"{entry.name!r} takes batches seen before: set the table 'revisit' of the stage instead")
    if entry.beside is not None and entry.probability is not None:
        raise ConfigError(f"one of probability and beside must be given, got {entry.probability} and {entry.beside}")
    if entry.data is not None:
        sets = [_known(recipe, entry.data)]
    elif entry.beside is None:
        raise ConfigError(f"data must name a data set ({', '.join(recipe.data)}), got None")
    elif entry.objective.writes:
        raise ConfigError("data must be given for an objective that writes, else a batch would be written twice")
    else:
        sets = [recipe.data[one.data] for one in stage.main if one.data in recipe.data]
    if entry.name == "window":
        for data in sets:
            if getattr(data.parsed, "window_tokens", None) == 0:
                name = next(name for name, other in recipe.data.items() if other is data)
                raise ConfigError(f"data must be a data set with windows: set window_tokens of {name!r}")


def _check_probabilities(main: Sequence[Entry]) -> None:
    if not main:
        raise ConfigError("objectives must have one that does not stand beside another, got none")
    if len(main) == 1 and main[0].probability is None:
        return
    missing = [entry.name for entry in main if entry.probability is None]
    if missing:
        raise ConfigError(f"probability must be given for each of several objectives, it is not for {missing[0]!r}")
    total = sum(entry.probability or 0.0 for entry in main)
    if abs(total - 1) > PRECISION:
        raise ConfigError(f"the probabilities of objectives must make 1, got {total:g}")


def _check_sizes(recipe: Recipe, stage: Stage) -> None:
    long_term = stage.memory.get("long_term_tokens", recipe.memory.long_term_tokens)
    with error_prefix("memory"):
        for name in stage.memory:
            if name not in SIZES:
                raise ConfigError(f"must be sizes that no parameter depends on ({', '.join(SIZES)}), got {name!r}")
        if (recipe.memory.long_term_tokens == 0) != (long_term == 0):
            raise ConfigError(
                "long_term_tokens must be 0 in every stage or in none, since it decides whether there is a retriever; "
                f"got {long_term} here and {recipe.memory.long_term_tokens} in the recipe"
            )


def _check_episodes(recipe: Recipe, entries: Sequence[Entry]) -> None:
    """Data that lets streams forget takes away what other data wants to ask for."""
    names = sorted({entry.data for entry in entries if entry.data is not None})
    for name in names:
        if len(names) > 1 and getattr(recipe.data[name].parsed, "episode", None) is not None:
            raise ConfigError(
                f"data {name!r} lets streams start anew (episode), so it must be the stage's only data, got "
                f"{', '.join(map(repr, names))}"
            )


def _check_long_term(recipe: Recipe) -> None:
    if not recipe.memory.long_term_tokens:
        raise ConfigError(
            "long_term must be false where memory.long_term_tokens is not a number of at least 1, got true and "
            f"{recipe.memory.long_term_tokens!r}"
        )
    mechanism = memory_mechanism(recipe.memory.mechanism.name)
    if issubclass(mechanism, RowMechanism) and not mechanism.uses_retriever:
        raise ConfigError(
            f"long_term: mechanism {mechanism.name!r} has no long-term memory, and streams with one were asked for: "
            "set long_term to false, or take the mechanism 'mplus'"
        )


def _check_retriever(recipe: Recipe, stage: Stage) -> None:
    loss, memory = stage.retriever_loss, recipe.memory
    if memory.long_term_tokens == 0 or not memory_mechanism(memory.mechanism.name).uses_retriever:
        raise ConfigError(
            "retriever_loss must be left out where there is no retriever, got memory.mechanism "
            f"{memory.mechanism.name!r} with memory.long_term_tokens {memory.long_term_tokens}"
        )
    if not can_be_batched(memory, long_term=stage.long_term):
        named = [f"mechanism {memory.mechanism.plain()!r}", f"eviction {memory.eviction.plain()!r}"]
        raise ConfigError(
            f"retriever_loss must be left out with memory.{' and memory.'.join(named)}: a retriever is trained on "
            "memories that are held as dense tensors, of 'mplus' with its own options and eviction 'fifo' only"
        )
    if RETRIEVERS.get(memory.retriever.name).score is Retriever.score:
        raise ConfigError(
            f"retriever_loss must be left out, as the retriever {memory.retriever.name!r} cannot be trained"
        )
    cls = RETRIEVERS.get(memory.retriever.name)
    with error_prefix("memory: retriever"):
        options = options_of(cls, {**cls.Options.defaults(memory.variant), **memory.retriever.options})
    score = getattr(options, "score", None)
    if loss is not None and loss.kind == "bce" and score not in {None, "sigmoid_mean"}:
        raise ConfigError(
            f"retriever_loss: kind 'bce' needs scores between 0 and 1, got memory.retriever.score {score!r}: use kind "
            "'contrastive' or score 'sigmoid_mean'"
        )


def _check_until(stage: Stage) -> None:
    until = stage.until
    if until is None:
        return
    names = {name for entry in stage.objectives for name in entry.objective.metrics}
    if stage.retriever_loss is not None:
        names.add("retriever_loss")
    known = (*sorted(names), *(["recall_[0-9]+"] if stage.long_term else []))  # patterns
    if not any(re.fullmatch(name, until.metric) for name in known):
        raise ConfigError(f"until.metric must be one of {', '.join(known)}, got {until.metric!r}")
    if until.window > stage.steps:
        raise ConfigError(f"until.window must be at most steps ({stage.steps}), got {until.window}")


def _check_validation(recipe: Recipe, validation: Validation) -> None:
    for place, entry in enumerate(validation.objectives):
        with error_prefix(f"objectives: {place} ({entry.name})"):
            if entry.probability is not None or entry.beside is not None:
                raise ConfigError("probability and beside are for stages: every objective is validated by itself")
            if entry.data is None:
                raise ConfigError(f"data must name a data set ({', '.join(recipe.data)}), got None")
            if entry.objective.needs_cache:
                raise ConfigError(f"{entry.name!r} takes batches seen before, of which a validation has none")
            _known(recipe, entry.data)
    if validation.long_term:
        _check_long_term(recipe)


def _known(recipe: Recipe, name: str) -> DataSet:
    if name not in recipe.data:
        raise ConfigError(f"data must name a data set ({', '.join(recipe.data) or 'there is none'}), got {name!r}")
    return recipe.data[name]
