"""Ways of greedy decoding that are not those of ``generate``: among choices, and with late stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import define, field
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from mplus.hf.text.encoding import encoded
from mplus.hf.types import DecoderOutput
from mplus.mechanisms.text.stopping import LateStopping


@define(eq=False, repr=False)
class Trie:
    """Choices as rows of tokens that may have beginnings in common.

    Attributes:
        choice: that ends here; None: none.
        next: what follows, by token.
    """

    choice: str | None = None
    next: dict[int, Trie] = field(factory=dict)

    @staticmethod
    def of(choices: Sequence[tuple[str, Sequence[int]]]) -> Trie:
        """Return the trie of choices, each with its tokens; of several with the same ones the first counts."""
        root = Trie()
        for choice, ids in choices:
            node = root
            for token in ids:
                node = node.next.setdefault(token, Trie())
            if node.choice is None:
                node.choice = choice
        return root


@define(eq=False)
class Steps:
    """Logits of what follows a text that grows token by token, with the decoder's cache where it gives one.

    Attributes:
        forward: of the decoder alone.
    """

    forward: Callable[..., DecoderOutput]
    _cache: Cache | None = field(default=None, init=False)
    _seen: int = field(default=0, init=False)

    def logits(self, ids: Tensor) -> Tensor:
        """Return ``[V]``, the logits behind ids ``[1, T]`` that go on from those of the step before."""
        given = {} if self._cache is None else {"past_key_values": self._cache}
        output = self.forward(input_ids=ids[:, self._seen :], use_cache=True, **given)
        self._cache = getattr(output, "past_key_values", None)
        self._seen = 0 if self._cache is None else ids.shape[1]
        found: Tensor = output.logits[0, -1]
        return found


def chosen(forward: Callable[..., DecoderOutput], ids: Tensor, trie: Trie, end: int | None) -> str:
    """Return the choice that greedy decoding among the tokens of ``trie`` comes to; ``end`` stands for no more.

    Args:
        forward: of the decoder alone.
        ids: ``[1, T]``, the text in front.
        trie: of the choices.
        end: the token that stands for no more; None: the decoder has none, and the shortest choice is taken.
    """
    steps, row = Steps(forward), ids[0].tolist()
    while trie.next:
        able = list(trie.next)
        if trie.choice is not None and end is None:
            break
        best = 0
        if len(able) > 1 or trie.choice is not None:
            logits = steps.logits(ids.new_tensor([row]))
            offered = torch.tensor([*able, end] if trie.choice is not None else able, device=logits.device)
            best = int(logits[offered].argmax())
        # Behind all that could go on stands the end.
        if best == len(able):
            break
        trie = trie.next[able[best]]
        row.append(able[best])
    return trie.choice or ""


def late(
    forward: Callable[..., DecoderOutput],
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    tokens: int,
    mark: str,
    patience: int,
) -> str:
    """Generate the text behind a prompt greedily, without ``mark``, up to the best place for the mark.

    A mark of several tokens is as probable as all of them, one behind the other. Where there is no place for it, the
    answer ends with the text.
    """
    closing, start, steps = encoded(tokenizer, mark, inside=True), ids.shape[1], Steps(forward)
    stopping = LateStopping(start, patience)
    for _ in range(tokens):
        scores = steps.logits(ids).float().log_softmax(-1)
        closes = float(scores[closing[0]])
        scores[closing[0]] = -torch.inf
        other = int(scores.argmax())
        # Where its first token is not the best one, the whole mark cannot be: only then does it cost another pass.
        if closes >= float(scores[other]) and len(closing) > 1:
            closes += _rest(forward, ids, closing)
        if stopping.step(closes, float(scores[other])) or other == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, ids.new_tensor([[other]])], 1)
        if mark in tokenizer.decode(ids[0, start:]):  # as a part of other tokens
            break
    new = ids[0, start:] if stopping.cut is None else ids[0, start : start + stopping.cut]
    return str(tokenizer.decode(new, skip_special_tokens=True)).partition(mark)[0]


def _rest(forward: Callable[..., DecoderOutput], ids: Tensor, closing: Sequence[int]) -> float:
    """Return the log probability of all tokens of ``closing`` but the first, which stands behind ids ``[1, T]``."""
    given = torch.cat([ids, ids.new_tensor([closing[:-1]])], 1)
    # The last places, one for each token of the mark but the first: each predicts the token behind it.
    scores = forward(input_ids=given).logits[0, 1 - len(closing) :].float().log_softmax(-1)
    return float(scores.gather(1, ids.new_tensor([closing[1:]]).T).sum())
