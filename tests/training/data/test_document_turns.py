"""Batches of documents: what is written, what follows it, and that nothing depends on who asks."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch

from mplus.config import structure
from mplus.errors import CheckpointError, ConfigError, InputError
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE, Batch
from mplus.training.data import SOURCES
from mplus.training.data.document_batches import DocumentBatches
from mplus.training.data.documents import DocumentOptions, open_documents
from tests.helpers.letters import Letters, Stream, library, story

BOOKS = library(400, 90, 3, 0, 700, 150, 55, 1200, 31, 260)
REQUESTS = [(1, False), (3, False), (1, True), (0, False), (9, False), (2, True), (1, False)]
BINS = ({"below": 200, "share": 1}, {"at_least": 200, "share": 1})


def source(*, numbers=(0, 1, 2), seed=1, documents=BOOKS, **options):
    options = {"paths": "unused", "chunk_tokens": (10, 20), "target_tokens": (8, 30), **options}
    options = structure(DocumentBatches.Options, options)
    return DocumentBatches(options, tokenizer=Letters(), numbers=numbers, seed=seed, documents=documents)


def row(batch: Batch, place: int) -> dict[str, object]:
    """What one stream gets, without padding."""
    mask = batch.mask[place, 0]
    found = {"chunks": batch.chunks[place].tolist(), "sources": batch.sources[place].tolist()}
    found |= {"about": batch.text_sources[place].tolist(), "fresh": batch.reset}
    for name in ("texts", "labels", "query_mask"):
        found[name] = getattr(batch, name)[place, 0][mask].tolist()
    for name in ("windows", "window_labels", "window_mask"):
        found[name] = None if getattr(batch, name) is None else getattr(batch, name)[place].tolist()
    return found


def rows(batch: Batch) -> list[dict[str, object]]:
    return [row(batch, place) for place in range(len(batch.chunks))]


def same(first: Batch, second: Batch) -> bool:
    """Whether two batches are equal bit for bit."""
    for name in attrs.fields_dict(Batch):
        left, right = getattr(first, name), getattr(second, name)
        if not (torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right):
            return False
    return True


SETTINGS = [
    {},
    {"consecutive": False},
    {"shuffle": False, "streams": 3},
    {"streams": 7, "bins": BINS},
    {"bins": BINS, "consecutive": False, "query_tokens": 4, "window_tokens": 40},
    {"streams": 3, "documents": "stream", "shuffle_block": 4, "window_tokens": 25},
    {"query_tokens": "random"},
    {"streams": 3, "documents": "stream", "shuffle_block": 2, "bins": BINS},
]


def made(setting, **options):
    """A source of a setting; a streamed set is made anew, as it remembers how long it is."""
    setting = {**setting, **options}
    if setting.get("documents") == "stream":
        setting["documents"] = Stream(BOOKS)
    return source(**setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_restored_source_goes_on_as_the_saved_one(setting):
    first = made(setting)
    for step in range(30):
        state = copy.deepcopy(first.state_dict())
        request = REQUESTS[step % len(REQUESTS)]
        expected = first.next_batch(request[0], repeat=request[1])
        if step % 4 == 0:
            second = made(setting)
            second.next_batch(2)
            second.load_state_dict(state)
            assert same(second.next_batch(request[0], repeat=request[1]), expected)
            following = REQUESTS[(step + 1) % len(REQUESTS)]
            ahead = copy.deepcopy(first.state_dict())
            assert same(
                second.next_batch(following[0], repeat=following[1]),
                first.next_batch(following[0], repeat=following[1]),
            )
            assert second.skipped == first.skipped
            first.load_state_dict(ahead)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stream_gets_the_same_whatever_process_it_is_in(setting):
    together = made(setting)
    layouts = [(made(setting, numbers=numbers), numbers) for numbers in ([0], [2, 1])]
    for step in range(20):
        request = REQUESTS[step % len(REQUESTS)]
        expected = rows(together.next_batch(request[0], repeat=request[1]))
        for part, numbers in layouts:
            assert rows(part.next_batch(request[0], repeat=request[1])) == [expected[number] for number in numbers]


def test_seeds_and_streams_differ():
    batches = [rows(source(seed=seed).next_batch(2)) for seed in (1, 2)]
    texts = [str(row["chunks"]) for batch in batches for row in batch]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_shapes_lengths_and_masks(setting, chunks):
    made_source, sizes, lengths = made(setting), set(), set()
    for _ in range(40):
        batch = made_source.next_batch(chunks)
        size = batch.chunks.shape[2]
        assert batch.chunks.shape == (3, chunks, size)
        assert batch.sources.shape == (3, chunks)
        assert batch.texts.shape == batch.labels.shape == batch.mask.shape == batch.query_mask.shape
        assert batch.text_sources.shape == (3, 1)
        assert not batch.reset
        count = batch.mask.sum(-1)
        assert bool((batch.mask == (torch.arange(batch.mask.shape[2]) < count[..., None])).all())
        seen = setting.get("query_tokens")
        given = 1 if seen in (None, "random") else seen
        predicted = batch.mask & (torch.arange(batch.mask.shape[2]) >= given)
        assert torch.equal(batch.labels, torch.where(predicted, batch.texts, IGNORE_INDEX))
        if seen != "random":
            assert torch.equal(batch.query_mask, batch.mask if seen is None else batch.mask & ~predicted)
        sizes.add(size)
        lengths.update(count.flatten().tolist())
    assert sizes <= set(range(10, 21))
    assert lengths <= set(range(8, 31))
    assert len(sizes) > 5
    assert len(lengths) > 5


def test_a_random_beginning_of_each_text_retrieves():
    made_source, shares = source(query_tokens="random"), []
    for _ in range(40):
        batch = made_source.next_batch(1)
        seen, long = batch.query_mask.sum(-1), batch.mask.sum(-1)
        assert torch.equal(batch.query_mask, torch.arange(batch.query_mask.shape[2]) < seen[..., None])
        assert bool(((seen >= 1) & (seen < long)).all())
        shares.append((seen / long).flatten())
    drawn = torch.cat(shares)
    assert len(set(drawn.tolist())) > 60
    assert 0.4 < drawn.mean() < 0.6


def test_a_stream_writes_a_document_from_end_to_end_and_predicts_what_comes_next():
    stream = source(numbers=[5], documents=library(400, 330), shuffle=False, chunk_tokens=16, target_tokens=(8, 30))
    written: dict[int, str] = {}
    target = ""
    for _ in range(60):
        batch = stream.next_batch(1)
        number, chunk = int(batch.sources[0, 0]), Letters.text(batch.chunks)
        begins = number not in written
        if not begins:  # what was to be predicted is what is written next
            common = min(len(chunk), len(target))
            assert chunk[:common] == target[:common]
        written[number] = written.get(number, "") + chunk
        assert batch.text_sources.tolist() == [[number]]
        target = Letters.text(batch.texts[batch.mask])
        whole = story(number % 2, (400, 330)[number % 2])
        end = whole.index(written[number]) + len(written[number])
        assert whole[end:].startswith(target)
    assert len(written) >= 3
    for number in list(written)[1:-1]:  # the first is entered somewhere
        length = (400, 330)[number % 2]
        assert len(written[number]) > length - 16 - 8
        assert story(number % 2, length).startswith(written[number])


def test_streams_enter_their_first_document_at_different_places():
    batch = source(numbers=range(8), documents=library(5000)).next_batch(1)
    places = {story(0, 5000).index(Letters.text(chunk)) for chunk in batch.chunks}
    assert len(places) == 8
    assert max(places) > 1500


def test_short_documents_follow_each_other_within_a_turn():
    stream = source(numbers=[0], documents=library(*[50] * 20), shuffle=False, chunk_tokens=16, target_tokens=8)
    stream.next_batch(1)
    batch = stream.next_batch(9)
    sources = batch.sources[0].tolist()
    assert sources == sorted(sources)
    assert [sources.count(number) for number in range(sources[0] + 1, sources[-1])] == [3, 3]
    assert batch.text_sources.tolist() == [[sources[-1]]]
    for number, chunk in zip(sources, batch.chunks[0], strict=True):
        assert Letters.text(chunk) in story(number, 50)
    last = "".join(Letters.text(c) for c, n in zip(batch.chunks[0], sources, strict=True) if n == sources[-1])
    assert story(sources[-1], 50).startswith(last + Letters.text(batch.texts))


def test_a_document_with_chunks_but_no_target_left_gives_all_but_the_last_chunk():
    stream = source(numbers=[0], documents=library(*[39] * 20), consecutive=True, chunk_tokens=16, target_tokens=8)
    stream.next_batch(1)
    for _ in range(10):
        batch = stream.next_batch(2)
        first, second = batch.sources[0].tolist()
        assert second != first
        assert batch.text_sources.tolist() == [[second]]


def test_without_chunks_the_text_is_read_and_passed():
    stream = source(numbers=[0], documents=library(3000), chunk_tokens=16, target_tokens=20)
    first, second = stream.next_batch(0), stream.next_batch(0)
    assert first.text_sources.tolist() == [[NO_SOURCE]]  # nothing of it was written
    assert Letters.text(first.texts) + Letters.text(second.texts) in story(0, 3000)
    third, fourth = stream.next_batch(1), stream.next_batch(0)
    assert fourth.text_sources.tolist() == third.text_sources.tolist() == [[0]]
    assert Letters.text(second.texts) + Letters.text(third.chunks) + Letters.text(fourth.texts) in story(0, 3000)


def test_not_consecutive_turns_take_the_ends_of_new_documents():
    stream = source(numbers=[0], documents=library(*[300] * 30), consecutive=False, window_tokens=40)
    numbers = []
    for _ in range(10):
        batch = stream.next_batch(2)
        number = int(batch.text_sources)
        assert batch.sources.tolist() == [[number, number]]
        said = Letters.text(batch.chunks) + Letters.text(batch.texts[batch.mask])
        assert story(number, 300).endswith(said)
        window = batch.windows[batch.window_mask]
        assert Letters.text(window) == said[-40:]
        numbers.append(number)
    assert len(set(numbers)) == 10


@pytest.mark.parametrize("consecutive", [True, False])
def test_the_repeat_task_asks_for_the_chunks(consecutive):
    documents = library(*[300] * 30)
    stream = source(
        numbers=[0, 1], documents=documents, consecutive=consecutive, target_tokens=(8, 50), window_tokens=30
    )
    for chunks in (1, 2, 3):
        batch = stream.next_batch(chunks, repeat=True)
        for place in range(2):
            own = [
                c
                for c, n in zip(batch.chunks[place], batch.sources[place], strict=True)
                if n == batch.text_sources[place]
            ]
            text = batch.texts[place, 0][batch.mask[place, 0]]
            expected = ("Repeat:" + "".join(map(Letters.text, own)))[:50]
            assert Letters.text(text) == expected
            given = len("Repeat:") + 5
            labels = batch.labels[place, 0][: len(text)]
            assert labels[:given].tolist() == [IGNORE_INDEX] * given
            assert torch.equal(labels[given:], text[given:])
            assert batch.query_mask[place, 0].nonzero().flatten().tolist() == list(range(given))
            wanted = batch.window_labels[place] != IGNORE_INDEX
            predicted = min(30 - 1, len(text) - given)
            assert torch.equal(wanted.nonzero().flatten(), torch.arange(30 - predicted, 30))
    with pytest.raises(InputError, match="repeat task needs at least 1 chunk, got chunks=0"):
        stream.next_batch(0, repeat=True)


def test_a_repetition_is_of_the_last_document_only():
    stream = source(numbers=[0], documents=library(*[60] * 20), chunk_tokens=16, target_tokens=(8, 200))
    batch = stream.next_batch(7, repeat=True)
    own = batch.chunks[0][batch.sources[0] == batch.text_sources[0, 0]]
    assert 0 < len(own) < 7
    assert Letters.text(batch.texts) == "Repeat:" + Letters.text(own)


def test_a_repetition_of_which_nothing_would_be_predicted_is_refused():
    with pytest.raises(InputError, match="must have more than the 12 tokens of instruction and cue, got 12"):
        source(chunk_tokens=5, target_tokens=(8, 40)).next_batch(1, repeat=True)


def test_windows_are_the_newest_text_of_the_document():
    stream = source(numbers=[0], documents=library(3000), window_tokens=64, chunk_tokens=16, target_tokens=20)
    said = ""
    for step in range(6):
        batch = stream.next_batch(1)
        said += Letters.text(batch.chunks)
        expected = (said + Letters.text(batch.texts))[-64:]
        assert Letters.text(batch.windows[batch.window_mask]) == expected
        assert batch.window_mask.tolist() == [[False] * (64 - len(expected)) + [True] * len(expected)]
        first = 64 - len(expected)
        assert torch.equal(batch.window_labels[0, first + 1 :], batch.windows[0, first + 1 :])
        assert batch.window_labels[0, : first + 1].tolist() == [IGNORE_INDEX] * (first + 1), step
    assert source().next_batch(1).windows is None


def test_documents_without_room_are_counted_and_never_seen():
    stream = source(numbers=[0], shuffle=False, consecutive=False, chunk_tokens=20, target_tokens=12)
    numbers = {int(stream.next_batch(1).text_sources) % 10 for _ in range(14)}
    assert numbers == {0, 1, 4, 5, 6, 7, 9}
    # Two passes: 3 and 31 tokens are too few for 20 + 12, and one document has none.
    assert stream.skipped == {"too_short": 4, "empty": 2}


def test_ends_that_are_not_used_are_counted():
    stream = source(numbers=[0], documents=library(50, 50), shuffle=False, chunk_tokens=16, target_tokens=8)
    batches = [stream.next_batch(1) for _ in range(30)]
    sources = [int(batch.sources) for batch in batches]
    entered = story(0, 50).index(Letters.text(batches[0].chunks))
    first = 50 - entered - 16 * sources.count(sources[0])
    # Of 50 tokens, 2 chunks leave 18: no room for a third and its target.
    assert stream.skipped == {"unused_tokens": first + 18 * (len(set(sources)) - 2)}
    assert len(set(sources)) > 10


def test_bins_set_how_often_lengths_come():
    books = library(*[100] * 60, *[300] * 6)
    stream = source(numbers=range(4), documents=books, consecutive=False, bins=BINS)
    lengths = [len(books[int(n) % 66].text) for _ in range(100) for n in stream.next_batch(1).text_sources.flatten()]
    assert 160 < lengths.count(300) < 240
    assert stream.skipped["of_another_bin"] > 0


def test_an_empty_data_set_is_refused():
    with pytest.raises(InputError, match="the data set is empty"):
        source(documents=library())


@pytest.mark.parametrize("documents", [library(9, 27, 3), Stream(library(9, 27, 3))])
def test_documents_that_are_all_too_short_are_refused(documents):
    with pytest.raises(InputError, match=r"a document must have 28 tokens, .* the longest of 3 has 27: give longer"):
        source(documents=documents, streams=3)


def test_a_bin_without_documents_is_refused():
    stream = source(bins=[{"below": 200}, {"at_least": 2000}])
    with pytest.raises(InputError, match="finds no document of at least 18 tokens in the bin of 2000 tokens and more"):
        [stream.next_batch(1) for _ in range(20)]


@pytest.mark.parametrize("consecutive", [True, False])
def test_a_stream_whose_documents_are_too_short_is_told(consecutive):
    # The other stream has the long document.
    stream = source(numbers=[1], documents=library(500, 20), streams=2, shuffle=False, consecutive=consecutive)
    with pytest.raises(InputError, match=r"stream 1 finds no document with the .* tokens of a chunk and its target"):
        [stream.next_batch(1) for _ in range(20)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_tokens": 8}, r"query_tokens must be below the least of target_tokens \(8\), got 8"),
        ({"query_tokens": "some"}, r"""query_tokens must be a whole .* "random" or None, got 'some'"""),
        ({"streams": 2}, r"streams must be above every stream's number \(2\), got 2"),
        ({"chunk_tokens": (20, 10)}, "chunk_tokens must be a whole number"),
        ({"target_tokens": 1}, "target_tokens must be a whole number of at least 2"),
        ({"dataset": "a", "streaming": True}, "streams must be given with streaming"),
        ({"window": 3}, "'window' is not a field of DocumentBatchesOptions; did you mean 'window_tokens'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        source(**options)


def test_another_data_set_or_layout_cannot_be_resumed():
    state = source().state_dict()
    with pytest.raises(CheckpointError, match="10 documents then, 2 now"):
        source(documents=library(400, 300)).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"must have every stream, it lacks \[3\]"):
        source(numbers=[2, 3]).load_state_dict(state)
    source(numbers=[2]).load_state_dict(state)


def test_a_document_is_encoded_once_for_all_streams():
    tokenizer = Letters()
    options = structure(DocumentBatches.Options, {"paths": "unused", "chunk_tokens": 16})
    stream = DocumentBatches(options, tokenizer=tokenizer, numbers=range(4), seed=0, documents=library(4000))
    for _ in range(5):
        stream.next_batch(1)
    assert tokenizer.encoded == ["Repeat:", story(0, 4000)]


def test_the_sources_are_registered():
    assert SOURCES.names() == ["copying", "documents", "notes", "questions", "recall"]
    assert SOURCES.get("documents") is DocumentBatches


def test_the_novel_with_the_shipped_tokenizer():
    tokenizer = load_tokenizer()
    options = structure(DocumentBatches.Options, {"shipped": "novel", "chunk_tokens": 64})
    batch = DocumentBatches(options, tokenizer=tokenizer, numbers=[0, 1], seed=0).next_batch(2)
    (novel,) = open_documents(DocumentOptions(shipped="novel")).iterate()
    said = tokenizer.decode(torch.cat([batch.chunks[1].flatten(), batch.texts[1, 0][batch.mask[1, 0]]]))
    assert said.strip() in novel.text
