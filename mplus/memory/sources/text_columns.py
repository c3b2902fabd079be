"""Columns of texts: UTF-8, one text behind the other, and how many bytes each has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mplus.errors import MemoryMismatchError


def bytes_of(data: bytes) -> Tensor:
    """Return bytes as a tensor ``[n]`` uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def coded(texts: Iterable[str | None]) -> tuple[Tensor, Tensor]:
    """Return UTF-8 ``[bytes]``, one behind the other, and lengths ``[n]``; a lone surrogate is kept as it is."""
    found = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = torch.tensor([-1 if text is None else len(text) for text in found], dtype=torch.int64)
    return bytes_of(b"".join(text for text in found if text)), lengths


def texts_in(text: Tensor, lengths: Tensor) -> list[str | None]:
    """Return the texts that ``coded`` was given."""
    whole, found, at = _raw(text), list[str | None](), 0
    for length in lengths.tolist():
        found.append(None if length < 0 else whole[at : at + length].decode("utf-8", "surrogatepass"))
        at += max(length, 0)
    return found


def check_texts(name: str, text: Tensor, lengths: Tensor) -> None:
    """Raise MemoryMismatchError, which calls them ``name``, unless ``texts_in`` can read these columns.

    Single texts are not decoded: all are UTF-8 if the whole is and none begins within a character.
    """
    if bool((lengths < -1).any()) or bool((lengths > len(text)).any()) or int(lengths.clamp(min=0).sum()) != len(text):
        raise MemoryMismatchError(f"{name}_length must add up to {len(text)} bytes")
    try:
        _raw(text).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise MemoryMismatchError(f"{name} must be UTF-8: {error}") from error
    begins = lengths.clamp(min=0).cumsum(0) - lengths.clamp(min=0)
    begins = begins[lengths > 0]
    if bool((text[begins] & 0xC0 == 0x80).any()):
        raise MemoryMismatchError(f"{name}_length must not divide characters")


def _raw(text: Tensor) -> bytes:
    return bytes(text.contiguous().numpy())
