"""PooledStates: the mean hidden states of texts, computed once and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attrs import define, field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mplus.errors import CheckpointError, NonFiniteError
from mplus.mechanisms.kv.passes import BegunDecoder, padded
from mplus.retrievers.chunks.hidden import means_of_tokens

BATCH = 16
"""Texts of one pass."""
SHARD = 128
"""Texts of one file: what is lost at most when the process is stopped."""

Progress = Callable[[int], None]
"""Called with the tokens that were read since the last call."""


@define(eq=False)
class PooledStates:
    """The mean hidden states of texts in all layers, in float16, in files by digest of the text.

    What lies in the folder is not computed again, also where a run was stopped, or a later one has further texts.

    Attributes:
        folder: of the files; of one decoder, whose weights and begin their names do not say but their texts' digests.
        decoder: reads texts behind what every chunk is written behind.
        begin: ids ``[b]`` of that.
    """

    folder: Path
    decoder: BegunDecoder
    begin: Tensor
    _files: dict[str, Path] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} must be a whole safetensors file of pooled hidden states: {error}. Remove it"
                ) from error

    def missing(self, texts: Sequence[Sequence[int]]) -> int:
        """Return the tokens of texts that have to be read."""
        return sum(len(text) for name, text in self._named(texts).items() if name not in self._files)

    def of(self, texts: Sequence[Sequence[int]], progress: Progress = lambda tokens: None) -> Tensor:
        """Return ``[n, depth + 1, d]`` float16 of texts, ids each; those that are not there yet are read.

        Raises:
            NonFiniteError: the decoder gave numbers that are not finite.
            CheckpointError: the folder cannot be written.
        """
        named = self._named(texts)
        new = sorted((name for name in named if name not in self._files), key=lambda name: len(named[name]))
        for first in range(0, len(new), SHARD):
            self._write([(name, named[name]) for name in new[first : first + SHARD]], progress)
        found: dict[str, Tensor] = {}
        for file in sorted({self._files[name] for name in named}):
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if name in named}  # noqa: SIM118
        return torch.stack([found[self._name(text)] for text in texts])

    def _write(self, texts: Sequence[tuple[str, Sequence[int]]], progress: Progress) -> None:
        """Read texts and keep them in a file, whole or not at all."""
        made: dict[str, Tensor] = {}
        for first in range(0, len(texts), BATCH):
            some = texts[first : first + BATCH]
            ids, mask = padded([torch.tensor(text) for _, text in some])
            states = self.decoder.hidden_states(ids, mask)
            means = means_of_tokens(states, mask, range(len(states))).half()
            if not bool(means.isfinite().all()):
                raise NonFiniteError(
                    "the hidden states of the decoder must be finite in float16, and some of its layers give others: "
                    "the weights are damaged, or their dtype is too small"
                )
            made |= {name: means[row].clone() for row, (name, _) in enumerate(some)}
            progress(sum(len(text) for _, text in some))
        file = self.folder / f"{hashlib.sha256(''.join(made).encode()).hexdigest()[:32]}.safetensors"
        beside = file.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(made, beside)
            beside.replace(file)
        except OSError as error:
            raise CheckpointError(f"{file} must be writable: {error}") from error
        self._files.update(dict.fromkeys(made, file))

    def _named(self, texts: Sequence[Sequence[int]]) -> dict[str, Sequence[int]]:
        return {self._name(text): text for text in texts}

    def _name(self, text: Sequence[int]) -> str:
        facts = [self.decoder.weights, self.begin.tolist(), list(text)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@define(frozen=True, eq=False)
class PooledDecoder:
    """A ``ChunkDecoder`` that reads no text twice: each token of a text has the mean hidden states of all of it.

    Attributes:
        pooled: what was read.
    """

    pooled: PooledStates

    @property
    def weights(self) -> str:
        return self.pooled.decoder.weights

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        means = self.pooled.of([text[own].tolist() for text, own in zip(ids, mask, strict=True)]).float()
        return [layer[:, None].expand(-1, ids.shape[1], -1) for layer in means.unbind(1)]
