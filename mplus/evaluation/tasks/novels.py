"""Novels as something to tell facts among: their paragraphs, and passages of a given length."""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mplus.errors import InputError
from mplus.evaluation.texts import Texts, read

INDEX = "INDEX.tsv"


def novel_paragraphs(path: Path, split: str) -> list[list[str]]:
    """Return the paragraphs of every novel. Raises InputError when there is none, or one cannot be read."""
    files = sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")]) if path.is_dir() else [path]
    index = path / INDEX
    if path.is_dir() and index.exists() and split != "all":
        rows = csv.DictReader(io.StringIO(read(index)), delimiter="\t")
        wanted = {row["file"] for row in rows if row.get("split") == split}
        files = [file for file in files if file.name in wanted]
    novels = []
    for file in files:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", read(file))]
        novels.append([part for part in paragraphs if part])
    if not any(novels):
        raise InputError(f"{path} must be a novel, or a folder of novels of the {split} part, with text in them")
    return [novel for novel in novels if novel]


def book_passages(texts: Texts, novels: Sequence[Sequence[str]], limit: int, rng: random.Random) -> Iterator[str]:
    """Yield passages of ``limit`` tokens of one novel from some place on, and of further ones after its end."""

    def paragraphs() -> Iterator[str]:
        novel = rng.choice(novels)
        yield from novel[rng.randrange(len(novel)) :]
        while True:
            yield from rng.choice(novels)

    return texts.join(paragraphs(), limit)


def haystack(
    texts: Texts, novels: Sequence[Sequence[str]], tokens: int, limit: int, rng: random.Random
) -> Iterator[str]:
    """Yield passages of at most ``limit`` tokens that have ``tokens`` together, the last one cut."""
    for text in book_passages(texts, novels, limit, rng):
        cut = texts.cut(text, tokens)
        if not cut:
            return
        yield cut
        tokens -= texts.count(cut)
