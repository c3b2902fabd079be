"""The parts of a prompt: what memory stands behind, and the question that it is asked with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.mechanisms.decoder import Text
from mplus.mechanisms.kv.chat import ChatFormat


@define(frozen=True, eq=False)
class Prompt:
    """One row of a text that is read, without its padding. Tensors are on the CPU.

    Attributes:
        ids: ``[n]`` int64.
        begin: tokens in front of the place of memory: those in front of the content of the last user's turn; in a text
            without such a turn those of the begin that it has.
        query: ``[q]`` int64, what to retrieve with: the content of the last user's turn, without template and system
            text; in a text without one all behind the begin. ``query_tokens`` and ``retrieval_query`` say otherwise.
        known: ``[m]`` int64, of ``ids`` those that may decide what comes back, as far as the last one of ``query``
            where a read says how many tokens retrieve.
        is_chat: there is such a turn.
    """

    ids: Tensor
    begin: int
    query: Tensor
    known: Tensor
    is_chat: bool

    @staticmethod
    def of(text: Text, row: int, chat: ChatFormat | None, begins: Sequence[Sequence[int]]) -> Prompt:
        """Find the parts of one row.

        Args:
            text: that is read.
            row: of its batch.
            chat: what a chat template puts around a turn; None: there is none.
            begins: what other texts may begin with; of several the first counts.

        Raises:
            InputError: there are embeddings and no ids.
        """
        ids = text.need_ids()[row].cpu()
        real = torch.ones_like(ids, dtype=torch.bool) if text.mask is None else text.mask[row].cpu()
        ids = ids[real]
        numbers = ids.tolist()
        turn = None if chat is None else chat.last_turn(numbers)
        begin = next((len(one) for one in begins if one and numbers[: len(one)] == list(one)), 0)
        begin, end = (begin, len(numbers)) if turn is None else turn
        asked = torch.ones_like(ids, dtype=torch.bool) if text.query is None else text.query[row].cpu()[real].clone()
        if not text.limited:
            asked[:begin], asked[end:] = False, False
        last = int(asked.nonzero().max()) + 1 if text.limited and bool(asked.any()) else len(numbers)
        query = ids[asked] if text.queries is None else text.queries[row].cpu()
        return Prompt(ids, begin, query, ids[:last], turn is not None)
