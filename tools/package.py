"""Build the sdist and the wheel into dist/, and try the wheel in an environment that holds only what it declares.

    python -m tools.package

Nothing is downloaded. The environment is new; of the packages installed here it gets links to those that the wheel
requires, and to those that these require: an import that no requirement stands for fails there as it would for a user.
The programs that are tried run outside of the checkout. The last word is "ok", or the program exits with what is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
LEFT_OUT = (".ci/", "benchmarks/nightly/")
"""What is tracked and not in the sdist (pyproject.toml)."""
DATA = ("py.typed", "data/recall-tiny/model.safetensors", "data/stories260K/model.safetensors")
"""Some of what is in the package and is no Python, by name, so that a list of files that are all missing is noticed."""


def main() -> None:
    """Build both, compare their content with the tracked files, install the wheel and run it."""
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, wheel = build(ROOT, DIST, "sdist"), build(ROOT, DIST, "wheel")
    with tempfile.TemporaryDirectory(prefix="mplus-package-") as name:
        folder = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = folder / sdist.name.removesuffix(".tar.gz")
        check_content(source, wheel)
        check_rebuilt(source, wheel, folder / "rebuilt")
        environment = install(wheel, folder / "environment")
        (folder / "elsewhere").mkdir()
        try_out(environment, source, folder / "elsewhere", metadata(wheel)["Version"])
    print(f"{sdist.relative_to(ROOT)}, {wheel.relative_to(ROOT)}: ok")


def build(source: Path, out: Path, target: str) -> Path:
    """Build the target "sdist" or "wheel" of the project in ``source`` into ``out``; return the new file."""
    known = set(out.glob("*"))
    run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)], cwd=source)
    (made,) = set(out.glob("*")) - known
    return made


def check_content(source: Path, wheel: Path) -> None:
    """The sdist holds every file of the project and the wheel every file of the package, and neither holds another."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\0")
    project = {name for name in listed if name and (ROOT / name).is_file()}
    shipped = {name for name in project if not name.startswith(LEFT_OUT)}
    compare("the sdist", files(source) - {"PKG-INFO"}, shipped)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in project if name.startswith("mplus/")}
    compare("the wheel", packed, package)
    missing = {f"mplus/{name}" for name in DATA} - package
    expect(
        not missing, f"the package must hold {sorted(missing)}: were they moved? Then change DATA in tools/package.py"
    )


def check_rebuilt(source: Path, wheel: Path, out: Path) -> None:
    """The wheel made from the unpacked sdist is the wheel made from the checkout, byte for byte."""
    again = build(source, out, "wheel")
    same = again.name == wheel.name and again.read_bytes() == wheel.read_bytes()
    expect(same, f"the wheel made from the sdist must equal {wheel.name} made from the checkout, but differs")


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment with links to what it requires; return the folder of its programs."""
    venv.create(folder, symlinks=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(programs / "python")
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    for one in required(metadata(wheel).get_all("Requires-Dist") or []):
        link(one, site)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)])
    run([*pip, "check"])
    return programs


def required(requirements: Iterable[str]) -> list[Distribution]:
    """Return the distributions installed here that the requirements name, and those that these require."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in requirement.extras or {""}:
            if (requirement.name, wanted) in seen:
                continue
            seen.add((requirement.name, wanted))
            try:
                found[requirement.name] = distribution(requirement.name)
            except PackageNotFoundError as error:
                raise SystemExit(f"{requirement} is required, but is not installed here: install it") from error
            waiting += [(Requirement(text), wanted) for text in found[requirement.name].requires or []]
    return list(found.values())


def link(package: Distribution, site: Path) -> None:
    """Link the folders and modules of an installed distribution into another site-packages."""
    for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
        place = site / name
        if not place.exists():
            place.symlink_to(Path(str(package.locate_file(name))))


def try_out(programs: Path, source: Path, folder: Path, version: str) -> None:
    """Run the command and the README's program (examples/quickstart.py of the sdist) in ``folder``."""
    command, python = str(programs / "mplus"), str(programs / "python")
    place = run([python, "-c", "import mplus; print(mplus.__file__)"], cwd=folder).strip()
    expect(Path(place).is_relative_to(programs.parent), f"mplus must come from the wheel, came from {place}")
    said = run([command, "--version"], cwd=folder).strip()
    expect(said == version, f"mplus --version must print {version}, the wheel's version, printed {said}")
    expect(version in run([command, "info"], cwd=folder), "mplus info must name the version")
    expect("recall-tiny" in run([command, "train", "--list"], cwd=folder), "mplus train --list must list the recipes")
    story = run([python, str(source / "examples" / "quickstart.py")], cwd=folder)
    expect(story.startswith("One day, Lily"), f"examples/quickstart.py must go on with its prompt, printed {story!r}")


def run(command: list[str], cwd: Path | None = None) -> str:
    """Return what a program printed, run without the paths that lead Python to this checkout."""
    around = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        command, cwd=cwd, env={**around, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    expect(done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def metadata(wheel: Path) -> Message:
    """Return the core metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def files(folder: Path) -> set[str]:
    """Return the paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def compare(what: str, got: set[str], wanted: set[str]) -> None:
    """Exit where two sets of paths differ."""
    lines = [*(f"  + {name}" for name in sorted(got - wanted)), *(f"  - {name}" for name in sorted(wanted - got))]
    expect(not lines, "\n".join([f"{what} must hold the project's files, but has more (+) or lacks some (-):", *lines]))


def expect(holds: bool, otherwise: str) -> None:
    """Exit with a message where something does not hold."""
    if not holds:
        raise SystemExit(f"tools.package: {otherwise}")


if __name__ == "__main__":
    main()
