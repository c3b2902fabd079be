"""A tokenizer of single characters, so that tests can read ids, and small documents made of it."""

from __future__ import annotations

from typing import Any

import torch

from mplus.training.data.documents import Document, DocumentList, Documents


class Letters:
    """One id per character: its code point. Counts what it encodes."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.encoded.append(text)
        return {"input_ids": [ord(letter) for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(32, 127)}

    @staticmethod
    def text(ids: Any) -> str:
        return "".join(chr(code) for code in torch.as_tensor(ids).flatten().tolist())


def story(number: int, length: int) -> str:
    """``length`` characters that say where they are: every text and every place in it differs."""
    parts = "".join(f"{number}.{place};" for place in range(length))
    return parts[:length]


def library(*lengths: int) -> DocumentList:
    """Documents of these lengths."""
    return DocumentList([Document(f"story {n}", story(n, length)) for n, length in enumerate(lengths)])


class Stream(Documents):
    """Documents that come one after the other, and how many of them were read."""

    def __init__(self, documents: DocumentList) -> None:
        self.documents = documents
        self.count = None
        self.read = 0

    def iterate(self, start: int = 0):
        for document in self.documents.iterate(start):
            self.read += 1
            yield document
