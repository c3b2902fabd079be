"""ServingError: why a request was refused, as the HTTP answer says it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from attrs import define

from mplus.errors import MPlusError

Kind = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
]


@define(frozen=True)
class ErrorFacts:
    """The facts of an error that a client gets to know.

    Attributes:
        status: of the HTTP answer.
        kind: the field ``type`` of OpenAI's error objects.
        code: a short name for programs, such as "context_length_exceeded"; None: there is none.
        param: the top-level field of the request that is wrong; None: no single one.
        retry_after: whole seconds after which to try again; None: nothing is said.
    """

    status: int
    kind: Kind
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None


class ServingError(MPlusError, RuntimeError):
    """A request was refused, and nothing was written; everyone else is served.

    The message goes to the client: it names no path of the server and shows no traceback.

    Attributes:
        facts: status, type, code and field.

    Example:
        >>> error = ServingError("there is no memory 'ada'", 404, "not_found_error", code="memory_not_found")
        >>> error.body()["error"]["code"]
        'memory_not_found'
    """

    def __init__(
        self,
        message: str,
        status: int,
        kind: Kind,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.facts = ErrorFacts(status, kind, code, param, retry_after)

    def __reduce__(self) -> tuple[Callable[[str, int, Kind], ServingError], tuple[str, int, Kind]]:
        # Errors travel between processes, and exceptions are pickled by their positional arguments alone.
        facts = self.facts
        again = partial(ServingError, code=facts.code, param=facts.param, retry_after=facts.retry_after)
        return again, (self.message, facts.status, facts.kind)

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON object of the answer, in the form of OpenAI's errors."""
        facts = self.facts
        return {"error": {"message": self.message, "type": facts.kind, "param": facts.param, "code": facts.code}}
