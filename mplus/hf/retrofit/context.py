"""One pass through the decoder with memory, and the decoder layers that carry it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, Protocol, SupportsIndex, TypeVar

from attrs import define, field
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.hf.retrofit.attention import ModuleCall
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.placement import Placement
from mplus.hf.types import Argument, Output
from mplus.mechanisms.decoder import Attended, Collected, Edit, Finish, PassResult, Project

if TYPE_CHECKING:
    from torch.nn import Module as Layer
else:
    Layer = object  # the class that memory is mixed into brings its own

T = TypeVar("T")
P = ParamSpec("P")


class PrefixSource(Protocol):
    """The memory of a pass, layer by layer."""

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...] | Attended | None:
        """Return the segments in front of a layer's text ``[B, T, d]`` (after the input norm), oldest first."""


@define(frozen=True, eq=False)
class Collection:
    """The states that a pass gathers from the decoder's layers.

    Attributes:
        names: of ``PassResult``: "inputs" and "outputs" of the layers that carry memory, "hidden" and "calls" of all.
        last: only so many last rows of inputs and outputs; None: all.
        inputs, outputs: by layer ``[B, T, d]``; filled by the pass.
        hidden_states: ``[B, T, d]`` each: what the first layer receives, and what each layer gives.
        calls: how each layer was called.
    """

    names: frozenset[Collected]
    last: int | None = None
    inputs: dict[int, Tensor] = field(factory=dict)
    outputs: dict[int, Tensor] = field(factory=dict)
    hidden_states: list[Tensor] = field(factory=list)
    calls: list[ModuleCall] = field(factory=list)

    def entered(self, layer: int | None, hidden: Tensor) -> None:
        """Take note of what a layer receives, ``[B, T, d]``; ``layer`` None: it carries no memory."""
        if "hidden" in self.names and not self.hidden_states:
            self.hidden_states.append(hidden)
        if layer is not None and "inputs" in self.names:
            self.inputs[layer] = self._last_rows(hidden)

    def left(self, layer: int | None, hidden: Tensor) -> None:
        """Take note of what a layer gives, ``[B, T, d]``."""
        if "hidden" in self.names:
            self.hidden_states.append(hidden)
        if layer is not None and "outputs" in self.names:
            self.outputs[layer] = self._last_rows(hidden)

    def _last_rows(self, hidden: Tensor) -> Tensor:
        return hidden if self.last is None else hidden[:, hidden.shape[1] - self.last :]

    def result(self, hidden: Tensor | None) -> PassResult:
        """Return the gathered states ``[B, T, d]``, with the final hidden state."""
        inputs, outputs = (tuple(found[layer] for layer in sorted(found)) for found in (self.inputs, self.outputs))
        states, calls = tuple(self.hidden_states), tuple(self.calls)
        return PassResult(hidden, inputs, outputs, hidden_states=states, calls=calls)


@define(frozen=True, eq=False)
class Pass:
    """One forward with memory. Immutable, so that a recomputation in backward sees what the forward saw.

    Attributes:
        source: gives every layer its prefix.
        adapter: the LoRA adapter that is active, "write" or "read"; None where there are no adapters.
        edit: changes what a layer that carries memory receives; None: nothing does.
        collection: gathers what layers receive and give; None: nothing is gathered.
        finish: gives the final hidden state, from what is gathered; None: it is the decoder's.
        text_offset: position of the first text token; one for all, or ``[streams, 1]`` int64.
        placement: where in the text the memory stands; None: in front of all of it.
        merged: by projection, one with the adapter merged into its weight, which runs in its place; {}: none does.
    """

    source: PrefixSource
    adapter: str | None
    edit: Edit | None = None
    collection: Collection | None = None
    finish: Finish | None = None
    text_offset: int | Tensor = 0
    placement: Placement | None = None
    merged: Mapping[nn.Module, nn.Module] = field(factory=dict)


_CURRENT: ContextVar[Pass | None] = ContextVar("mplus_pass", default=None)


def current_pass() -> Pass | None:
    """Return the pass this thread is in, if any."""
    return _CURRENT.get()


def run_in(active: Pass | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function(*args, **kwargs)`` in the pass ``active``.

    In a copy of the thread's context: an interrupt, at whatever line it comes, leaves the thread in no pass.
    """
    # Not set and reset in a try: an interrupt can strike between the two, and would leave the pass set.
    context = copy_context()
    context.run(_CURRENT.set, active)
    return context.run(function, *args, **kwargs)


_MERGED: ContextVar[tuple[nn.Module, Mapping[nn.Module, nn.Module]] | None] = ContextVar("mplus_merged", default=None)


@contextmanager
def with_merged(model: nn.Module, merged: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Let reads of ``model`` in this context run with ``Pass.merged``; its weights must be those that were merged."""
    token = _MERGED.set((model, merged))
    try:
        yield
    finally:
        _MERGED.reset(token)


def merged_for(model: nn.Module) -> Mapping[nn.Module, nn.Module]:
    """Return the modules that run in the place of ``model``'s projections in reads of this context, by projection."""
    found = _MERGED.get()
    return found[1] if found is not None and found[0] is model else {}


_PAUSE: ContextVar[Callable[[], None] | None] = ContextVar("mplus_pause", default=None)


@contextmanager
def pausing(pause: Callable[[], None]) -> Iterator[None]:
    """Call ``pause`` before every layer of the passes that this context runs: it may let other threads go first."""
    token = _PAUSE.set(pause)
    try:
        yield
    finally:
        _PAUSE.reset(token)


class MemoryLayer(Layer):
    """Mixed into a decoder layer's class; does nothing outside a pass."""

    _mplus_memory_index: int | None

    def __call__(self, *args: Argument, **kwargs: Argument) -> Tensor | tuple[Tensor, ...]:
        # Outside gradient checkpointing: what is added and collected here is part of the recorded graph.
        active = current_pass()
        if active is None:
            plain: Tensor | tuple[Tensor, ...] = super().__call__(*args, **kwargs)
            return plain
        pause = _PAUSE.get()
        if pause is not None:
            pause()
        index, collection, edit = self.__dict__["_mplus_memory_index"], active.collection, active.edit
        if edit is not None or collection is not None:
            hidden = ModuleCall(args, kwargs).hidden
            if edit is not None and index is not None:
                hidden = edit(index, hidden)
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
            if collection is not None:
                collection.entered(index, hidden)
                if "calls" in collection.names:
                    collection.calls.append(ModuleCall(args, dict(kwargs)))
        output: Tensor | tuple[Tensor, ...] = super().__call__(*args, mplus_pass=active, **kwargs)
        if collection is not None:
            collection.left(index, output[0] if isinstance(output, tuple) else output)
        return output

    def forward(
        self, *args: Argument, mplus_pass: Pass | None = None, **kwargs: Argument
    ) -> Tensor | tuple[Tensor, ...]:
        # Inside it: a recomputation comes after the pass, maybe in another thread, so the pass travels as an argument.
        # In the thread that runs the pass it is set already; only a recomputation has to set it again.
        forward: Callable[..., Tensor | tuple[Tensor, ...]] = super().forward
        if mplus_pass is None or mplus_pass is current_pass():
            return forward(*args, **kwargs)
        return run_in(mplus_pass, forward, *args, **kwargs)


def carry_memory(layer: nn.Module, memory_index: int | None) -> None:
    """Make ``layer`` carry memory, in place; ``memory_index`` None: it only hands the pass on."""
    layer.__dict__["_mplus_memory_index"] = memory_index
    change_class(layer, subclass(type(layer), MemoryLayer))


def drop_memory(layer: nn.Module) -> None:
    """Undo ``carry_memory``."""
    layer.__dict__.pop("_mplus_memory_index", None)
    change_class(layer, type(layer).__mplus_base__)  # type: ignore[attr-defined]


_SUBCLASSES: dict[tuple[type, type], type] = {}
Reduced = tuple[
    Callable[[Callable[[type], type], type], nn.Module], tuple[Callable[[type], type], type], Mapping[str, nn.Module]
]
"""What pickle makes a module of again: a function, its arguments, and the module's ``__dict__``."""


def subclass(
    base: type, mixin: type, make: Callable[[type], type] | None = None, **methods: Callable[..., Output]
) -> type:
    """Return the dynamic subclass of ``base`` with ``mixin`` in front, made once.

    It has the name of ``base``, by which device placement, sharding and quantisation know it.

    Args:
        base, mixin: its bases.
        make: makes it of ``base`` anew where an object of it is unpickled, as pickle cannot find it by its name; None:
            ``subclass`` itself does.
        methods: methods of its own.
    """
    if (base, mixin) not in _SUBCLASSES:
        maker = partial(subclass, mixin=mixin) if make is None else make

        def reduce(instance: Layer, protocol: SupportsIndex) -> Reduced:
            return rebuild, (maker, base), instance.__dict__

        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__mplus_base__": base}
        _SUBCLASSES[base, mixin] = type(base.__name__, (mixin, base), {**names, "__reduce_ex__": reduce, **methods})
    return _SUBCLASSES[base, mixin]


def rebuild(make: Callable[[type[T]], type[T]], base: type[T]) -> T:
    """Return a bare object of the class that ``make`` makes of ``base``."""
    cls = make(base)
    return cls.__new__(cls)


def change_class(module: nn.Module, cls: type) -> None:
    """Change the class of a module in place, also under accelerate's hooks, which keep a bound ``forward``."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = cls.forward.__get__(module)  # type: ignore[attr-defined]
