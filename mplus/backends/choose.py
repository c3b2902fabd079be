"""Choosing the attention backend for a request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mplus.backends import BACKENDS
from mplus.backends.checks import check_request
from mplus.backends.measured import measured_order
from mplus.errors import MissingDependencyError, NotSupported, PluginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from mplus.backends.base import AttentionBackend, AttentionRequest

logger = logging.getLogger(__name__)

AUTO = "auto"
ORDER = ("merge", "sdpa", "reference")
"""The backends of mplus that "auto" asks, in this order; "reference" refuses nothing.

On a GPU like one that they were measured on (``mplus.backends.measured``) those that passed come first, the fastest in
front. ``flex`` pays where one shape is used often, and ``triton`` ran on no other GPU: both run where they are named.
"""


class BackendChooser:
    """Finds the backend for each request and keeps one instance of each; logs every backend it takes once.

    Args:
        name: a registered backend, which then runs every request or refuses it, or "auto" for the first that can: of
            plug-ins that have ``AttentionBackend.auto``, by name, then of ``measured_order``, then of ``ORDER``. A
            plug-in that is registered after the first request is not asked.

    Raises:
        UnknownNameError: there is no such backend.
    """

    def __init__(self, name: str = AUTO) -> None:
        self.name = name
        self._instances: dict[str, AttentionBackend] = {}
        self._logged: set[str] = set()
        self._candidates: tuple[str, ...] = () if name == AUTO else (name,)
        for candidate in self._candidates:
            self._instance(candidate)

    def choose(self, request: AttentionRequest) -> AttentionBackend:
        """Return the backend to run ``request`` with.

        Raises:
            InputError: the request is malformed, see ``check_request``.
            NotSupported: the named backend, or every backend, refuses; the message has the reasons and the shapes.
        """
        check_request(request)
        if not self._candidates:  # plug-ins are looked for when they are needed, not when a decoder is wrapped
            self._candidates = (*_plugins(), *ORDER)
        measured = measured_order(request) if self.name == AUTO else ()
        refused: dict[str, list[str]] = {}
        candidates: Iterable[str] = self._candidates
        if measured:  # plug-ins first, which were installed on purpose; what was not measured comes last
            plugins = [name for name in self._candidates if name not in ORDER]
            candidates = dict.fromkeys((*plugins, *measured, *self._candidates))
        for name in candidates:
            backend = self._instance(name)
            reasons = backend.unsupported_reasons(request) or _reasons_against_bias(backend, request)
            if not reasons:
                self._log(name, refused, measured)
                return backend
            refused[name] = reasons
        what = "no attention backend can" if self.name == AUTO else f"attention backend {self.name!r} cannot"
        advice = "" if self.name == AUTO else "; backend='auto' takes one that can"
        raise NotSupported(f"{what} run {describe(request)}: {_listed(refused)}{advice}")

    def _instance(self, name: str) -> AttentionBackend:
        if name not in self._instances:
            self._instances[name] = BACKENDS.get(name)()
        return self._instances[name]

    def _log(self, name: str, refused: dict[str, list[str]], measured: Sequence[str]) -> None:
        if name in self._logged:
            return
        self._logged.add(name)
        if self.name != AUTO:
            why = "named in the configuration"
        elif refused:
            why = f"the first that can run the request; {_listed(refused)}"
        elif name in measured:
            why = "the fastest of those that were measured on such a GPU"
        elif name not in ORDER:
            why = "a plug-in that asks to be taken first"
        else:
            why = "the first of the order of preference"
        logger.info("attention backend %r (%s): %s", name, BACKENDS.origin(name), why)


def _plugins() -> Iterator[str]:
    """Yield the backends besides those of ``ORDER`` that "auto" may take; one that is broken is left out and logged."""
    for name in BACKENDS.names():
        try:
            if name not in ORDER and BACKENDS.get(name).auto:
                yield name
        except (PluginError, MissingDependencyError) as error:
            logger.warning("backend 'auto' leaves one out: %s", error)


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
    """Return the backend for a single request: ``BackendChooser(name).choose(request)``."""
    return BackendChooser(name).choose(request)


def describe(request: AttentionRequest) -> str:
    """Say the shapes and dtypes of a request in one line."""
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
