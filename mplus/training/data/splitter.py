"""From one document to contexts, which are written, and the target that follows them."""

from __future__ import annotations

from attrs import define, field
from torch import Tensor

from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.options import as_span, span


@define(frozen=True, kw_only=True)
class SplitRules:
    """Lengths in tokens, each ``(least, most)`` or one number.

    Attributes:
        chunk_tokens: of a context (published: 16 to 512; 384 to 512 for long documents). One number makes all equal.
        target_tokens: of the target (published: 16 to 2,048).
    """

    chunk_tokens: tuple[int, int] = field(default=(16, 512), converter=as_span, validator=span(1))
    target_tokens: tuple[int, int] = field(default=(16, 2048), converter=as_span, validator=span(1))

    @property
    def needed(self) -> int:
        """Tokens of the shortest document that can be split."""
        return self.chunk_tokens[0] + self.target_tokens[0]


@define(frozen=True, eq=False)
class Split:
    """A document's contexts, ``[n]`` each and adjacent, the target that follows them, and what was left out in front.

    ``skipped + contexts + target`` is the document.
    """

    contexts: list[Tensor]
    target: Tensor
    skipped: Tensor


def split_document(ids: Tensor, rules: SplitRules, draws: CounterRNG) -> Split | None:
    """Split ``[m]`` ids as the released code does, but with every chunk within its bounds; None: too short.

    The target comes from the end. It is at most one chunk long, as a context is, in a document that is no longer
    than the longest target, and else of any length allowed. What precedes it is cut into contexts by ``cut``.

    Different from the released code: a document that fits into one chunk is split too; no context is shorter than the
    minimum, instead of which the fewest possible tokens in front are left out; the few documents of up to a shortest
    chunk more than the longest target follow the general rule.
    """
    if len(ids) < rules.needed:
        return None
    (shortest, chunk), (least, most) = rules.chunk_tokens, rules.target_tokens
    if len(ids) < most + shortest:
        most = max(least, min(chunk, most))
    target = draws.between(least, min(most, len(ids) - shortest))
    before = ids[: len(ids) - target]
    contexts = cut(before, shortest, chunk, draws)
    skipped = len(before) - sum(map(len, contexts))
    return Split(contexts, ids[len(before) :], before[:skipped])


def cut(ids: Tensor, least: int, most: int, draws: CounterRNG) -> list[Tensor]:
    """Cut ``[m]`` ids into adjacent pieces of ``least`` to ``most`` tokens that reach to the end, in order.

    Each length but the last is uniform over those that leave a rest that can be cut. Tokens are left out in front
    only where no such pieces give the sum, and then as few as possible; all of them where ``m < least``.
    """
    place = len(ids) - longest_sum(len(ids), least, most)
    pieces = []
    while (rest := len(ids) - place) > 0:
        length = rest
        if rest > most:
            lengths = [n for n in range(least, most + 1) if longest_sum(rest - n, least, most) == rest - n]
            length = lengths[draws.below(len(lengths))]
        pieces.append(ids[place : place + length])
        place += length
    return pieces


def longest_sum(tokens: int, least: int, most: int) -> int:
    """Return the most tokens, up to ``tokens``, that pieces of ``least`` to ``most`` tokens can make up."""
    return min(tokens, tokens // least * most)
