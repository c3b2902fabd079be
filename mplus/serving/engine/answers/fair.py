"""FairQueue: whose request is next, so that no tenant keeps the others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from attrs import define, field

from mplus.serving.errors import ServingError

QUANTUM = 512
"""Tokens that a tenant may have more with each turn of the round robin."""
AHEAD = 8
"""Answers that are let in before a row is free, so that their memories are open by then."""


@define(eq=False)
class Waiting:
    """A request that waits to be let in."""

    tenant: str
    rows: int
    cost: int
    admitted: asyncio.Future[None] = field(factory=lambda: asyncio.get_running_loop().create_future())


class FairQueue:
    """A deficit round robin over tenants: each is let in for equally many tokens, whatever it asks for.

    Used by the engine's thread alone.

    Attributes:
        rows: answers that are generated at once.
        limit: requests of one tenant that may wait.
    """

    def __init__(self, rows: int, limit: int) -> None:
        self.rows, self.limit = rows, limit
        self._queues: dict[str, deque[Waiting]] = {}
        self._turns: deque[str] = deque()
        self._credit: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._seen: set[str] = set()

    def arrive(self, tenant: str) -> Callable[[], None]:
        """Count a request that arrives, and return what ends its waiting; calling that again does nothing.

        Raises ServingError (429) where too many of this tenant wait already.
        """
        if self._waiting[tenant] >= self.limit:
            raise ServingError(
                f"{self.limit} requests of yours wait already, and more are not taken: try again",
                429, "rate_limit_error", code="too_many_waiting", retry_after=1,
            )  # fmt: skip
        self._waiting[tenant] += 1
        waits = [tenant]

        def begin() -> None:
            while waits:
                self._waiting[waits.pop()] -= 1
                if not self._waiting[tenant]:
                    del self._waiting[tenant]

        return begin

    async def admit(self, tenant: str, rows: int, cost: int) -> None:
        """Wait until a request may be answered; ``leave`` ends it.

        Args:
            tenant: who asks.
            rows: answers.
            cost: about how many tokens are read and generated for it.
        """
        one = Waiting(tenant, min(rows, self.rows), cost)
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            self._turns.append(tenant)
        self._queues[tenant].append(one)
        self._seen.add(tenant)
        self._advance()
        try:
            await one.admitted
        except asyncio.CancelledError:
            if one.admitted.done() and not one.admitted.cancelled():
                self.leave(tenant, rows)
            elif one in self._queues.get(tenant, ()):
                self._queues[tenant].remove(one)
                self._drop_empty(tenant)
            raise

    def leave(self, tenant: str, rows: int, staying: int = 0) -> None:
        """End so many rows of a request that was let in, while ``staying`` others of it go on."""
        self._held[tenant] -= min(rows + staying, self.rows) - min(staying, self.rows)
        if not self._held[tenant]:
            del self._held[tenant]
        self._advance()

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return self._waiting.total()

    def _advance(self) -> None:
        while (one := self._next()) is not None:
            self._held[one.tenant] += one.rows
            one.admitted.set_result(None)

    def _next(self) -> Waiting | None:
        """Take the next request that may be let in; None: there is none."""
        room = self.rows + min(AHEAD, self.rows) - self._held.total()
        ready = [tenant for tenant in self._turns if self._may_have(tenant, room)]
        while ready:
            tenant = self._turns[0]
            one = self._queues[tenant][0]
            if tenant in ready and self._credit[tenant] >= one.cost:
                self._credit[tenant] -= one.cost
                self._queues[tenant].popleft()
                self._drop_empty(tenant)
                return one
            if tenant in ready:
                self._credit[tenant] += QUANTUM
            self._turns.rotate(-1)
        return None

    def _may_have(self, tenant: str, room: int) -> bool:
        rows = self._queues[tenant][0].rows
        if rows > room and self._held.total():
            return False
        # Where there is more than one tenant, none has all rows, however long its answers are.
        others = self.rows // 8 or min(self.rows - 1, 1)
        shared = len(self._seen) > 1 and others > 0
        return not shared or not self._held[tenant] or self._held[tenant] + rows <= self.rows - others

    def _drop_empty(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant], self._credit[tenant]
            self._turns.remove(tenant)
