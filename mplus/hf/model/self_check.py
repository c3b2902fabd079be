"""A few tokens' proof, at wrap time, that memory works in this decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, cast

import torch
from attrs import define, evolve, field
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mplus.errors import MechanismError
from mplus.eviction import EVICTION
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.rounding import LAYER_MARGIN, exceeds, measure_noise, observe, token_errors
from mplus.hf.reading.generating import generating
from mplus.hf.reading.reading import Reading
from mplus.hf.retrofit.hooks import Technique
from mplus.memory.state import StreamView
from mplus.memory.writing.update import WriteContext
from mplus.stores.ram import RamStore

TOKENS = 8
TEXTS = 3
"""Texts that a failed comparison is made with: a mistake shows in all, a router that rounding turned does not."""


Found = tuple[float, bool, str]
"""Error, whether it is no fault, and a remark."""


class NotComparable(Exception):
    """The reference of a comparison does not work in this decoder, so nothing is known about the technique."""


P = ParamSpec("P")


@define(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what was compared.
        error: largest error of a token, relative to the standard deviation, in the logits or in what attention gives in
            a layer; None where nothing could be compared.
        passed: whether it is no more than rounding. True where nothing could be compared: that is no fault.
        remark: why a check was not applied, or what failed.
        failure: what was raised, if it failed so.
    """

    name: str
    error: float | None
    passed: bool
    remark: str = ""
    failure: Exception | None = field(default=None, eq=False, repr=False)

    @property
    def checked(self) -> bool:
        """Return whether something was compared."""
        return self.error is not None or not self.passed

    def __str__(self) -> str:
        return f"{self.name}: {self.finding}"

    @property
    def finding(self) -> str:
        """Return the result in words, without the name."""
        if not self.checked:
            return f"not checked, {self.remark}"
        return self.remark or f"relative error {self.error:.2g}"


def check_ids(vocab_size: int, device: torch.device, text: int = 0) -> Tensor:
    """``[1, TOKENS]`` different ids of the vocabulary; others for each ``text``."""
    return ((torch.arange(TOKENS, device=device) * (7 + 4 * text) + 3 + text) % vocab_size)[None]


@torch.no_grad()
def self_check(model: PreTrainedModel, base_logits: Tensor) -> list[Check]:
    """Run all checks on a wrapped decoder in its present technique and positions.

    Raises MechanismError where its mechanism returns what it must not.

    Args:
        model: the wrapped decoder.
        base_logits: ``[1, TOKENS, V]`` of the decoder before it was wrapped, for ``check_ids``.
    """
    with in_eval_mode(model):
        return _Checks(model, base_logits).run()


class _Checks:
    def __init__(self, model: PreTrainedModel, base_logits: Tensor) -> None:
        self.model = model
        self.engine = cast("DecoderEngine", model.mplus_engine)
        self.anatomy = self.engine.retrofit.anatomy
        self.base_logits = base_logits
        self.ids = check_ids(self.engine.vocab_size, self.engine.device)

    def run(self) -> list[Check]:
        """Every check; one that raises has failed."""
        ready = self._tried("a few tokens run through the layers", self._prepare)
        if not ready.passed:
            return [ready]
        comparisons = {
            "prefill and steps = full forward": self._steps,
            "left-padded row = row alone": self._padded,
            "attention function = cache view": self._techniques,
            "negative positions = offset positions": self._positions,
        }
        return [
            self._tried("no memory = base model, bit for bit", self._no_memory),
            *(
                [self._tried("empty memory = base model, bit for bit", self._empty)]
                if self.engine.mechanism.empty_is_base
                else []  # it puts something in front of every text
            ),
            self._tried("memory acts", self._acts),
            *(self._tried(name, self._compared, compare) for name, compare in comparisons.items()),
            self._tried("a write gives finite rows", self._write),
        ]

    def _prepare(self) -> Found:
        # Of other tokens than the text: what memory adds must not be what the text says anyway.
        self.view = self._view(self.ids.flip(1) + 1)
        if type(rows := self.engine.mechanism.prefix_rows(self.view)) is not int or rows < 0:
            raise MechanismError(
                f"the mechanism {self.engine.mechanism.name!r}: prefix_rows must return how many rows a read puts in "
                f"front of the text, an int of at least 0, got {rows!r}"
            )
        self.noise = measure_noise(self.anatomy, lambda: self.model(input_ids=self.ids).logits, self.engine.dtype)
        return 0.0, True, ""

    def _tried(self, name: str, step: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> Check:
        try:
            return Check(name, *step(*args, **kwargs))
        except NotComparable as reason:
            return Check(name, None, True, str(reason))
        except MechanismError:
            raise  # no other technique mends the mechanism, and the decoder is not to blame
        except Exception as failure:  # noqa: BLE001 - the point is to find what a foreign model cannot do, and to say it
            return Check(name, None, False, _short(failure), failure)

    def _compared(self, compare: Callable[[], Tensor]) -> Found:
        """Compare, and again on other texts as long as the errors are more than rounding."""
        first = self.ids
        found: list[float] = []
        try:
            for text in range(TEXTS):
                self.ids = check_ids(self.engine.vocab_size, self.engine.device, text)
                errors = compare()
                found.append(float(errors.max()))
                if not self._exceeds(errors):
                    return found[-1], True, ""
        finally:
            self.ids = first
        return found[0], False, ""

    def _exceeds(self, errors: Tensor) -> bool:
        return exceeds(errors, self.noise, self.engine.dtype)

    def _context(self) -> WriteContext:
        """Return what a mechanism takes in rows with; what new memories keep of rows is settled after these checks."""
        engine, generator = self.engine, torch.Generator().manual_seed(0)
        layout = engine.layout_of("hidden" if "hidden" in engine.mechanism.keeps else engine.memory_rows)
        return WriteContext(
            store=RamStore(layout),
            eviction=EVICTION.build(engine.config.eviction),
            draw=lambda n: torch.randperm(n, generator=generator),
            keys=engine.keys,
        )

    def _view(self, ids: Tensor) -> StreamView:
        """Return a memory of other tokens, ``ids`` ``[1, n]`` int64."""
        other = ids[:, : TOKENS - 3] % self.engine.vocab_size
        return self.engine.mechanism.example(self.engine.decoder, other, self._context())

    def _read(
        self, rows: int = 1, memory: bool = True, view: StreamView | None = None, **inputs: Tensor
    ) -> list[Tensor]:
        """Return logits ``[B, T, V]`` and attention outputs of a forward, as ``observe`` does."""
        reading = Reading(self.engine.mechanism, [self.view if view is None else view] * rows)
        with generating(self.model, reading) if memory else _nothing():
            return observe(self.anatomy, lambda: self.model(**inputs).logits)

    def _no_memory(self) -> Found:
        logits = self.model(input_ids=self.ids).logits
        if torch.equal(logits, self.base_logits):
            return 0.0, True, ""
        return float(token_errors([logits], [self.base_logits]).max()), False, ""

    def _empty(self) -> Found:
        store = self._context().store
        empty = StreamView(self.engine.mechanism.new_state(store.layout, self.engine.decoder), store.snapshot())
        with generating(self.model, Reading(self.engine.mechanism, [empty])):
            logits = self.model(input_ids=self.ids).logits
        if torch.equal(logits, self.base_logits):
            return 0.0, True, ""
        return float(token_errors([logits], [self.base_logits]).max()), False, ""

    def _acts(self) -> Found:
        """Check that memory moves the output of attention by more than rounding does, in one layer at least.

        Attention that adds its input to what it gives (Bloom) can drown memory in that one's rounding, in a decoder
        that hardly listens to its context. What then counts is that another memory, of equal shape, makes a difference
        where the same memory makes none.
        """
        behind = self._read(input_ids=self.ids)
        effect = token_errors(behind, self._read(memory=False, input_ids=self.ids)).amax(1)
        moved = f"memory moves the logits by {float(effect[0]):.2g} of their standard deviation"
        if bool((effect[1:] > LAYER_MARGIN * self.noise[1:].amax(1)).any()):
            return 0.0, True, moved
        again = self._read(input_ids=self.ids)
        other = self._read(view=self._view(self.ids + 2), input_ids=self.ids)
        finishes = self.engine.mechanism.finishes  # then it may leave all attention alone
        seen = slice(0, 1) if finishes else slice(1, None)
        if all(map(torch.equal, again, behind)) and not any(map(torch.equal, other[seen], behind[seen])):
            return 0.0, True, f"{moved}, about as much as rounding does"
        return float("inf"), False, f"{moved} only, no more than rounding does"

    def _steps(self) -> Tensor:
        return self._unless_inconsistent(self._stepwise, "steps with a cache")

    def _stepwise(self, memory: bool) -> Tensor:
        split = TOKENS - 2
        reading = Reading(self.engine.mechanism, [self.view])
        full = self._read(memory=memory, input_ids=self.ids)
        cache: dict[str, Cache] = {}

        def step(tokens: Tensor) -> Tensor:
            output = self.model(input_ids=tokens, use_cache=True, **cache)
            cache["past_key_values"] = output.past_key_values
            logits: Tensor = output.logits
            return logits

        with generating(self.model, reading) if memory else _nothing():
            pieces = [self.ids[:, :split], *self.ids[:, split:].split(1, 1)]
            parts = [observe(self.anatomy, partial(step, piece)) for piece in pieces]
        return token_errors([torch.cat(part, 1) for part in zip(*parts, strict=True)], full)

    def _padded(self) -> Tensor:
        return self._unless_inconsistent(self._padding, "left padding")

    def _padding(self, memory: bool) -> Tensor:
        short = self.ids[:, 3:]
        padded = torch.cat([self.ids[:, :3], short], 1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        inputs = {
            "input_ids": torch.cat([self.ids, padded]),
            "attention_mask": torch.cat([torch.ones_like(mask), mask]),
        }
        if not memory:
            inputs.update(self.engine.padded_positions(inputs["attention_mask"]))
        padded_row = [found[1:, 3:] for found in self._read(2, memory, None, **inputs)]
        return token_errors(padded_row, self._read(memory=memory, input_ids=short))

    def _unless_inconsistent(self, compare: Callable[[bool], Tensor], what: str) -> Tensor:
        """Compare with memory; raise NotComparable where the decoder alone is as inconsistent."""
        try:
            errors = compare(True)
        except Exception:
            self._own(compare, what)
            raise
        if self._exceeds(errors) and self._exceeds(own := self._own(compare, what)):
            raise NotComparable(f"the decoder itself differs by {float(own.max()):.2g} with {what}")
        return errors

    def _own(self, compare: Callable[[bool], Tensor], what: str) -> Tensor:
        try:
            return compare(False)
        except Exception as failure:
            raise NotComparable(f"the decoder itself fails with {what}: {_short(failure)}") from failure

    def _techniques(self) -> Tensor:
        if self.engine.retrofit.technique == "cache_view":
            raise NotComparable("the cache view is in use")
        with self._as("cache_view", self.engine.retrofit.positions.offset):
            try:
                view = self._read(input_ids=self.ids)
            except Exception as failure:
                raise NotComparable(f"the cache view cannot run here: {_short(failure)}") from failure
        errors = token_errors(self._read(input_ids=self.ids), view)
        if self._exceeds(errors):
            self._check_cache_view()
        return errors

    def _check_cache_view(self) -> None:
        """Raise NotComparable where the cache view does not even agree with itself (layers that share keys)."""
        with self._as("cache_view", self.engine.retrofit.positions.offset):
            for name, compare in {"step by step": self._stepwise, "with left padding": self._padding}.items():
                try:
                    wrong = self._exceeds(compare(True)) and not self._exceeds(compare(False))
                except Exception as failure:
                    raise NotComparable(f"the cache view fails {name}: {_short(failure)}") from failure
                if wrong:
                    raise NotComparable(f"the cache view is wrong itself, {name}")

    def _positions(self) -> Tensor:
        retrofit = self.engine.retrofit
        if retrofit.positions.offset:
            raise NotComparable("offset positions are in use")
        if retrofit.anatomy.learned_positions or retrofit.anatomy.alibi:
            raise NotComparable("positions of text never move")
        negative = self._read(input_ids=self.ids)
        with self._as(retrofit.technique, True):
            try:
                offset = self._read(input_ids=self.ids)
            except Exception as failure:
                raise NotComparable(f"offset positions cannot run here: {_short(failure)}") from failure
        return token_errors(negative, offset)

    @contextmanager
    def _as(self, technique: Technique, offset: bool) -> Iterator[None]:
        """Run with another technique or other positions."""
        retrofit = self.engine.retrofit
        before = retrofit.technique, retrofit.positions
        retrofit.technique, retrofit.positions = technique, evolve(retrofit.positions, offset=offset)
        try:
            yield
        finally:
            retrofit.technique, retrofit.positions = before

    def _write(self) -> Found:
        update = self.engine.write([self.view], self.ids)
        update.check(self.engine.mechanism.name, 1, [self.view.store.layout])
        rows = zip(*(part for part in (update.hidden, update.projected) if part), strict=True)
        wrong = [layer for layer, made in enumerate(rows) if not all(bool(torch.isfinite(one).all()) for one in made)]
        if wrong:
            return float("inf"), False, f"rows of layers {wrong} are not finite"
        return 0.0, True, "they are"


def _short(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


@contextmanager
def _nothing() -> Iterator[None]:
    yield
