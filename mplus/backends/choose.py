"""Choosing the attention backend for a request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mplus.backends import BACKENDS
from mplus.backends.checks import check_request
from mplus.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mplus.backends.base import AttentionBackend, AttentionRequest

logger = logging.getLogger(__name__)

AUTO = "auto"
ORDER = ("merge", "sdpa", "reference")
"""What "auto" tries first; others follow, by name. ``triton`` is not among the first: no GPU has run it yet."""


class BackendChooser:
    """Finds the backend for each request and keeps one instance of each; logs every backend it takes once.

    Args:
        name: a registered backend, which then runs every request or refuses it, or "auto" for the first that can.

    Raises:
        UnknownNameError: there is no such backend.
    """

    def __init__(self, name: str = AUTO) -> None:
        self.name = name
        self._instances: dict[str, AttentionBackend] = {}
        self._logged: set[str] = set()
        if name != AUTO:
            self._instance(name)

    def choose(self, request: AttentionRequest) -> AttentionBackend:
        """The backend to run ``request`` with.

        Raises:
            InputError: the request is malformed, see ``check_request``.
            NotSupported: the named backend, or every backend, refuses; the message has the reasons and the shapes.
        """
        check_request(request)
        refused: dict[str, list[str]] = {}
        for name in self._candidates():
            backend = self._instance(name)
            reasons = backend.unsupported_reasons(request) or _reasons_against_bias(backend, request)
            if not reasons:
                self._log(name, refused)
                return backend
            refused[name] = reasons
        what = "no attention backend can" if self.name == AUTO else f"attention backend {self.name!r} cannot"
        advice = "" if self.name == AUTO else "; backend='auto' takes one that can"
        raise NotSupported(f"{what} run {describe(request)}: {_listed(refused)}{advice}")

    def _candidates(self) -> Iterator[str]:
        if self.name != AUTO:
            yield self.name
            return
        yield from ORDER
        yield from (name for name in BACKENDS.names() if name not in ORDER)

    def _instance(self, name: str) -> AttentionBackend:
        if name not in self._instances:
            self._instances[name] = BACKENDS.get(name)()
        return self._instances[name]

    def _log(self, name: str, refused: dict[str, list[str]]) -> None:
        if name in self._logged:
            return
        self._logged.add(name)
        if self.name != AUTO:
            why = "named in the configuration"
        elif refused:
            why = f"the first that can run the request; {_listed(refused)}"
        else:
            why = "the first of the order of preference"
        logger.info("attention backend %r (%s): %s", name, BACKENDS.origin(name), why)


def _reasons_against_bias(backend: AttentionBackend, request: AttentionRequest) -> list[str]:
    """Return why ``backend`` may not get a request some of whose segments have a bias; empty when it may."""
    if backend.supports_key_bias:
        return []
    return [
        f"segments[{index}].bias {list(segment.bias.shape)}: the backend does not say that it adds one"
        for index, segment in enumerate(request.segments)
        if segment.bias is not None
    ]


def choose(name: str, request: AttentionRequest) -> AttentionBackend:
    """``BackendChooser(name).choose(request)``, for a single request."""
    return BackendChooser(name).choose(request)


def describe(request: AttentionRequest) -> str:
    """Shapes and dtypes of a request in one line."""
    segments = [
        f"{_shape(segment.keys)}{'' if segment.lengths is None else ' with fillers'}"
        f"{'' if segment.bias is None else ' with a bias'}"
        for segment in request.segments
    ]
    mask = "causal" if request.mask is None else f"{_shape(request.mask)}"
    return (
        f"queries {_shape(request.queries)} over text keys {_shape(request.keys)}, values {_shape(request.values)}, "
        f"mask {mask}, memory {', '.join(segments) or 'none'}"
    )


def _listed(refused: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {'; '.join(reasons)}" for name, reasons in refused.items())


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
