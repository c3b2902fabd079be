"""Makes the packages in this folder known by name, as if they were installed, to the tests beside them."""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from tests.conftest import (  # noqa: F401 - threads, modes and clock as in all other tests
    _cache_of_its_own,
    _proved_once,
    _stays_frozen,
    _time_stands_still,
    pytest_collection,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_unconfigure,
)

PACKAGES = sorted(path.parent for path in Path(__file__).parent.glob("*/pyproject.toml"))


def pytest_configure(config: pytest.Config) -> None:
    """Put the sources on the path, here and in programs that a test starts, and in front what announces them."""
    site = tempfile.TemporaryDirectory(prefix="mplus-plugins-")
    config.add_cleanup(site.cleanup)
    for package in PACKAGES:
        _announce(package, Path(site.name))
    paths = [site.name, *(str(package / "src") for package in PACKAGES), str(Path(__file__).parents[1])]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def _announce(package: Path, site: Path) -> None:
    """Write what an installation of ``package`` leaves in ``site``: its name, its version and its entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines: list[str] = []
    for group, claims in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{claim} = {target}" for claim, target in claims.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
