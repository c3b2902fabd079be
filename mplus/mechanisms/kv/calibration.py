"""What a chunk retriever knows of a decoder, found once, and kept in the user's cache folder and in memories."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import define, field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mplus.config import Component, JsonValue
from mplus.download import cache_folder
from mplus.mechanisms.decoder import Decoder
from mplus.mechanisms.kv.late_interaction import LAYERS, LateInteraction
from mplus.mechanisms.kv.passes import BegunDecoder
from mplus.mechanisms.kv.state import KNOWN, KvState, state_of
from mplus.memory.state import StreamView
from mplus.retrievers.chunks.base import ChunkRetriever
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FOLDER = "calibrations"
"""In the cache folder."""
SHIPPED = Path(__file__).parent / FOLDER
"""Those that come with mplus; its ``README.md`` says of which decoder, and how they are made."""
VERSION = 1
"""Of what retrievers make; a file of another version is not looked for."""


@define(eq=False)
class Calibrations:
    """The calibrations of one decoder.

    Attributes:
        retriever: whose they are.
        component: how the config names it.
        reorders: the best chunks are reordered, so that late interaction has to know its layers.
        known: by ``key``, those that were made or read.
        warned: it was said what a memory without a tokenizer lacks.
    """

    retriever: ChunkRetriever
    component: Component
    reorders: bool
    known: dict[str, Tensor] = field(factory=dict)
    warned: bool = field(default=False, init=False)

    def of(
        self,
        decoder: Decoder,
        view: StreamView,
        begin_ids: Tensor,
        begin: Callable[[], Tensor],
        tokenizer: Tokenizer | None,
    ) -> dict[str, Tensor]:
        """Return what a stream's chunks are compared by, vectors by the names of ``KNOWN``, found now where missing.

        Empty where there is nothing to find out, where there is no tokenizer, and of a stream whose first chunks were
        written without one.

        Args:
            decoder: runs passes.
            view: the stream.
            begin_ids: ``[b]``, the tokens that its chunks are written behind.
            begin: returns the rows of these, ``[L, b, w]``.
            tokenizer: of the memory, or None.
        """
        state = state_of(view)
        found = {name: getattr(state, name) for name in KNOWN}
        if state.tokens or tokenizer is None:
            return found
        makes: dict[str, tuple[JsonValue, Callable[[BegunDecoder, Tokenizer], Tensor]]] = {}
        if self.retriever.calibrates:
            component = Component(self.component.name, {**self.component.options, **self.retriever.files})
            makes["calibration"] = (component.plain(), self.retriever.calibrate)
        if self.reorders:
            makes["late_interaction"] = (LAYERS, LateInteraction.calibrate)
        for name, (what, make) in makes.items():
            if len(found[name]):
                continue
            key = self.key(decoder, begin_ids, what)
            if key not in self.known:
                kept = _kept(key)
                if kept is None:
                    logger.info("finding out in which layers the decoder tells texts apart, once for its weights")
                    kept = make(BegunDecoder(decoder, [view], [begin()], True), tokenizer)
                    _write(cache_folder() / FOLDER / f"{key}.safetensors", kept)
                self.known[key] = kept
            found[name] = self.known[key]
        return found

    def warn_without_tokenizer(self) -> None:
        """Say once what is lost where there is no tokenizer."""
        if self.retriever.calibrates and not self.warned:
            logger.warning(
                "a memory without a tokenizer is searched by its token ids alone: hidden states and values of tokens "
                "are not compared, and the wrong chunk may come back. Pass tokenizer= to new_memory"
            )
            self.warned = True

    def key(self, decoder: Decoder, begin_ids: Tensor, what: JsonValue) -> str:
        """Return a digest of all that a calibration depends on; ``what`` says which one it is."""
        texts = [(one.passage, one.question) for one in statements()]
        facts = [VERSION, what, decoder.weights, begin_ids.tolist(), texts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def found_by(state: KvState, known: Mapping[str, Tensor], key: Tensor) -> tuple[KvState, Tensor | None]:
    """Return a stream that takes a chunk with this ``key`` ``[v]`` next, and the key; None where it takes none.

    Where its chunks have keys of another form, made by another retriever, they are found by their words from now on.
    """
    if not state.tokens:
        return state.with_known(known), key
    if state.chunk_key.shape[1] and not key.shape[0]:
        logger.warning("a memory whose chunks have keys is written by a retriever that makes none: they are let go")
        return state.without_keys(), None
    return state, key if state.chunk_key.shape[1] else None


def _kept(key: str) -> Tensor | None:
    """Return a calibration that came with mplus, or lies in the cache folder; None: neither."""
    name = f"{key}.safetensors"
    shipped = _read(SHIPPED / name)
    return _read(cache_folder() / FOLDER / name) if shipped is None else shipped


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
        # Put in place in one step, as another process may read the file, or be writing the same.
        beside = file.with_suffix(f".{os.getpid()}.part")
        save_file({"calibration": calibration.contiguous()}, beside)
        beside.replace(file)
    except OSError as error:
        logger.warning("%s cannot be written, so the next process finds it out again: %s", file, error)
