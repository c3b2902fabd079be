"""Names in paths: memories and sources, percent-encoded."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from mplus.serving.http.errors import bad_request
from mplus.serving.http.front import memory_name
from mplus.serving.http.keys import Caller
from mplus.serving.messages import MemoryName

LONGEST_SOURCE = 1024


def path_memory(caller: Caller, segment: str) -> MemoryName:
    """Return the caller's memory that a segment of a path names. Raises ServingError (400)."""
    return memory_name(caller, _decoded(segment, "id"))


def path_source(segment: str) -> str:
    """Return the source that a segment of a path names. Raises ServingError (400)."""
    name = _decoded(segment, "source")
    if len(name) > LONGEST_SOURCE:
        raise bad_request(f"source must have at most {LONGEST_SOURCE} characters", "source", "invalid_value")
    return name


def _decoded(segment: str, param: str) -> str:
    try:
        return unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"{param} must be UTF-8, percent-encoded", param, "invalid_id") from error
