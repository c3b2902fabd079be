"""Tokens of a piece of text that stands inside another one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, inside: bool) -> list[int]:
    """Return the tokens of a piece of text, without special ones.

    Args:
        tokenizer: of the text.
        text: any.
        inside: it stands behind other text, so that no space is put in front of it, as some tokenizers do.
    """
    if not text:
        return []
    pieces = [ANCHOR, ANCHOR + text] if inside else [text]
    *before, found = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    if not before:
        return list(found)
    (anchor,) = before
    if found[: len(anchor)] != anchor:  # it joins with what follows
        return encoded(tokenizer, text, inside=False)
    return list(found[len(anchor) :])


ANCHOR = "\n"
"""Stands in front of a piece of text while it is turned into tokens."""
