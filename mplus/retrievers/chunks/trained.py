"""TrainedRetriever: chunks whose hidden states, behind trained linear maps, resemble those of the question."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from attrs import define, field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from mplus.config import must_be
from mplus.errors import CheckpointError, MemoryMismatchError
from mplus.retrievers.chunks.base import ChunkDecoder, ChunkRetriever, Chunks, ChunkShape, between
from mplus.retrievers.chunks.hidden import StatesRetriever, means_of, standardised
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import Tokenizer

SAVED = "retriever.safetensors"
"""The file that ``save_pretrained`` writes."""
FORMAT = "mplus trained chunk retriever 1"
TENSORS = ("layers", "chunks", "queries", "chunk_down", "chunk_up", "query_down", "query_up")
PARTS = 4
"""Numbers that say in a calibration by which maps keys were made: each 16 bits of a digest, exact in float32."""


@define(frozen=True, eq=False)
class TrainedMaps:
    """Two linear maps behind a frozen decoder, one for chunks and one for questions: a dual encoder.

    A text is the mean hidden states of its tokens in k layers, standardised as "hidden" does it, of k d numbers x. Its
    embedding is ``x + (x down) up``, of length 1 (Search-Adaptor, arXiv 2310.08750): with ``up`` at zero, where the
    training begins, the cosine of two is what "hidden" compares.

    Attributes:
        decoder: digest of the weights that they were trained behind.
        layers: ``[k]`` int64, places in the hidden states.
        chunks, queries: ``[2, k, d]``, mean and standard deviation of passages, and of questions.
        chunk_down, query_down: ``[k d, r]`` float32.
        chunk_up, query_up: ``[r, k d]`` float32.

    Example:
        >>> from mplus.retrievers.chunks.trained import TrainedMaps
        >>> maps = TrainedMaps.read("retriever/maps.safetensors")
    """

    decoder: str
    layers: Tensor
    chunks: Tensor
    queries: Tensor
    chunk_down: Tensor
    chunk_up: Tensor
    query_down: Tensor
    query_up: Tensor

    @property
    def width(self) -> int:
        """The numbers of an embedding, k d."""
        return self.chunk_up.shape[1]

    def of_chunks(self, means: Tensor) -> Tensor:
        """Return the embeddings ``[n, k d]`` of chunks with mean hidden states ``[n, k, d]``."""
        return embedded(standardised(means, self.chunks), self.chunk_down, self.chunk_up)

    def of_queries(self, means: Tensor) -> Tensor:
        """Return the embeddings ``[n, k d]`` of questions with mean hidden states ``[n, k, d]``."""
        return embedded(standardised(means, self.queries), self.query_down, self.query_up)

    def write(self, file: Path) -> None:
        """Write them into a safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name).clone().contiguous() for name in TENSORS}  # saved apart
        beside = file.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, beside, metadata={"format": FORMAT, "decoder": self.decoder})
        beside.replace(file)  # the file that was there may be what these maps lie in

    @staticmethod
    def read(file: str | Path) -> TrainedMaps:
        """Read what ``write`` wrote. Raises CheckpointError: there is no such file, or it holds something else."""
        try:
            with safe_open(file, "pt") as opened:
                facts, names = opened.metadata() or {}, set(opened.keys())
                if facts.get("format") != FORMAT or names != set(TENSORS):
                    raise CheckpointError(f"{file} must be a file of `mplus train-retriever`, got {sorted(names)[:4]}")
                maps = TrainedMaps(facts["decoder"], *(opened.get_tensor(name) for name in TENSORS))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} must be a file of `mplus train-retriever`, whole: {error}") from error
        maps._check(file)
        return maps

    def _check(self, file: str | Path) -> None:
        """Raise CheckpointError where shapes do not fit together, or a number is not finite."""
        k, d = len(self.layers), self.chunks.shape[-1]
        spread, down, up = (2, k, d), (k * d, self.chunk_down.shape[-1]), (self.chunk_down.shape[-1], k * d)
        wanted = dict(zip(TENSORS, ((k,), spread, spread, down, up, down, up), strict=True))
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{file} must hold {name} as finite {list(shape)}, got {list(tensor.shape)}"
                    + " with numbers that are not finite" * (tuple(tensor.shape) == shape)
                )


def embedded(standard: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the embeddings ``[n, k d]`` of length 1 of standardised means ``[n, k, d]``."""
    flat = standard.flatten(1) / standard.shape[1] ** 0.5
    return normalize(flat + flat @ down @ up, dim=-1)


class TrainedRetriever(StatesRetriever):
    """Scores chunks by the cosine of their embeddings with that of the question, by maps of ``mplus train-retriever``.

    As "hidden", with two linear maps behind the hidden states. A score of 0 is what a passage of ``statements()`` has
    for a question that it does not answer, on the average; the unit is the standard deviation of such scores. Without a
    tokenizer there are no keys.

    Raises:
        CheckpointError: the file is not there, or damaged; or a memory is to be made with a decoder that the maps were
            not trained for.

    Example:
        >>> import mplus
        >>> retriever = {"name": "trained", "path": "retriever/maps.safetensors"}
        >>> config = mplus.MPlusConfig(mechanism="kv", retriever=retriever)
    """

    @define(frozen=True, kw_only=True)
    class Options(ChunkRetriever.Options):
        """Options of the maps.

        Attributes:
            path: the file that ``mplus train-retriever`` wrote.
        """

        path: str = field(validator=must_be("the path of a file", lambda value: isinstance(value, str) and value != ""))

    name = "trained"
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.maps = TrainedMaps.read(options.path)

    @property
    def files(self) -> Mapping[str, str]:
        return {"path": self._digest.hex()}

    def save_files(self, folder: Path) -> Mapping[str, str]:
        self.maps.write(folder / SAVED)
        return {"path": SAVED}

    @cached_property
    def _digest(self) -> bytes:
        content = hashlib.sha256(self.maps.decoder.encode())
        for name in TENSORS:
            content.update(getattr(self.maps, name).contiguous().numpy().tobytes())
        return content.digest()[: 2 * PARTS]

    def key_size(self, shape: ChunkShape) -> int:
        return self.maps.width

    def calibrated(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        if decoder.weights != self.maps.decoder:
            raise CheckpointError(
                f"{self.options.path} must be of the decoder that it is used with: it was trained for weights with the "
                f"digest {self.maps.decoder}, got {decoder.weights}. Run `mplus train-retriever` for this one"
            )
        texts = statements()
        passages = means_of([one.passage for one in texts], decoder, tokenizer)[:, self.maps.layers]
        questions = means_of([one.question for one in texts], decoder, tokenizer)[:, self.maps.layers]
        similar = (self.maps.of_queries(questions) @ self.maps.of_chunks(passages).T).double()
        wrong = similar[~torch.eye(len(similar), dtype=torch.bool)]
        mean, deviation = wrong.mean(), wrong.std()
        similar = (similar - mean) / deviation
        unit = torch.stack([mean, deviation, between(similar)]).float()
        return torch.cat([self._parts(), unit]), similar

    def layers_of(self, calibration: Tensor) -> Tensor:
        self._check(calibration)  # first of all: other maps may have fewer layers, or none that this decoder has
        return self.maps.layers

    def embedded(self, means: Tensor, calibration: Tensor, *, asked: bool) -> Tensor:
        return self.maps.of_queries(means) if asked else self.maps.of_chunks(means)

    def similar(self, key: Tensor, chunks: Chunks) -> Tensor:
        self._check(chunks.calibration)
        similar: Tensor = (chunks.keys.float() @ key.float()).double()
        return (similar - chunks.calibration[PARTS]) / chunks.calibration[PARTS + 1]

    def _parts(self) -> Tensor:
        pairs = self._digest
        return torch.tensor([float(pairs[i] * 256 + pairs[i + 1]) for i in range(0, 2 * PARTS, 2)])

    def _check(self, calibration: Tensor) -> None:
        """Raise MemoryMismatchError unless the keys of a memory were made by these maps."""
        if len(calibration) != PARTS + 3 or not torch.equal(calibration[:PARTS], self._parts()):
            raise MemoryMismatchError(
                f"the chunks of this memory were not written with the maps of {self.options.path}, so they cannot be "
                "found by them: wrap the decoder with the retriever that it was written with, or make the memory anew "
                "with mplus.rewrite_memory"
            )
