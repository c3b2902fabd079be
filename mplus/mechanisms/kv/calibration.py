"""What a chunk retriever knows of a decoder, found once, and kept in the user's cache folder and in memories."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from attrs import define, field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mplus.config import Component
from mplus.download import cache_folder
from mplus.mechanisms.decoder import Decoder
from mplus.mechanisms.kv.passes import BegunDecoder
from mplus.mechanisms.kv.state import KvState, state_of
from mplus.memory.state import StreamView
from mplus.retrievers.chunks.base import ChunkRetriever
from mplus.retrievers.chunks.statements import statements

logger = logging.getLogger(__name__)

FOLDER = "calibrations"
"""In the cache folder."""
VERSION = 1
"""Of what retrievers make; a file of another version is not looked for."""


@define(eq=False)
class Calibrations:
    """The calibrations of one decoder.

    Attributes:
        retriever: whose they are.
        component: how the config names it.
        known: by ``key``, those that were made or read.
    """

    retriever: ChunkRetriever
    component: Component
    known: dict[str, Tensor] = field(factory=dict)

    def of(self, decoder: Decoder, view: StreamView, begin: Tensor, begin_ids: Tensor, tokenizer: Any) -> Tensor:
        """Return what a stream's chunks are compared by, ``[x]`` float32; found now where its first one is written.

        Empty where the retriever has nothing to find out, where there is no tokenizer, and of a stream whose first
        chunks were written without one.

        Args:
            decoder: runs passes.
            view: the stream.
            begin: ``[L, b, w]``, rows that its chunks are written behind.
            begin_ids: ``[b]``, the tokens of these.
            tokenizer: of the memory, or None.
        """
        state = state_of(view)
        if len(state.calibration) or state.tokens or tokenizer is None or not self.retriever.calibrates:
            return state.calibration
        key = self.key(decoder, begin_ids)
        if key not in self.known:
            file = cache_folder() / FOLDER / f"{key}.safetensors"
            found = _read(file)
            if found is None:
                logger.info("finding out in which layers the decoder tells texts apart, once for its weights")
                found = self.retriever.calibrate(BegunDecoder(decoder, [view], [begin]), tokenizer)
                _write(file, found)
            self.known[key] = found
        return self.known[key]

    def key(self, decoder: Decoder, begin_ids: Tensor) -> str:
        """Return a digest of all that a calibration depends on."""
        texts = [(one.passage, one.question) for one in statements()]
        facts = [VERSION, self.component.plain(), decoder.weights, begin_ids.tolist(), texts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def found_by(state: KvState, calibration: Tensor, key: Tensor) -> tuple[KvState, Tensor | None]:
    """Return a stream that takes a chunk with this ``key`` ``[v]`` next, and the key; None where it takes none.

    Where its chunks have keys of another form, made by another retriever, they are found by their words from now on.
    """
    if not state.tokens:
        return state.with_calibration(calibration), key
    if state.chunk_key.shape[1] and not key.shape[0]:
        logger.warning("a memory whose chunks have keys is written by a retriever that makes none: they are let go")
        return state.without_keys(), None
    return state, key if state.chunk_key.shape[1] else None


def _read(file: Path) -> Tensor | None:
    """Return the calibration in a file; None where there is none, or one that cannot be read."""
    if not file.is_file():
        return None
    try:
        return load_file(file)["calibration"]
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s cannot be read, and is made anew: %s", file, error)
        return None


def _write(file: Path, calibration: Tensor) -> None:
    """Keep a calibration in a file; say where that cannot be done."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.part")
        save_file({"calibration": calibration.contiguous()}, beside)
        beside.replace(file)
    except OSError as error:
        logger.warning("%s cannot be written, so the next process finds it out again: %s", file, error)
