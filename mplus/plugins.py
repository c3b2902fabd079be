"""Third-party implementations: the only module that reads entry points.

The package ``entrypoints`` says what a line means and loads what it names. Its walk over the installed distributions is
not used: one malformed file, or a ``%`` in a value, ends it for everybody, and it takes ``a-b`` and ``a-c`` for one
distribution. Here every distribution is found by its own name and every line is read alone, so that a broken
plug-in harms nobody else and is listed with its error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import entrypoints
from attrs import define, field

ENVIRONMENT = "MPLUS_PLUGINS"
"""Environment variable that limits discovery to the distributions it names, comma separated; empty: none."""


@define(frozen=True)
class Plugin:
    """One line of one distribution's entry points.

    Attributes:
        group, name: the entry point group and the name claimed in it.
        distribution, version: the installed distribution the line comes from.
        target: what the line names, ``module:attribute`` where it could be read.
        error: why the line or its file cannot be used, or None. Nothing has been imported to find out.
    """

    group: str
    name: str
    distribution: str
    version: str
    target: str
    error: str | None = None
    _entry: entrypoints.EntryPoint | None = field(default=None, eq=False, repr=False)

    @property
    def origin(self) -> str:
        """Distribution, version and target in words."""
        return f"{self.distribution} {self.version} ({self.target})"

    def load(self) -> object:
        """Import what the line names.

        Raises:
            ValueError: the line could not be read; the message is ``error``.
            Exception: whatever the plug-in raises while it is imported.
        """
        if self._entry is None:
            raise ValueError(self.error)
        return self._entry.load()


@define(frozen=True)
class _Distribution:
    """Where one installed distribution keeps its entry points."""

    name: str
    version: str
    file: Path


def discover(group: str, path: Sequence[str] | None = None) -> list[Plugin]:
    """Return every entry point of ``group`` in the installed distributions, in the order of ``path``, then by name.

    A distribution hides another of the same name further along the path, as it does when imported. Two entry points
    of one name are both listed. Lines that cannot be read are listed with their error; nothing is imported.

    Args:
        group: entry point group, for example ``mplus.retrievers``.
        path: folders to look in; ``sys.path`` when None.
    """
    allowed = allowed_distributions()
    found: list[Plugin] = []
    for distribution in _distributions(sys.path if path is None else path):
        if allowed is None or normalize(distribution.name) in allowed:
            found.extend(_read(distribution, group))
    # An interrupted upgrade leaves one distribution twice in a folder: what it says twice counts once.
    once = {(normalize(plugin.distribution), plugin.name, plugin.target): plugin for plugin in reversed(found)}
    return list(reversed(once.values()))


def allowed_distributions() -> set[str] | None:
    """Return the normalized names in ``MPLUS_PLUGINS``; None where it is not set and every plug-in is allowed."""
    value = os.environ.get(ENVIRONMENT)
    if value is None:
        return None
    return {normalize(name) for name in value.split(",") if name.strip()}


def normalize(name: str) -> str:
    """Return a distribution name in the form in which names are compared: ``Foo_Bar`` and ``foo-bar`` are one."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _distributions(path: Iterable[str]) -> Iterator[_Distribution]:
    """Yield installed distributions that have entry points; the first folder that has a name hides later ones."""
    hidden: set[str] = set()
    for folder in path:
        here = sorted(Path(folder).glob("*.*-info/entry_points.txt"))
        names: set[str] = set()
        for file in here:
            if file.parent.suffix not in {".dist-info", ".egg-info"}:
                continue
            name, version = _identity(file.parent)
            names.add(normalize(name))
            if normalize(name) not in hidden:
                yield _Distribution(name, version, file)
        hidden |= names


def _identity(info: Path) -> tuple[str, str]:
    """Return name and version of a distribution from its metadata, or else from the name of its folder."""
    header: dict[str, str] = {}
    for metadata in ("METADATA", "PKG-INFO"):
        try:
            text = (info / metadata).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
        header = {key.lower(): value.strip() for key, _, value in fields}
        break
    folder = re.fullmatch(r"(.+?)(?:-(\d.*?))?(?:-py\d.*)?", info.stem)
    name, version = (folder[1], folder[2]) if folder else (info.stem, None)
    return header.get("name") or name, header.get("version") or version or "(unknown version)"


def _read(distribution: _Distribution, group: str) -> Iterator[Plugin]:
    """Yield the entry points one distribution has in ``group``."""
    try:
        text = distribution.file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        message = f"{distribution.file} cannot be read: {error}"
        yield Plugin(group, "?", distribution.name, distribution.version, "unreadable", message)
        return
    for name, value in sorted(_lines(text, group)):
        yield _parse(distribution, group, name, value)


def _lines(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Yield ``(name, value)`` of each line in the sections called ``group``; value "" where a line has no ``=``."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif section == group and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def _parse(distribution: _Distribution, group: str, name: str, value: str) -> Plugin:
    """Parse one entry point; ``entrypoints`` decides what its value means."""
    error = None
    entry = None
    try:
        # Packaging tools accept "module : attribute", entrypoints does not.
        entry = entrypoints.EntryPoint.from_string(re.sub(r"\s*:\s*", ":", value, count=1), name)
    except entrypoints.BadEntryPoint:
        error = f"{distribution.file} has the line {f'{name} = {value}'!r}, which must read name = module:attribute"
    if entry is not None:
        value = entry.module_name + (f":{entry.object_name}" if entry.object_name else "")
    return Plugin(group, name, distribution.name, distribution.version, value, error, entry)
