"""RequestRecord: what is known of a request at its end; one line of the log each."""

from __future__ import annotations

import logging
import time

from attrs import define, field

logger = logging.getLogger("mplus.serving")


@define
class RequestRecord:
    """A request as the log and the metrics count it; it names no user, no memory and no text.

    Attributes:
        id: also in the header ``x-request-id`` of the answer.
        method, route: the route as a template, so that no id is in it.
        status: of the answer; 499: the client left before it had one.
        tenant: hash of its name.
        prompt_tokens, tokens: of the prompts and the answers.
        began: ``time.perf_counter`` at the first byte.
        read, first: seconds until the prompt was read, and until the first token; None: it never came to that.
        reason: of the end: "length", "stop", "cancelled", "disconnect", "slow reader" or "error".
    """

    id: str
    method: str
    route: str = "unknown"
    status: int = 499
    tenant: str = "-"
    prompt_tokens: int = 0
    tokens: int = 0
    began: float = field(factory=time.perf_counter)
    read: float | None = None
    first: float | None = None
    reason: str = "-"

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.began

    def write(self) -> None:
        """Write the line of the log."""
        logger.info(
            "request id=%s tenant=%s method=%s route=%s status=%d prompt=%d tokens=%d read=%s first=%s total=%.3f "
            "reason=%s",
            self.id, self.tenant, self.method, self.route, self.status, self.prompt_tokens, self.tokens,
            _seconds(self.read), _seconds(self.first), self.seconds, self.reason.replace(" ", "_"),
        )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
