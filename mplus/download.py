"""Downloads into the user's cache folder: found in a package index, checked by digest, continued where cut."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen
from urllib.response import addinfourl

from attrs import define
from filelock import FileLock

from mplus.errors import DownloadError

PYPI = "https://pypi.org/simple"
TIMEOUT = 60
"""Seconds without an answer after which a server counts as not there."""
PIECE = 1 << 18
"""Bytes read at a time."""

Progress = Callable[[int], object]
"""Called with the bytes that are there so far."""


@define(frozen=True)
class IndexFile:
    """A file of a package index, pinned.

    Attributes:
        project: name of the project, normalised.
        filename: of the wheel or archive.
        sha256: digest of the whole file, in hexadecimal.
        size: bytes.
    """

    project: str
    filename: str
    sha256: str
    size: int


def cache_folder() -> Path:
    """Return the folder for what is downloaded: ``MPLUS_CACHE``, else ``mplus`` in the user's cache folder."""
    if given := os.environ.get("MPLUS_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mplus"


def index_urls() -> list[str]:
    """Return the package indexes to ask: those that pip or uv would ask by their settings, and PyPI last."""
    named = [os.environ.get(name, "") for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")]
    named += [_pip_setting("global.index-url"), _pip_setting("global.extra-index-url"), PYPI]
    urls = [url.rstrip("/") for several in named for url in several.split()]
    return list(dict.fromkeys(urls))


def _pip_setting(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return done.stdout.strip() if done.returncode == 0 else ""


def fetch(file: IndexFile, folder: Path, progress: Progress | None = None) -> Path:
    """Bring a file of a package index into ``folder``, unless it is there, and return its path.

    What a cut download left is continued. Only a file with the right digest gets its name.

    Args:
        file: what to bring.
        folder: is made where it is missing.
        progress: is told the bytes that are there, after every piece.

    Raises:
        DownloadError: no index has the file, the network fails, or what came has another digest.

    Example:
        >>> from mplus.download import IndexFile, cache_folder
        >>> file = IndexFile("wheel", "wheel-0.45.1-py3-none-any.whl", "708e7481...", 72494)
        >>> path = fetch(file, cache_folder())  # doctest: +SKIP
    """
    path = folder / file.filename
    if path.exists() and _digest(path) != file.sha256:
        path.unlink()  # damaged since
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{file.filename}.lock"):  # two processes would append to one file
        return path if path.exists() else _fetch(file, path, progress)


def _fetch(file: IndexFile, path: Path, progress: Progress | None) -> Path:
    part = path.with_name(f"{file.filename}.{file.sha256[:16]}.part")
    refused = []
    for index in index_urls():
        try:
            _append(_find(file, index), part, file.size, progress)
            break
        except (DownloadError, OSError) as error:  # the next index may have it
            refused.append(f"{_without_password(index)}: {error}")
    else:
        raise DownloadError(f"{file.filename} could not be downloaded ({'; '.join(refused)})")
    found = _digest(part)
    if found != file.sha256:
        part.unlink()
        raise DownloadError(
            f"{file.filename} was damaged on its way: its SHA-256 must be {file.sha256}, got {found}; what came was "
            "deleted, so try again"
        )
    part.replace(path)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _find(file: IndexFile, index: str) -> str:
    """Return the address of a file by an index's page for the project (simple repository API, PEP 503 and 691)."""
    page = f"{index}/{re.sub(r'[-_.]+', '-', file.project).lower()}/"
    accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    with _open(page, {"Accept": accept}) as answer:
        text = answer.read().decode("utf-8")
        if "json" in (answer.headers.get_content_type() or ""):
            try:
                addresses = {entry["filename"]: entry["url"] for entry in json.loads(text)["files"]}
            except (ValueError, KeyError, TypeError) as error:
                raise DownloadError(f"{_without_password(page)} is no page of a package index: {error!r}") from error
        else:
            links = _Links()
            links.feed(text)
            addresses = {Path(urlsplit(link).path).name: link for link in links.found}
    if file.filename not in addresses:
        raise DownloadError(f"{_without_password(page)} has no {file.filename}")
    address: str = addresses[file.filename]
    return urljoin(page, address)


class _Links(HTMLParser):
    """Collects the targets of links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _append(url: str, part: Path, size: int, progress: Progress | None) -> None:
    """Bring what ``part`` lacks of ``size`` bytes."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:  # of another file, or written twice
        part.unlink()
        have = 0
    if have == size:
        return
    with _open(url, {"Range": f"bytes={have}-"} if have else {}) as answer:
        # A server that knows no ranges answers 200 and sends everything.
        goes_on = have and answer.status == 206
        have = have if goes_on else 0
        with part.open("ab" if goes_on else "wb") as opened:
            while piece := answer.read(PIECE):
                opened.write(piece)
                have += len(piece)
                if progress is not None:
                    progress(have)
    if have < size:
        raise DownloadError(f"the connection was cut after {have:,} of {size:,} bytes; the next try goes on from there")


@contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[addinfourl]:
    if urlsplit(url).scheme not in {"http", "https", "file"}:
        raise DownloadError(f"an address must begin with http:, https: or file:, got {url!r}")
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer:  # noqa: S310 - checked above
            yield answer
    except URLError as error:
        raise DownloadError(str(error.reason)) from error
    except HTTPException as error:  # cut in the middle of an answer whose length was known
        raise DownloadError(f"the connection was cut ({error!r}); the next try goes on from there") from error
