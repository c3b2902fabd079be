"""MechanismSuite: what the tests of a mechanism share, a small trained decoder and memories of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor

import mplus
from mplus.config import JsonValue, MPlusConfig
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.root import Mechanism
from mplus.memory.state import StreamState
from mplus.memory.texts import tail_tensors
from mplus.memory.writing.chunking import WriteData
from mplus.stores.base import StoreView
from mplus.testing.rounding import FACTOR, InFloat64, allowed

if TYPE_CHECKING:
    from mplus.memory import Memory

CHUNK, VOCABULARY = 16, 512
TOLERANCE = 1e-9
"""Largest difference of two ways to compute the same logits in float64. They are of size 18 here, where a unit in the
last place is 4e-15: this allows for 300,000 of them, and another stream's memory in place of its own takes them 4
apart."""

Content = dict[str, Tensor | int | list[str | None]]
"""What one stream holds, by name."""


class MechanismSuite:
    """Wraps the small trained decoder that comes with mplus, and writes memories of it.

    Attributes:
        implementation: the mechanism class under test; it need not be registered.
        settings: of the memory, besides the mechanism; sizes such that a read retrieves all that the tests write.
        dtype: of weights and computation.
        keeping: arguments with which a memory in a directory keeps all that it can.
        asking: arguments of a read with which the beginning of a text brings back what all of it does.
    """

    implementation: ClassVar[type[Mechanism]]
    settings: ClassVar[Mapping[str, JsonValue]] = {}
    keeping: ClassVar[Mapping[str, JsonValue]] = {}
    asking: ClassVar[Mapping[str, JsonValue]] = {}
    dtype: ClassVar[torch.dtype] = torch.float64

    @classmethod
    def memory_table(cls) -> dict[str, JsonValue]:
        """Return the fields of a configuration, as plain data."""
        return {**cls.settings, "mechanism": cls.implementation.name}

    @classmethod
    def config(cls, **changes: JsonValue) -> MPlusConfig:
        """Return the configuration that the decoder is wrapped with, with ``changes`` of its fields."""
        return MPlusConfig.from_dict({**cls.memory_table(), **changes})

    @classmethod
    @contextmanager
    def registered(cls) -> Iterator[None]:
        """Let the name of the mechanism stand for it, unless it does so already."""
        name = cls.implementation.name
        known = name in MECHANISMS.names()
        if not known:
            MECHANISMS.register(name, cls.implementation)
        try:
            yield
        finally:
            if not known:
                MECHANISMS.unregister(name)

    @classmethod
    @contextmanager
    def wrapped(cls, dtype: torch.dtype | None = None, **changes: JsonValue) -> Iterator[MemoryModel]:
        """Wrap the decoder; the mechanism is registered meanwhile. ``changes`` are fields of the configuration."""
        with cls.registered():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = mplus.wrap(load_decoder().to(dtype or cls.dtype), cls.config(**changes))
            yield model

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> Iterator[MemoryModel]:
        """The wrapped decoder that all tests of the class share."""
        with cls.wrapped() as model:
            yield model

    def given(self) -> dict[str, Any]:
        """Return arguments with which every memory is made, loaded and opened."""
        return {}

    def text(self, seed: int) -> Any:
        """Return a text that can be written in one chunk, equal for equal seeds."""
        raise NotImplementedError

    def short_text(self, seed: int) -> WriteData:
        """Return a text of a few words that can be written, too; by default one that ``text`` returns."""
        found: WriteData = self.text(seed)
        return found

    def prompt(self, seed: int) -> Tensor:
        """Return ids ``[T]`` of a text to read, equal for equal seeds; T is the same for all."""
        raise NotImplementedError

    def traces(self, text: Any) -> dict[str, bytes]:
        """Return what no file may hold once ``text`` is forgotten, by name."""
        raise NotImplementedError

    def loaded(self, path: Path, model: MemoryModel) -> Memory:
        """Return the memory that was saved in a folder."""
        return mplus.Memory.load(path, model, **self.given())

    def opened(self, path: Path, model: MemoryModel, **options: Any) -> Memory:
        """Return the memory that lives in a folder."""
        return mplus.Memory.open(path, model, **self.given(), **options)

    def written(self, model: MemoryModel, *seeds: int, **options: Any) -> Memory:
        """Return a memory of one stream with a chunk for each seed; sources are "s0", "s1", ..."""
        memory: Memory = model.new_memory(seed=1, **self.given(), **options)
        for number, seed in enumerate(seeds):
            memory.write(self.text(seed), source=f"s{number}")
        return memory

    @torch.no_grad()
    def logits(self, model: MemoryModel, ids: Tensor, memory: Memory | None = None, **options: Any) -> Tensor:
        """Return logits ``[B, T, V]`` of ids ``[B, T]``."""
        found: Tensor = model(ids, memory=memory, **options).logits
        return found

    def tolerance(self, model: MemoryModel) -> float:
        """Return how far logits of two ways to compute them may be apart, which is measured but for float64.

        Several times the distance of one of them from the same decoder, with the same weights, in float64: two chunks
        written, each behind what came before, and a text read with them.
        """
        if self.dtype == torch.float64:
            return TOLERANCE
        ids = self.prompt(7)[None]
        plain = self.logits(model, ids, self.written(model, 1, 2))
        weights = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
        with self.wrapped(torch.float64) as wide:
            wide.load_state_dict(weights, strict=False)
            with InFloat64():
                exact = self.logits(wide, ids, self.written(wide, 1, 2))
        return allowed(plain, exact, factor=FACTOR)

    def content(self, memory: Memory) -> list[Content]:
        """Return all that each stream holds, by name: columns of rows, tensors, names of sources, the clock."""
        return [content_of(state, store) for state, store in zip(memory.states, memory.stores, strict=True)]

    def differences(self, first: Memory, second: Memory) -> list[str]:
        """Return what differs in two memories, bit for bit, by name."""
        both = zip(self.content(first), self.content(second), strict=True)
        return [f"stream {row}: {name}" for row, (one, two) in enumerate(both) for name in unequal(one, two)]


class RowSuite(MechanismSuite):
    """MechanismSuite for mechanisms whose memories are made of rows.

    Attributes:
        implementation: the mechanism class under test.
    """

    implementation: ClassVar[type[MemoryMechanism]]
    keeping: ClassVar[Mapping[str, JsonValue]] = {"keep_text": True}

    @classmethod
    def memory_table(cls) -> dict[str, JsonValue]:
        """Return the fields of a configuration, as plain data."""
        name = cls.implementation.name
        sizes: dict[str, JsonValue] = {"chunk_tokens": CHUNK, "min_chunk_tokens": 4, "long_term_tokens": 200}
        if MPlusConfig.from_dict({"mechanism": name}).adapters is not None:
            sizes["adapters"] = None
        if cls.implementation.uses_retriever:
            sizes.update(retriever={"name": "linear", "width": 8}, retrieved_tokens=200)
        if cls.implementation.keeps == frozenset({"hidden"}):
            sizes["memory_rows"] = "hidden"
        return {**sizes, **cls.settings, "mechanism": name}

    def text(self, seed: int, tokens: int = CHUNK) -> Tensor:
        """Return ids ``[tokens]``, equal for equal seeds."""
        return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))

    def short_text(self, seed: int) -> Tensor:
        """Return three ids of the prompt of this seed, in another order."""
        return self.prompt(seed)[[0, 2, 1]]

    def prompt(self, seed: int) -> Tensor:
        return self.text(seed)

    def traces(self, text: Tensor) -> dict[str, bytes]:
        """Return the bytes of the ids, in every dtype that they may be kept in."""
        dtypes = (torch.int16, torch.int32, torch.int64)
        return {f"its ids as {dtype}": text.to(dtype).numpy().tobytes() for dtype in dtypes}


def content_of(state: StreamState, store: StoreView) -> Content:
    """Return all that a stream holds, by name."""
    found: Content = {"clock": state.clock, "sources": [source.name for source in state.sources]}
    found |= state.tensors()
    found |= {f"text that waits, {name}": values for name, values in tail_tensors(state.tail).items()}
    layers = range(store.layout.layers)
    lists = {**state.row_lists(), "store": tuple(store.gather(layer, store.ids(layer)) for layer in layers)}
    for name, parts in lists.items():
        for layer, rows in enumerate(parts):
            found |= {f"{name}, layer {layer}, {column}": values for column, values in rows.columns().items()}
    return found


def unequal(one: Content, two: Content) -> list[str]:
    """Return the names of what is in one of them only, or is not the same in both."""
    shared = one.keys() & two.keys()
    missing = sorted((one.keys() | two.keys()) - shared)

    def same(one: Tensor | int | list[str | None], two: Tensor | int | list[str | None]) -> bool:
        return torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else bool(one == two)

    return missing + sorted(name for name in shared if not same(one[name], two[name]))


def bytes_of(folder: Path) -> bytes:
    """Return the content of all files in a folder."""
    return b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
