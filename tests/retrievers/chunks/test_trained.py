"""The trained retriever: the maps, their file, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from attrs import evolve
from torch.nn.functional import normalize

import mplus
from mplus.errors import CheckpointError, ConfigError, MemoryMismatchError
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.retrievers.chunks.hybrid import HybridRetriever
from mplus.retrievers.chunks.trained import TrainedMaps, TrainedRetriever
from mplus.retrievers.chunks.words import WordRetriever
from mplus.testing.chunk_retrievers import SHAPE, ChunkRetrieverConformance, SmallDecoder

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, WIDTH, RANK = 2, 2 * SHAPE.hidden_size, 3


def maps_of(seed: int = 0, decoder: str = SmallDecoder.weights) -> TrainedMaps:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    spread = [torch.stack([drawn(LAYERS, SHAPE.hidden_size), 1 + drawn(LAYERS, SHAPE.hidden_size).abs()])] * 2
    parts = [drawn(*shape) for _ in range(2) for shape in ((WIDTH, RANK), (RANK, WIDTH))]
    return TrainedMaps(decoder, torch.tensor([1, 3]), *spread, *parts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    maps_of().write(tmp_path / "maps.safetensors")
    return tmp_path / "maps.safetensors"


class TestTrained(ChunkRetrieverConformance):
    @pytest.fixture(autouse=True)
    def _file(self, file: Path) -> None:
        self.file = file

    def make(self) -> TrainedRetriever:
        return TrainedRetriever(TrainedRetriever.Options(path=str(self.file)))


class TestHybridWithMaps(TestTrained):
    def make(self) -> HybridRetriever:
        return HybridRetriever(HybridRetriever.Options(path=str(self.file)))


def built(file: Path) -> TrainedRetriever:
    return CHUNK_RETRIEVERS.build(mplus.MPlusConfig(retriever={"name": "trained", "path": str(file)}).retriever)


def parts_of(file: Path):
    suite, retriever = ChunkRetrieverConformance(), built(file)
    texts = suite.texts(6)
    chunks = suite.chunks(retriever, texts)
    return retriever, texts, chunks, suite.query(retriever, texts[2], chunks)


def test_scores_are_those_of_a_plain_reference(file):
    """Token by token, chunk by chunk, in float64, with the matrix ``1 + down up`` written out."""
    retriever, texts, chunks, query = parts_of(file)
    maps = maps_of()

    def embedding(text, spread, down, up):
        states = SmallDecoder().hidden_states(text[None], torch.ones(1, len(text), dtype=torch.bool))
        layers = [(sum(states[layer][0].double()) / len(text)) for layer in (1, 3)]
        flat = torch.cat([normalize((one - spread[0][n]) / spread[1][n], dim=0) for n, one in enumerate(layers)])
        found = (torch.eye(WIDTH, dtype=torch.float64) + down.double() @ up.double()).T @ flat
        return found / found.norm()

    asked = embedding(texts[2], maps.queries, maps.query_down, maps.query_up)
    told = torch.stack([embedding(text, maps.chunks, maps.chunk_down, maps.chunk_up) for text in texts])
    mean, deviation = chunks.calibration[-3:-1].double()
    # Keys are kept in float16: numbers of a vector of length 1, each off by 2**-11 of itself at most, and so is a dot.
    expected = (told @ asked - mean) / deviation
    torch.testing.assert_close(retriever.scores(query, chunks), expected, rtol=0, atol=2**-10 / float(deviation))
    swapped = embedding(texts[2], maps.queries, maps.chunk_down, maps.chunk_up)  # the map of chunks for a question
    assert float(((told @ swapped - mean) / deviation - expected).abs().max()) > 2**-7 / float(deviation)


def test_hybrid_adds_words_to_it(file):
    _, _, chunks, query = parts_of(file)
    hybrid, trained = HybridRetriever(HybridRetriever.Options(path=str(file))), built(file)
    assert torch.equal(
        hybrid.scores(query, chunks), WordRetriever().scores(query, chunks) + trained.scores(query, chunks)
    )
    assert hybrid.files == trained.files != {}
    assert HybridRetriever().files == {}


def test_a_file_is_read_as_it_was_written(file):
    found, made = TrainedMaps.read(file), maps_of()
    assert found.decoder == made.decoder
    for name in ("layers", "chunks", "queries", "chunk_down", "chunk_up", "query_down", "query_up"):
        assert torch.equal(getattr(found, name), getattr(made, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_up": torch.full((RANK, WIDTH), torch.nan)}, "chunk_up as finite .* not finite"),
        ({"query_down": torch.zeros(WIDTH + 1, RANK)}, r"query_down as finite \[16, 3\], got \[17, 3\]"),
        ({"queries": torch.zeros(2, 1, SHAPE.hidden_size)}, r"queries as finite \[2, 2, 8\]"),
    ],
)
def test_maps_that_do_not_fit_together_are_refused(tmp_path, change, message):
    evolve(maps_of(), **change).write(tmp_path / "wrong")
    with pytest.raises(CheckpointError, match=message):
        built(tmp_path / "wrong")


def test_files_that_are_something_else_are_refused(tmp_path, file):
    with pytest.raises(CheckpointError, match=r"nowhere must be a file of `mplus train-retriever`"):
        built(tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="whole"):
        built(file)
    with pytest.raises(ConfigError, match="path must be the path of a file"):
        CHUNK_RETRIEVERS.build(mplus.MPlusConfig(retriever={"name": "trained", "path": ""}).retriever)
    with pytest.raises(ConfigError, match="path"):
        CHUNK_RETRIEVERS.build(mplus.MPlusConfig(retriever="trained").retriever)


def test_another_decoder_is_refused(tmp_path):
    maps_of(decoder="another").write(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"digest another, got small\. Run `mplus train-retriever`"):
        ChunkRetrieverConformance().chunks(built(tmp_path / "other"), [torch.tensor([1, 2])])


def test_a_memory_that_other_maps_wrote_is_refused(tmp_path, file):
    _, texts, chunks, query = parts_of(file)
    maps_of(seed=1).write(tmp_path / "other")
    other = built(tmp_path / "other")
    assert other.files != built(file).files
    for calibration in (chunks.calibration, torch.zeros(40)):  # of other maps, and of "hidden"
        with pytest.raises(MemoryMismatchError, match=r"not written with the maps of .*mplus\.rewrite_memory"):
            other.scores(query, evolve(chunks, calibration=calibration))
    with pytest.raises(MemoryMismatchError, match="not written with the maps"):
        other.chunk_keys(texts[0][None], [torch.zeros(1, len(texts[0]), 8)] * 4, chunks.calibration, None)
