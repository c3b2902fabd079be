"""open_documents: documents from text files, JSONL, gz, folders, Hugging Face datasets and what comes with mplus."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mplus.errors import ConfigError, InputError
from mplus.training.data.documents import SHIPPED, Document, DocumentList, DocumentOptions, Documents, text_of

SUFFIXES = {".txt": "text", ".jsonl": "jsonl"}
"""Endings, also with ``.gz`` behind, of the files taken from a folder."""


def open_documents(options: DocumentOptions) -> Documents:
    """Return the documents that ``options`` name. Files are read whole; datasets as the package ``datasets`` does it.

    Raises:
        ConfigError: a path that names nothing, or a file whose format is not known.
        InputError: a file that cannot be read as what it is, a record without text, or no document at all.
        MissingDependencyError: a dataset, and ``datasets`` is not installed.
    """
    if options.dataset is not None:
        from mplus.training.data.hugging_face import open_dataset

        found = open_dataset(options)
    else:
        found = DocumentList(_read_files(options))
    if found.count == 0:
        raise InputError(f"the data set is empty: no document in {options.dataset or ', '.join(options.paths)}")
    return found


def _read_files(options: DocumentOptions) -> list[Document]:
    files = [SHIPPED[options.shipped]] if options.shipped else find_files(options.paths, options.format)
    found: list[Document] = []
    for file in files:
        kind = options.format if options.format != "auto" else _format(file)
        found.extend(_jsonl(file, options.text_field) if kind == "jsonl" else _texts(file, options.separator))
        if options.limit is not None and len(found) >= options.limit:
            return found[: options.limit]
    return found


def find_files(paths: Sequence[str], format: str = "auto") -> list[Path]:  # noqa: A002 - the name of the option
    """Return the files that ``paths`` name, in this order, sorted within a folder or pattern, each once.

    Raises:
        ConfigError: a path names nothing, or under "auto" a file of no known ending is named.
    """
    found: dict[Path, None] = {}
    for path in paths:
        given = Path(path).expanduser()
        if given.is_dir():
            files = sorted(file for file in given.rglob("*") if file.is_file() and _format(file) is not None)
        elif given.is_file():
            files = [given]
        else:
            # Path.glob takes relative patterns only.
            root = Path(given.anchor)
            matching = root.glob(str(given.relative_to(root) if given.anchor else given))
            files = sorted(file for file in matching if file.is_file())
        if not files:
            raise ConfigError(f"paths must name files that exist, and {path!r} names none")
        for file in files:
            if format == "auto" and _format(file) is None:
                raise ConfigError(
                    f"format must be 'text' or 'jsonl' for a file that ends in neither {' nor '.join(SUFFIXES)} "
                    f"(nor with .gz behind), as {str(file)!r}"
                )
            found[file] = None
    return list(found)


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _content(file: Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be UTF-8, got byte {error.object[error.start]:#x} at {error.start}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} must be a whole gzip file: {error}") from error
    return content.replace("\r\n", "\n")


def _texts(file: Path, separator: str | None) -> Iterator[Document]:
    content = _content(file)
    if separator is None:
        yield Document(str(file), content)
        return
    for number, part in enumerate(content.split(separator), 1):
        yield Document(f"{file}:{number}", part.strip())


def _jsonl(file: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_content(file).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}:{number} must be one JSON object: {error}") from error
            yield Document(f"{file}:{number}", text_of(record, text_field, f"{file}:{number}"))
