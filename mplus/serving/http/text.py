"""Text of tokens as they come: in pieces that never change again, and up to the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from attrs import define, field

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that may wait for a character to be complete; in UTF-8 one has at most 4 bytes, a token each."""


@define
class IncrementalText:
    """Turns the tokens of one answer into text piece by piece, in constant time for each.

    A window of a few tokens is decoded, not the whole answer. What ends inside a character of several tokens waits for
    the rest of it.

    Example:
        >>> text = IncrementalText(tokenizer.decode, special={1, 2})
        >>> "".join(map(text.add, ids)) + text.end() == tokenizer.decode(ids, skip_special_tokens=True)
        True

    Attributes:
        decode: turns ids into text.
        special: ids that are no text, such as the end token.
    """

    decode: Callable[[list[int]], str]
    special: Collection[int] = ()
    # The window: ids the text of which is known, as some decoders look back at one token; behind ``_done`` new ones.
    _window: list[int] = field(factory=list, init=False)
    _done: int = field(default=0, init=False)
    _known: str = field(default="", init=False)

    def add(self, token: int) -> str:
        """Return the text that a token completes; "" where it completes none."""
        if token in self.special:
            return ""
        self._window.append(token)
        text = self.decode(self._window)
        if text.endswith(UNFINISHED) and len(self._window) - self._done < LONGEST_CHARACTER:
            return ""
        return self._take(text)

    def end(self) -> str:
        """Return what still waited, at the end of the answer."""
        return self._take(self.decode(self._window)) if len(self._window) > self._done else ""

    def _take(self, text: str) -> str:
        new = self._window[self._done :]
        # Bytes that are no character make some decoders change their mind about characters before them.
        piece = text[len(self._known) :] if text.startswith(self._known) else self.decode(new)
        self._window, self._done, self._known = new, len(new), self.decode(new)
        return piece


@define
class StopStrings:
    """Ends a text before that of several strings which is complete first; the text may come in any pieces.

    The beginning of a stop string at the end of the text is held back until it is known what it becomes.

    Attributes:
        stops: the strings.
        stopped: one of them came.
    """

    stops: Sequence[str] = ()
    stopped: bool = False
    _held: str = ""

    def add(self, piece: str) -> str:
        """Return what may be said of the text so far, ``piece`` included."""
        if not self.stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        # The one that is complete first, wherever others begin: so the pieces in which a text comes change nothing.
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        # The longest end of the text with which a stop string begins: no more than all of the text, less than the stop.
        begun = (stop[:size] for stop in self.stops for size in range(1, min(len(stop), len(text) + 1)))
        size = max((len(begin) for begin in begun if text.endswith(begin)), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def end(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
