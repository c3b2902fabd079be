"""Pairs from plain texts and from files of questions, and the cache of hidden states."""

from __future__ import annotations

import json

import pytest
import torch
from attrs import define, field

from mplus.errors import CheckpointError, InputError, NonFiniteError
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.training.chunk_retriever.pairs import pairs_of
from mplus.training.chunk_retriever.pooled import PooledDecoder, PooledStates


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def story(first: int, count: int) -> str:
    return " ".join(
        f"The child number {n} went to the park with a big dog. It was happy on day {n}. Then they saw ball {n}."
        for n in range(first, first + count)
    )


def pairs(path, tokenizer, text, **options):
    (path / "text.txt").write_text(text, encoding="utf-8")
    return pairs_of([path / "text.txt"], None, tokenizer, chunk_tokens=70, **options)


def test_a_sentence_is_cropped_out_and_the_end_is_held_out(tmp_path, tokenizer):
    trained, held_out = pairs(tmp_path, tokenizer, story(0, 300), most=1000)
    assert len(trained) > 5 * len(held_out) > 20
    for some in (trained, held_out):
        assert some.right == list(range(len(some.passages)))
    decoded = [[tokenizer.decode(ids) for ids in some.passages] for some in (trained, held_out)]
    queries = [tokenizer.decode(ids) for ids in trained.queries]
    inside = sum(query in passage for query, passage in zip(queries, decoded[0], strict=True))
    assert 0 < inside < len(queries) / 2  # a tenth stays, and stories repeat themselves
    assert not set(decoded[0]) & set(decoded[1])
    assert max(map(len, trained.passages)) <= 71
    again, _ = pairs(tmp_path, tokenizer, story(0, 300), most=1000)
    assert again == trained
    few, fewer = pairs(tmp_path, tokenizer, story(0, 300) + " One. Two." * 400 + story(300, 40), most=40)
    assert (len(few), len(fewer)) == (40, 4)  # whatever passages there are that no sentence can be cropped from


def test_questions_come_with_their_passages(tmp_path, tokenizer):
    lines = [{"question": f"Who is {n // 2}?", "passage": f"It is child {n // 2}."} for n in range(80)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    trained, held_out = pairs_of([], tmp_path / "asked.jsonl", tokenizer)
    assert (len(trained.passages), len(trained), len(held_out.passages), len(held_out)) == (36, 72, 4, 8)
    assert trained.right[:4] == [0, 0, 1, 1]
    assert tokenizer.decode(trained.queries[2]) == "Who is 1?"


@pytest.mark.parametrize("line", ['{"question": "Who?"}', "[]", "no JSON", '{"question": "", "passage": "It."}'])
def test_questions_of_another_form_are_refused(tmp_path, tokenizer, line):
    (tmp_path / "asked.jsonl").write_text('{"question": "Who?", "passage": "It."}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=r"asked\.jsonl, line 2, must"):
        pairs_of([], tmp_path / "asked.jsonl", tokenizer)


def test_too_little_text_is_refused(tmp_path, tokenizer):
    for text in ("", "Once. Upon. A time.", story(0, 8)):
        with pytest.raises(InputError, match="must give at least 20 passages"):
            pairs(tmp_path, tokenizer, text)
    with pytest.raises(InputError, match="must be a readable UTF-8 text"):
        pairs_of([tmp_path / "nowhere.txt"], None, tokenizer)


@define
class Decoder:
    """Hidden states that say which token it was; notes what it read."""

    weights: str = "d"
    scale: float = 1.0
    read: list[int] = field(factory=list)
    stops: bool = False

    def hidden_states(self, ids, mask):
        if self.stops and self.read:
            raise KeyboardInterrupt
        self.read += mask.sum(1).tolist()
        return [ids[..., None].float().expand(-1, -1, 4) * self.scale * layer for layer in (1, 2)]


TEXTS = [[n, n + 1, *[n] * (n % 7)] for n in range(300)]


def pooled(path, decoder):
    return PooledStates(path / "pooled", decoder, torch.tensor([7]))


def test_texts_are_read_once_and_a_run_that_was_stopped_goes_on(tmp_path):
    stopped = Decoder(stops=True)
    with pytest.raises(KeyboardInterrupt):
        pooled(tmp_path, stopped).of(TEXTS)
    assert not list((tmp_path / "pooled").glob("*"))
    assert len(pooled(tmp_path, Decoder()).of(TEXTS[:100])) == 100
    decoder, done = Decoder(), []
    reader = pooled(tmp_path, decoder)
    assert reader.missing(TEXTS) == sum(map(len, TEXTS[100:]))
    found = reader.of(TEXTS, done.append)
    assert len(decoder.read) == 200
    assert sum(done) == sum(decoder.read) == sum(map(len, TEXTS[100:]))
    expected = torch.tensor([sum(text) / len(text) for text in TEXTS])
    torch.testing.assert_close(found[:, 0, 0].float(), expected, rtol=2**-10, atol=0)
    torch.testing.assert_close(found[:, 1, 3].float(), 2 * expected, rtol=2**-10, atol=0)
    assert torch.equal(pooled(tmp_path, Decoder(stops=True)).of(TEXTS[::-1]), found.flip(0))
    other = Decoder(weights="e")
    pooled(tmp_path, other).of(TEXTS[:5])
    assert len(other.read) == 5  # of another decoder nothing is taken


def test_means_come_back_as_those_of_a_decoder(tmp_path):
    decoder = Decoder()
    reader = PooledDecoder(pooled(tmp_path, decoder))
    ids = torch.tensor([[5, 9, 1], [3, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for _ in range(2):
        found = reader.hidden_states(ids, mask)
        assert [tuple(layer.shape) for layer in found] == [(2, 3, 4)] * 2
        assert found[0][:, :, 0].tolist() == [[5.0] * 3, [3.0] * 3]
    assert (decoder.read, reader.weights) == ([1, 3], "d")


def test_states_that_are_not_finite_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(NonFiniteError, match="must be finite in float16"):
        pooled(tmp_path, Decoder(scale=1e30)).of(TEXTS[:3])
    pooled(tmp_path, Decoder()).of(TEXTS[:3])
    (file,) = (tmp_path / "pooled").glob("*")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="Remove it"):
        pooled(tmp_path, Decoder())
