"""CopyingBatches: words without meaning are noted in running text, and are to be said again later."""

from __future__ import annotations

from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.errors import ConfigError
from mplus.facts.language import FIRST_NAMES, LAST_NAMES, VALUES
from mplus.training.batch import TextSample
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.generated.base import GeneratedBatches, GeneratedOptions
from mplus.training.data.options import as_span, span
from mplus.training.data.tokens import encode

WORDS = sorted({*FIRST_NAMES, *LAST_NAMES, *(word for some in VALUES.values() for word in some)})

NOTE, REPEAT = "Note:", "Repeat:"


@define(frozen=True, kw_only=True)
class CopyingOptions(GeneratedOptions):
    """Options of ``GeneratedOptions`` and these.

    Attributes:
        words: in a note; one number or a pair ``[least, most]``.
        cue_words: first words of a note by which it is asked for.
    """

    words: tuple[int, int] = field(default=(6, 12), converter=as_span, validator=span(2))
    cue_words: int = field(default=3, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.cue_words >= self.words[0]:
            raise ConfigError(
                f"cue_words must be below the least number of words ({self.words[0]}), got {self.cue_words}"
            )


class CopyingBatches(GeneratedBatches):
    """``Note: WORDS.`` tells, ``Repeat: FIRST WORDS`` asks for the rest; words are drawn anew for every chunk."""

    Options = CopyingOptions
    kind = 1
    options: CopyingOptions

    def note(self, stream: int, place: int) -> list[str]:
        """Return the words noted in a chunk."""
        draws = CounterRNG(self._seed, "words", stream, place)
        return [WORDS[draws.below(len(WORDS))] for _ in range(draws.between(*self.options.words))]

    def tell(self, stream: int, place: int) -> Tensor:
        return encode(self._tokenizer, f"{NOTE} {' '.join(self.note(stream, place))}.")

    def ask(self, stream: int, place: int, source: int, draws: CounterRNG) -> TextSample:
        return self._text(self.note(stream, place), source)

    def longest(self) -> tuple[int, int]:
        word = max(WORDS, key=lambda word: len(encode(self._tokenizer, f"{NOTE} {word}")))
        most = [word] * self.options.words[1]
        return len(encode(self._tokenizer, f"{NOTE} {' '.join(most)}.")), len(self._text(most, 0).ids)

    def _text(self, note: list[str], source: int) -> TextSample:
        cue = f"{REPEAT} {' '.join(note[: self.options.cue_words])}"
        ids = encode(self._tokenizer, f"{REPEAT} {' '.join(note)}.")
        given = shared(ids, encode(self._tokenizer, cue))
        return TextSample(ids, source=source, prompt_tokens=given, query_tokens=given, answer=(given, len(ids)))


def shared(first: Tensor, second: Tensor) -> int:
    """Return the number of ids with which two texts ``[n]`` begin alike."""
    count = min(len(first), len(second))
    different = (first[:count] != second[:count]).nonzero()
    return int(different[0]) if len(different) else count
