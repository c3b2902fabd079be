"""Commit changes of several memories at the same time: their journals are synced together.

A change counts once its record is synced, and waiting for the disk takes longer than all else. Many disks take many
syncs at once in about the time of one. So the records of all memories are appended first, then synced in threads, and
then each memory shows its change.

Every change goes through the one way there is to change a memory (``Streams.change``). Where that would sync its
record, the change of the next memory begins instead, inside of the first; the last of them syncs all. What fails for
one memory is taken back for that one alone. An interrupt goes through all that have not ended: each of them ends as it
would have alone, with its change or without it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice

from attrs import define, field

from mplus.memory.transaction import Sync

MOST_TOGETHER = 32
"""Memories whose changes are inside of one another: each takes a few calls deep, of a thousand that Python allows."""
SYNC_THREADS = 8

GroupedChange = Callable[[Sync], object]
"""Makes a change of one memory, and calls what it is given in the place of syncing the record, if there is one."""


def commit_together(changes: Mapping[int, GroupedChange], pool: ThreadPoolExecutor) -> dict[int, Exception]:
    """Make a change of each of several memories; the caller holds their write locks.

    Args:
        changes: of different memories, by any key.
        pool: syncs their records.

    Returns:
        What failed, by the same key: that memory is as it was before. What is no ``Exception`` is raised.
    """
    failed: dict[int, Exception] = {}
    left = iter(changes.items())
    while some := list(islice(left, MOST_TOGETHER)):
        group = _Group(some, pool)
        with suppress(RecursionError):  # the caller was deep already: those that are left are changed alone
            group.change(0)
        failed |= group.failed
        for key, change in some:
            if key not in group.done and key not in failed:
                error = error_of(partial(change, lambda work: work()))
                if error is not None:
                    failed[key] = error
    return failed


def error_of(work: Callable[[], object]) -> Exception | None:
    """Return what ``work`` raises; None: it is done."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - handed to the caller, or raised where the memory itself would sync
        return error
    return None


@define(eq=False)
class _Group:
    """Changes that are made inside of one another.

    Attributes:
        changes: by key.
        pool: syncs their records.
        done, failed: by key, what came of each; what is in neither was not begun, or taken back.
        syncs: the records that are appended, by place in ``changes``: what syncs each.
        synced: by the same place, None where a record is on disk, or why it is not.
    """

    changes: Sequence[tuple[int, GroupedChange]]
    pool: ThreadPoolExecutor
    done: set[int] = field(factory=set)
    failed: dict[int, Exception] = field(factory=dict)
    syncs: dict[int, Callable[[], None]] = field(factory=dict)
    synced: dict[int, Exception | None] = field(factory=dict)

    def change(self, place: int) -> None:
        """Make the change at ``place``, and those behind it before it ends; or sync all, where it is the last."""
        if place == len(self.changes):
            self._sync()
            return
        key, change = self.changes[place]

        def sync(work: Callable[[], None]) -> None:
            self.syncs[place] = work
            self.change(place + 1)
            error = self.synced.get(place, OSError(errno.EIO, "its record was not synced"))
            if error is not None:
                raise error

        try:
            change(sync)
            self.done.add(key)
        except RecursionError:
            raise
        except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been changed
            self.failed[key] = error
        if place not in self.syncs:  # it has failed before, or has no record: it keeps no journal
            self.change(place + 1)

    def _sync(self) -> None:
        """Sync all records. Raises what is no ``Exception``."""
        futures: dict[int, Future[None]] = {}
        try:
            # One alone is synced in this thread.
            for place, work in self.syncs.items() if len(self.syncs) > 1 else ():
                with suppress(RuntimeError):  # the system gives no further thread: it is synced here
                    futures[place] = self.pool.submit(work)
            for place, work in self.syncs.items():
                self.synced[place] = error_of(futures[place].result if place in futures else work)
        finally:
            for future in futures.values():
                future.cancel()  # after an interrupt, that of records which are taken back
