"""One long prompt that is read in pieces, between which other rows step; what it retrieves is settled by all of it.

Where layers retrieve with their own hidden states (M+), a layer needs all tokens of the prompt before its first key is
known. So the pieces are layers there, of a forward that waits between them in a thread of its own. Everywhere else the
pieces are tokens.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from contextvars import copy_context
from typing import Protocol

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.hf.batch.prompts import ReadPrompt, asked, read_alone, recalled_prompt, result_of
from mplus.hf.batch.requests import RowRequest
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel
from mplus.hf.reading.forward import open_reading, read
from mplus.hf.reading.override import mechanism_for_reads
from mplus.hf.reading.retrieval import ReadSource
from mplus.hf.retrofit.context import pausing
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import TextReading


class PromptInPieces(Protocol):
    """A prompt that is being read."""

    def advance(self, tokens: int) -> ReadPrompt | None:
        """Read about so many tokens more; return the prompt when all of it is read, else None."""


def in_pieces(model: WrappedModel, request: RowRequest) -> PromptInPieces:
    """Begin to read one prompt, of a decoder that a plain one can stand in for.

    Raises:
        ConfigError, InputError, MemoryMismatchError, NotSupported: as ``generate`` does.
    """
    engine = model.mplus_engine
    of_rows = request.memory is not None and not isinstance(engine, TextEngine)
    if of_rows and mechanism_for_reads(engine).retrieves:
        return LayerByLayer(model, request)
    return TokenByToken.of(model, request)


@define(eq=False)
class TokenByToken:
    """A prompt read some tokens at a time.

    Attributes:
        ids: ``[1, T]`` int64, with what a memory of text put into it.
        text: what was read of it.
        recalled: what a memory of text put into it; None: the memory is none of text.
    """

    ids: Tensor
    text: WrappedText
    recalled: TextReading | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: WrappedModel, request: RowRequest) -> TokenByToken:
        """Choose what all of the prompt reads, and read nothing of it yet."""
        engine, reading = model.mplus_engine, None
        ids = torch.tensor([request.ids], device=engine.device)
        if request.memory is not None and isinstance(engine, TextEngine):
            whole, recalled = recalled_prompt(engine, request, request.memory, ids)
            return cls(whole, WrappedText(model, None), recalled)
        if request.memory is not None:
            engine.check_attention()
            reading = asked(model, read(engine, request.memory, 1), [request], ids.shape[1])
            open_reading(engine, reading, ReadSource(reading, None), ids, None)
        return cls(ids, WrappedText(model, reading))

    def advance(self, tokens: int) -> ReadPrompt | None:
        """Read so many tokens more."""
        begun, total = self.text.ids.shape[1], self.ids.shape[1]
        logits = self.text.read(self.ids[:, begun : begun + tokens])
        if begun + tokens < total:
            return None
        found, recalled = result_of(self.text, logits), self.recalled
        return found if recalled is None else evolve(found, sources=recalled.sources()[0], version=recalled.version)


class _Abandoned(BaseException):
    """Ends a forward that nobody waits for any more."""


@define(eq=False)
class _Turns:
    """Two threads that take turns: one reads while the other waits.

    Attributes:
        layers: that the reading thread may still begin before it waits.
        found: what it came to, once it has.
        reads: it is its turn.
        abandoned: nobody waits for it any more.
    """

    layers: int = 0
    found: ReadPrompt | BaseException | None = None
    reads: bool = False
    abandoned: bool = False
    _go: threading.Semaphore = field(factory=lambda: threading.Semaphore(0))
    _came: threading.Semaphore = field(factory=lambda: threading.Semaphore(0))

    def let_go(self, layers: int) -> None:
        """Let the other thread read, and wait until it waits."""
        if not self.reads:  # an interrupt may have ended the wait for the turn before
            self.layers, self.reads = layers, True
            self._go.release()
        self._came.acquire()
        self.reads = False

    def give_up(self) -> None:
        """End the other thread."""
        self.abandoned = True
        self._go.release()

    def wait(self) -> None:
        """Wait for the next turn: called by the reading thread, before it begins."""
        self._go.acquire()
        if self.abandoned:
            raise _Abandoned

    def pause(self) -> None:
        """Wait where no layer is left: called by the reading thread, before each layer."""
        if self.layers < 1:
            self._came.release()
            self.wait()
        self.layers -= 1

    def end(self, found: ReadPrompt | BaseException) -> None:
        """Say what the reading thread came to."""
        self.found = found
        self._came.release()


class LayerByLayer:
    """A prompt whose forward waits between layers, in a thread of its own; that ends when this is collected."""

    def __init__(self, model: WrappedModel, request: RowRequest) -> None:
        self._tokens, self._layers = len(request.ids), len(model.mplus_engine.retrofit.anatomy.layers)
        self._turns = _Turns()
        context, kind = copy_context(), model.mplus_engine.device.type
        # Autocast is of a thread, and not of a context: the new one gets what it is in this one.
        mixed = torch.is_autocast_enabled(kind)
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind)) if mixed else None
        # The thread must not hold this object, which could never be collected then.
        run = (_read_in_turns, self._turns, model, request, autocast)
        threading.Thread(target=context.run, args=run, daemon=True, name="mplus-prompt").start()
        weakref.finalize(self, self._turns.give_up)

    def advance(self, tokens: int) -> ReadPrompt | None:
        """Run as many layers as cost about what ``tokens`` tokens cost in all layers, at least one."""
        turns = self._turns
        turns.let_go(max(1, round(tokens * self._layers / self._tokens)))
        if isinstance(turns.found, BaseException):
            raise turns.found
        return turns.found


def _read_in_turns(turns: _Turns, model: WrappedModel, request: RowRequest, autocast: torch.autocast | None) -> None:
    try:
        turns.wait()
        with autocast or nullcontext(), pausing(turns.pause):
            found: ReadPrompt | BaseException = read_alone(model, request)
    except _Abandoned:
        return
    except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
        found = error
    turns.end(found)
