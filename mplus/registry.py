"""Registries: one for every kind of implementation, or of file, that a configuration or a command can name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from attrs import define

from mplus import plugins
from mplus.config import Component, options_of
from mplus.errors import ConfigError, DuplicateNameError, MissingDependencyError, PluginError, UnknownNameError

T = TypeVar("T")
V = TypeVar("V", bound=type | Path)
Target = type | Path | str | None
"""What a name stands for: a class, a file, or ``module:attribute``, which is imported when it is asked for."""

EXTRAS: Mapping[str, str] = {
    "bm25s": "eval",
    "datasets": "train",
    "faiss": "faiss",
    "lm_eval": "lm-eval",
    "matplotlib": "eval",
    "sentence_transformers": "dense",
    "tensorboard": "train",
    "triton": "triton",
}
"""Optional top-level module -> the extra of mplus that installs it."""


@define(frozen=True)
class RegistryEntry:
    """One claim on one name: where it comes from, and why it cannot be used (None: it can)."""

    name: str
    origin: str
    error: str | None = None


@define(frozen=True, eq=False)
class _Claim:
    """A claim on a name: what it stands for, not yet imported. ``error``: known to be unusable without that."""

    origin: str
    load: Callable[[], object]
    error: str | None = None
    target: Target = None


class NameRegistry(ABC, Generic[V]):
    """Names of one kind, and what stands behind them: built in, from plug-ins, or registered by the program.

    Targets are imported when asked for, plug-ins are looked up on first need, and a broken plug-in or a name
    claimed twice raises only when that name is asked for. Safe to use from several threads.

    Args:
        kind: what is named, in one word, for messages ("store").
        group: entry point group in which plug-ins announce more ("mplus.stores").
        builtin: name -> what comes with mplus under it, ``module:attribute`` or the value itself.
        reserved: names that mean something else where this kind is configured, so nobody may claim them.
        discover: finds the plug-ins of a group.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str,
        builtin: Mapping[str, str | V] | None = None,
        reserved: Collection[str] = (),
        discover: Callable[[str], list[plugins.Plugin]] = plugins.discover,
    ) -> None:
        self.kind = kind
        self.group = group
        self._reserved = frozenset(reserved)
        self._discover = discover
        self._lock = threading.RLock()
        self._claims: dict[str, list[_Claim]] = {}
        self._registered: dict[str, _Claim] = {}
        self._loaded: dict[_Claim, V] = {}
        self._discovered = False
        for name, target in (builtin or {}).items():
            self._claims[name] = [_Claim(f"mplus ({_shown(target)})", _loader(target), target=target)]

    @abstractmethod
    def _check(self, name: str, claim: _Claim, found: object) -> V:
        """Return what a claim was found to stand for. Raises PluginError where it is nothing of this kind."""

    def get(self, name: str) -> V:
        """Return what is called ``name``, imported now if it was not before.

        Raises:
            UnknownNameError: nobody claims the name; the message has near names and the list.
            DuplicateNameError: several claim it; the message has their origins.
            MissingDependencyError: it needs a package that is not installed; the message has the extra.
            PluginError: it cannot be imported or is nothing of this kind.
        """
        claim = self._claim(name)
        with self._lock:
            known = self._loaded.get(claim)
        if known is not None:
            return known
        # Imported without the lock: a module that registers something while another thread imports it
        # would otherwise wait for the lock, and the lock for the import.
        implementation = self._load(name, claim)
        with self._lock:
            return self._loaded.setdefault(claim, implementation)

    def names(self) -> list[str]:
        """Return all names that are claimed, sorted. Nothing is imported."""
        with self._lock:
            return sorted(self._known())

    def origin(self, name: str) -> str:
        """Return where the implementation called ``name`` comes from. Raises as ``get`` does, except for loading."""
        return self._claim(name).origin

    def entries(self) -> list[RegistryEntry]:
        """Return every claim on every name with its error, if any. Imports the implementations to find out."""
        with self._lock:
            names = sorted(self._known())
        return [entry for name in names for entry in self._entries_of(name)]

    def register(self, name: str, target: V | str) -> None:
        """Let ``name`` stand for a value, or for ``module:attribute`` imported on first use, in this process.

        Registering the same target again changes nothing.

        Raises:
            ConfigError: ``name`` is reserved or not a name, or ``target`` is text that is no ``module:attribute``.
            DuplicateNameError: the name is taken; the message has both origins.
            PluginError: the value is nothing of this kind.
        """
        if not isinstance(name, str) or not name or name.split() != [name]:
            raise ConfigError(f"the name of a {self.kind} must be a non-empty string without spaces, got {name!r}")
        if name in self._reserved:
            raise ConfigError(f"{name!r} is reserved and cannot name a {self.kind}: choose another name")
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            if not module or not attribute:
                raise ConfigError(f"a {self.kind} is registered as a class or 'module:attribute', got {target!r}")
        # The line that registered a name is what a person looks for when two packages claim it.
        caller = traceback.extract_stack(limit=2)[0]
        origin = f"registered at {Path(caller.filename).name}:{caller.lineno} ({_shown(target)})"
        claim = _Claim(origin, _loader(target), target=target)
        if not isinstance(target, str):
            self._check(name, claim, target)
        with self._lock:
            present = self._known().get(name, [])
            if any(other.target == target for other in present):
                return
            if present:
                raise self._duplicate(name, [*present, claim])
            self._claims[name] = [claim]
            self._registered[name] = claim

    def unregister(self, name: str) -> None:
        """Take back what ``register`` added. Raises UnknownNameError when it added no such name."""
        with self._lock:
            claim = self._registered.pop(name, None)
            if claim is None:
                raise UnknownNameError(f"no {self.kind} called {name!r} was registered by this program")
            del self._claims[name]
            self._loaded.pop(claim, None)

    def _known(self) -> dict[str, list[_Claim]]:
        """Claims by name, plug-ins included; call with the lock held."""
        if not self._discovered:
            for plugin in self._discover(self.group):
                error = plugin.error
                if plugin.name in self._reserved:
                    error = f"{plugin.name!r} is reserved and cannot name a {self.kind}"
                claim = _Claim(plugin.origin, plugin.load, error, target=plugin.target)
                self._claims.setdefault(plugin.name, []).append(claim)
            self._discovered = True
        return self._claims

    def _claim(self, name: str) -> _Claim:
        with self._lock:
            claims = self._known().get(name) if isinstance(name, str) else None
            if not claims:
                raise self._unknown(name)
            if len(claims) > 1:
                raise self._duplicate(name, claims)
            return claims[0]

    def _load(self, name: str, claim: _Claim) -> V:
        """Import and check. A plug-in may fail in any way, also by calling ``sys.exit``."""
        if claim.error is not None:
            raise PluginError(f"{self.kind} {name!r} of {claim.origin} is broken: {claim.error}")
        try:
            found = claim.load()
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in EXTRAS:
                raise MissingDependencyError(
                    f"{self.kind} {name!r} needs the package {missing!r}, which is not installed: "
                    f"pip install 'mplus[{EXTRAS[missing]}]'",
                    name=missing,
                ) from error
            raise self._broken(name, claim, error) from error
        except (Exception, SystemExit) as error:
            raise self._broken(name, claim, error) from error
        return self._check(name, claim, found)

    def _entries_of(self, name: str) -> list[RegistryEntry]:
        with self._lock:
            claims = list(self._known().get(name, []))
        if len(claims) > 1:
            message = str(self._duplicate(name, claims))
            return [RegistryEntry(name, claim.origin, claim.error or message) for claim in claims]
        error = None
        try:
            self.get(name)
        except (PluginError, MissingDependencyError) as problem:
            error = str(problem)
        return [RegistryEntry(name, claim.origin, error) for claim in claims]

    def _broken(self, name: str, claim: _Claim, error: BaseException) -> PluginError:
        return PluginError(
            f"{self.kind} {name!r} of {claim.origin} could not be loaded: {type(error).__name__}: {error}"
        )

    def _duplicate(self, name: str, claims: list[_Claim]) -> DuplicateNameError:
        origins = " and by ".join(claim.origin for claim in claims)
        return DuplicateNameError(
            f"{self.kind} {name!r} is claimed by {origins}: uninstall one, "
            f"or limit {plugins.ENVIRONMENT} to the distributions you want"
        )

    def _unknown(self, name: str) -> UnknownNameError:
        names = sorted(self._known())
        near = difflib.get_close_matches(name, names) if isinstance(name, str) else []
        message = f"no {self.kind} is called {name!r}"
        message += f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        message += f" Available: {', '.join(names) or 'none'}; "
        message += f"packages announce others in the entry-point group {self.group!r}."
        allowed = plugins.allowed_distributions()
        if allowed is not None:
            message += f" {plugins.ENVIRONMENT} limits plug-ins to: {', '.join(sorted(allowed)) or 'none'}."
        return UnknownNameError(message)


class Registry(NameRegistry[type[T]], Generic[T]):
    """Implementations of one interface by name.

    Args:
        base: ``module:attribute`` of the class that every implementation must derive from.
        group, builtin, reserved, discover: see ``NameRegistry``.

    Example:
        >>> STORES = Registry("store", group="mplus.stores", base="mplus.stores.base:MemoryStore")
        >>> STORES.register("mine", "my_package:MyStore")
    """

    def __init__(
        self,
        kind: str,
        *,
        base: str,
        group: str,
        builtin: Mapping[str, str | type[T]] | None = None,
        reserved: Collection[str] = (),
        discover: Callable[[str], list[plugins.Plugin]] = plugins.discover,
    ) -> None:
        super().__init__(kind, group=group, builtin=builtin, reserved=reserved, discover=discover)
        self._base = base

    def build(self, component: Component, *arguments: object) -> T:
        """Make an instance of the implementation that ``component`` names, of ``arguments`` and its options.

        Raises as ``get``; ConfigError where an option breaks its rule.
        """
        implementation = cast(Any, self.get(component.name))
        built: T = implementation(*arguments, options_of(implementation, component.options))
        return built

    def _check(self, name: str, claim: _Claim, found: object) -> type[T]:
        base = cast("type[T]", _loader(self._base)())
        if not (isinstance(found, type) and issubclass(found, base)):
            raise PluginError(
                f"{self.kind} {name!r} of {claim.origin} must be a subclass of {_describe(base)}, "
                f"got {_describe(found)}"
            )
        if inspect.isabstract(found):
            missing = ", ".join(sorted(cast(Any, found).__abstractmethods__))
            raise PluginError(f"{self.kind} {name!r} of {claim.origin} leaves abstract methods undefined: {missing}")
        return found


class FileRegistry(NameRegistry[Path]):
    """Files by name; a package announces a ``pathlib.Path`` of its own.

    Example:
        >>> RECIPES = FileRegistry("recipe", group="mplus.recipes")
        >>> RECIPES.register("mine", Path("mine.toml"))
    """

    def _check(self, name: str, claim: _Claim, found: object) -> Path:
        if not isinstance(found, Path):
            raise PluginError(
                f"{self.kind} {name!r} of {claim.origin} must be the pathlib.Path of a file, got {_describe(found)}"
            )
        if not found.is_file():
            raise PluginError(f"{self.kind} {name!r} of {claim.origin} must be a file that exists, got {str(found)!r}")
        return found


def _loader(target: Target) -> Callable[[], object]:
    """Return a function that imports ``module:attribute``, or gives any other target."""
    if not isinstance(target, str):
        return lambda: target

    def load() -> object:
        module, _, attribute = target.partition(":")
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found

    return load


def _shown(target: Target) -> str:
    if isinstance(target, Path):
        return target.name
    return target if isinstance(target, str) else _describe(target)


def _describe(thing: object) -> str:
    if isinstance(thing, type):
        return f"{thing.__module__}:{thing.__qualname__}"
    return f"{thing!r} of type {type(thing).__name__}"


def lazy_exports(
    package: str, where: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that imports a name when it is first asked for.

    So one import says everything that a plug-in needs, and the package itself stays light.

    Args:
        package: name of the package that exports.
        where: by module, the names that are defined there.

    Example:
        >>> __getattr__, __dir__ = lazy_exports("zoo", {"math": ("sqrt",)})
        >>> __getattr__("sqrt")(9.0)
        3.0
    """
    modules = {name: module for module, names in where.items() for name in names}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return find, names
