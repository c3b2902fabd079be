"""Commands: what the HTTP contract answers to everything but generating, as plain data."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from attrs import define, field

from mplus.config import JsonValue
from mplus.errors import MemoryFileError
from mplus.memory.memory import Memory
from mplus.memory.weights_state import WeightsState
from mplus.serving import messages
from mplus.serving.engine.memories.described import MemorySizes, SourceFacts, WriteCounts, to_iso
from mplus.serving.engine.memories.lanes import Lanes
from mplus.serving.engine.memories.pool import Pool
from mplus.serving.engine.memories.tenants import DEFAULT, MadeMemory, Tenants, already_there, check_id, not_made
from mplus.serving.engine.memories.writer import Writer
from mplus.serving.engine.memories.writing import MemoryWrite
from mplus.serving.engine.refusals import disk_full, disk_is_full
from mplus.serving.errors import ServingError
from mplus.serving.messages import MemoryName

T = TypeVar("T")
LONG_AT_ONCE = 2
"""Texts that are tokenized, or memories that are copied, at once for a tenant."""
Answer = Mapping[str, JsonValue]


@define(eq=False)
class Commands:
    """Answers commands; used by the engine's thread alone.

    Attributes:
        tenants: the memories there are.
        pool: those that are open.
        lanes: what is being done to each.
        writer: writes texts.
        executor: threads for the disk.
        long: threads for what takes as long as a text or a memory is.
        copied: returns the new memory, open, that a file of an export makes of a name.
        empty: what a memory reads as that was never written.
        weights: what the decoder computes with.
    """

    tenants: Tenants
    pool: Pool
    lanes: Lanes
    writer: Writer
    executor: Executor
    long: Executor
    copied: Callable[[MemoryName, Path], Memory]
    empty: Memory
    weights: WeightsState
    _held: Counter[str] = field(factory=Counter, init=False)
    _turns: WeakValueDictionary[str, asyncio.Semaphore] = field(factory=WeakValueDictionary, init=False)

    async def answer(self, command: messages.Command) -> Answer:
        """Return the answer to a command. Raises ServingError, and what mplus raises."""
        how: dict[type[Any], Callable[[Any], Awaitable[Answer]]] = {
            messages.MakeMemory: self._make,
            messages.ListMemories: self._list,
            messages.DescribeMemory: self._describe,
            messages.DeleteMemory: self._delete,
            messages.ForkMemory: self._fork,
            messages.ExportMemory: self._export,
            messages.ImportMemory: self._import,
            messages.ReleaseMemory: self._release,
            messages.DescribeUsage: self._usage,
            messages.WriteMemory: self._write,
            messages.FlushMemory: self._flush,
            messages.ListSources: self._sources,
            messages.ForgetSource: self._forget,
            messages.ReadSource: self._text,
            messages.SearchMemory: self._search,
        }
        return await how[type(command)](command)

    @asynccontextmanager
    async def reading(self, name: MemoryName) -> AsyncIterator[Memory]:
        """Hold a memory open for a read, once the writes that came before are over.

        Raises ServingError (404): it was not made; and what opening raises.
        """
        before = self.lanes.begin_read(name)
        check_id(name.id)
        if before is not None:
            lane, number = before
            await lane.until(number)
        if self._made(name) is None:
            yield self.empty
            return
        memory = await self.pool.take(name)
        try:
            yield memory
        finally:
            self.pool.give(name)

    @asynccontextmanager
    async def changing(self, name: MemoryName) -> AsyncIterator[Memory]:
        """Hold a memory open for a change, once all changes that came before are over; makes the default one.

        Raises as ``reading``.
        """
        async with self.lanes.change(name):
            check_id(name.id)
            if self._made(name) is None:
                await self._run(partial(self.tenants.make, name))
            memory = await self.pool.take(name)
            try:
                if memory.directory is None:  # opened to be read only, while the disk could not be written
                    raise disk_full()
                yield memory
            finally:
                self.pool.give(name)

    def _made(self, name: MemoryName) -> MadeMemory | None:
        """Return what is known of a memory; None: the default one was not made yet. Raises ServingError (404)."""
        made = self.tenants.find(name)
        if made is None and name.id != DEFAULT:
            raise not_made(name.id)
        return made

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.executor, function)

    async def _run_long(self, tenant: str, function: Callable[[], T]) -> T:
        """Call what may take long, few of a tenant at once, so that others are not kept waiting by it."""
        async with self._turns.setdefault(tenant, asyncio.Semaphore(LONG_AT_ONCE)):
            return await asyncio.get_running_loop().run_in_executor(self.long, function)

    @asynccontextmanager
    async def _room(self, tenant: str, more: int) -> AsyncIterator[None]:
        """Hold room for bytes that are about to be written, which what else a tenant writes meanwhile cannot have.

        Raises ServingError (413): there is none.
        """
        self._held[tenant] += more
        try:
            await self._run(partial(self.tenants.check_room, tenant, self._held[tenant]))
            yield
        finally:
            self._held[tenant] -= more
            if not self._held[tenant]:
                del self._held[tenant]

    # ------------------------------------------------------------------ memories

    async def _make(self, command: messages.MakeMemory) -> Answer:
        async with self.lanes.change(command.memory):
            check_id(command.memory.id)
            if self.tenants.find(command.memory) is not None:
                raise already_there(command.memory.id)
            made = await self._run(partial(self.tenants.make, command.memory))
        return {"id": made.id, "created": made.created, "version": made.first}

    async def _list(self, command: messages.ListMemories) -> Answer:
        made = await self._run(partial(self.tenants.all, command.tenant))
        if command.after is not None:
            places = [place for place, one in enumerate(made) if one.id == command.after]
            if not places:
                raise not_made(command.after)
            made = made[places[0] + 1 :]
        data: list[JsonValue] = [{"id": one.id, "created": one.created} for one in made[: command.limit]]
        return {"data": data, "has_more": len(made) > command.limit}

    async def _describe(self, command: messages.DescribeMemory) -> Answer:
        name = command.memory
        async with self.reading(name) as memory:
            made = self.tenants.find(name)
            return {
                "id": name.id,
                "created": None if made is None else made.created,
                "version": self.version(name, memory),
                "mechanism": memory.engine.mechanism.name,
                **await self._run(partial(MemorySizes.of, memory)),
                "disk_bytes": await self._run(partial(self.tenants.disk_bytes, name)),
            }

    async def _delete(self, command: messages.DeleteMemory) -> Answer:
        name = command.memory
        async with self.lanes.change(name):
            check_id(name.id)
            if self._made(name) is not None:
                await self.pool.close(name)
                await self._run(partial(self.tenants.remove, name))
        return {"id": name.id, "deleted": True}

    async def _release(self, command: messages.ReleaseMemory) -> Answer:
        await self.pool.close(command.memory)
        return {}

    async def _usage(self, command: messages.DescribeUsage) -> Answer:
        limits, tenant = self.tenants.limits, command.tenant
        made = await self._run(partial(self.tenants.all, tenant))
        return {
            "memories": len(made),
            "disk_bytes": await self._run(partial(self.tenants.bytes_of_tenant, tenant)),
            "limits": {
                "memories": limits.memories,
                "disk_bytes": limits.disk_bytes,
                "memory_bytes": limits.memory_bytes,
                "waiting": limits.waiting,
                "body_bytes": limits.body_bytes,
            },
        }

    def version(self, name: MemoryName, memory: Memory, read: int | None = None) -> int:
        """Return a version of a memory as clients see it; of the default one that was not written yet the first.

        Args:
            name: of the memory.
            memory: itself.
            read: the version that a read saw, as ``memory.version``; None: the present one.
        """
        if memory is self.empty:
            return self.tenants.first(name.tenant)
        return self.pool.version(name, memory.version if read is None else read)

    # ------------------------------------------------------------------ copies

    async def _export(self, command: messages.ExportMemory) -> Answer:
        async with self.reading(command.memory) as memory:
            return {
                "id": command.memory.id,
                "bytes": await self._run_long(command.memory.tenant, partial(memory.export, command.to)),
            }

    async def _import(self, command: messages.ImportMemory) -> Answer:
        name = command.memory
        async with self.changing(name) as memory:
            return await self._taken_in(name, memory, Path(command.file))

    async def _fork(self, command: messages.ForkMemory) -> Answer:
        name = MemoryName(command.memory.tenant, command.to)
        check_id(command.to)
        with self.tenants.draft() as file:
            await self._export(messages.ExportMemory(command.memory, str(file)))
            # Only now: what holds a memory open waits for nothing that may wait for it.
            async with self.lanes.change(name):
                if self.tenants.find(name) is not None:
                    raise already_there(name.id)
                async with self._room(name.tenant, file.stat().st_size):
                    made = await self._run_long(name.tenant, partial(self._copy, name, file))
                memory = await self.pool.take(name)
                try:
                    sizes = await self._run(partial(MemorySizes.of, memory))
                    return {"id": made.id, "created": made.created, "version": self.version(name, memory), **sizes}
                finally:
                    self.pool.give(name)

    def _copy(self, name: MemoryName, file: Path) -> MadeMemory:
        """Make a memory of an exported file: there is all of it under its name, or nothing."""
        try:
            with ExitStack() as locked, self.tenants.making(name) as made:
                locked.enter_context(self.copied(name, file))
        except BaseException:
            self.tenants.remove_unmade(name)
            raise
        return made

    async def _taken_in(self, name: MemoryName, memory: Memory, file: Path) -> Answer:
        """Import a file into a memory that is held for it."""
        if not memory.is_empty:
            raise ServingError(
                f"a memory must be empty to take an export in, and {name.id!r} is not: make another one",
                409, "conflict_error", code="memory_not_empty",
            )  # fmt: skip
        try:
            async with self._room(name.tenant, file.stat().st_size):
                await self._run_long(name.tenant, partial(memory.import_, file))
        except MemoryFileError as error:
            if disk_is_full(error):
                raise
            raise ServingError(
                "the file is not a whole export of a memory, so nothing was taken in",
                400, "invalid_request_error", code="invalid_memory_file",
            ) from error  # fmt: skip
        return {
            "id": name.id,
            "version": self.version(name, memory),
            **await self._run(partial(MemorySizes.of, memory)),
        }

    # ------------------------------------------------------------------ what is written

    async def _write(self, command: messages.WriteMemory) -> Answer:
        name = command.memory
        async with self.changing(name) as memory:
            write = await self._run_long(name.tenant, partial(MemoryWrite.of, memory, command, self.weights))
            async with self._room(name.tenant, write.bytes):
                await self.writer.write(write)
            return {**write.done(), "memory_version": self.version(name, memory)}

    async def _flush(self, command: messages.FlushMemory) -> Answer:
        async with self.changing(command.memory) as memory:
            counts = WriteCounts.of(await self.writer.run(memory.flush))
            return {**counts, "memory_version": self.version(command.memory, memory)}

    async def _sources(self, command: messages.ListSources) -> Answer:
        async with self.reading(command.memory) as memory:
            found = await self._run(memory.sources)
        config = memory.engine.config
        return {"data": [SourceFacts.of(one, config) for one in found]}

    async def _forget(self, command: messages.ForgetSource) -> Answer:
        name = command.memory
        if self._made(name) is None and self.lanes.begin_read(name) is None:
            raise no_source(command.source)
        async with self.changing(name) as memory:
            self._need_source(memory, command.source)
            report = await self._run(partial(memory.forget, command.source))
            return {"rows": report.rows, "tokens": report.tokens, "chunks": report.chunks}

    async def _text(self, command: messages.ReadSource) -> Answer:
        async with self.reading(command.memory) as memory:
            self._need_source(memory, command.source)
            return {"name": command.source, "text": await self._run(partial(memory.text, command.source))}

    def _need_source(self, memory: Memory, source: str) -> None:
        sources = memory.states[0].sources
        number = sources.find(source)
        if number is None or not sources[number].is_written:
            raise no_source(source)

    async def _search(self, command: messages.SearchMemory) -> Answer:
        async with self.reading(command.memory) as memory:
            found = await self._run_long(command.memory.tenant, partial(memory.search, command.text, command.k))
        return {
            "data": [
                {
                    "source": one.source,
                    "score": one.score,
                    "text": one.text,
                    "written": None if one.written is None else to_iso(one.written),
                }
                for one in found
            ]
        }


def no_source(source: str) -> ServingError:
    """Return the error that says: nothing was written under this name, or it was forgotten."""
    return ServingError(
        f"this memory has no source {source!r:.160}", 404, "not_found_error", code="source_not_found", param="source"
    )
