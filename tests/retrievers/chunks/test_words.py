"""Words of token ids, and chunks found by them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.retrievers.chunks.base import Chunks, Query
from mplus.retrievers.chunks.folding import Folding
from mplus.retrievers.chunks.words import WordRetriever

PIECES = [
    "<s>",
    "K",
    "eller",
    "ĠKeller",
    "keller",
    "Ġ",
    "'s",
    "Ġdog",
    ".",
    "Ġthe",
    "The",
    "é",
    "Ġ4",
    "2",
    "日",
    "本",
    "ĠK",
]


class Pieces:
    """A tokenizer of a few pieces."""

    all_special_ids = (0,)

    def __len__(self) -> int:
        return len(PIECES)

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(text) % len(PIECES), 7] for text in texts]}

    def convert_ids_to_tokens(self, ids: range) -> list[str]:
        return [PIECES[one] for one in ids]


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def words(*texts: list[int]) -> list[list[int]]:
    flat = torch.tensor([one for text in texts for one in text])
    found, counts = Folding.of(Pieces()).words(flat, torch.tensor([len(text) for text in texts]))
    return [part.tolist() for part in found.split(counts.tolist())]


def test_a_word_has_one_number_whatever_its_case_its_pieces_and_its_place() -> None:
    numbers = words(
        *(ids(*text) for text in (["K", "eller"], ["ĠKeller"], ["keller"], ["Ġ", "K", "eller"], ["ĠK", "eller"]))
    )
    assert len({tuple(one) for one in numbers}) == 1
    assert [len(one) for one in numbers] == [1] * 5


def test_signs_and_spaces_end_a_word_and_are_none() -> None:
    (keller,), (dog,) = words(ids("ĠKeller"), ids("Ġdog"))
    (found,) = words(ids("<s>", "ĠKeller", "'s", "Ġdog", "."))
    assert [found[0], found[2]] == [keller, dog]
    assert len(found) == 3
    assert words(ids("Ġ", ".", "<s>"), ids("ĠKeller"), [99]) == [[], [keller], []]
    assert words(ids("Ġ4", "2"), ids("Ġ4", ".", "2")) != [[], []]
    assert [len(one) for one in words(ids("Ġ4", "2"), ids("Ġ4", ".", "2"), ids("日", "本"), ids("K", "é"))] == [
        1,
        2,
        2,
        1,
    ]


def test_no_word_runs_from_one_chunk_into_the_next() -> None:
    whole, first, second = words(ids("K", "eller"), ids("K"), ids("eller"))
    assert words(ids("K"), ids("eller")) == [first, second]
    assert whole not in (first, second)


@pytest.mark.parametrize("tokenizer", [None, Pieces()])
def test_the_chunk_that_shares_rare_words_is_best_and_one_that_shares_none_has_nothing(
    tokenizer: Pieces | None,
) -> None:
    texts = [ids("Ġthe", "Ġdog"), ids("Ġthe", "ĠK"), ids("Ġthe", "ĠKeller"), ids(".")]
    flat = torch.tensor([one for text in texts for one in text], dtype=torch.int32)
    chunks = Chunks(torch.tensor([len(text) for text in texts]), flat, torch.empty(4, 0), tokenizer=tokenizer)
    asked = ids("ĠKeller", "Ġthe") if tokenizer is None else ids("keller", ".", "The", "<s>")
    scores = WordRetriever().scores(Query(torch.tensor(asked), torch.empty(0)), chunks)
    assert scores.argmax() == 2
    assert scores[3] == 0
    assert scores[0] == scores[1] > 0


def test_a_copy_scores_alike() -> None:
    tokenizer = Pieces()
    retriever = CHUNK_RETRIEVERS.get("words")(WordRetriever.Options(b=0.1))
    chunks = Chunks(
        torch.tensor([3]),
        torch.tensor(ids("K", "eller", "Ġdog"), dtype=torch.int32),
        torch.empty(1, 0),
        tokenizer=tokenizer,
    )
    query = Query(torch.tensor(ids("keller")), torch.empty(0))
    before = retriever.scores(query, chunks)
    assert before > 0
    for again in (copy.deepcopy(retriever), pickle.loads(pickle.dumps(retriever))):
        assert torch.equal(again.scores(query, chunks), before)
