"""The tensors of a checkpoint folder, read from its safetensors files one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplus.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names that safetensors headers give to floating dtypes."""


class OpenSlice(Protocol):
    """A tensor in a file, which is not read yet."""

    def get_shape(self) -> list[int]:
        """Return its shape."""

    def get_dtype(self) -> str:
        """Return the name that safetensors gives to its dtype."""


class OpenFile(Protocol):
    """A file as ``safetensors.safe_open`` opens it."""

    def keys(self) -> list[str]:
        """Return the names of its tensors."""

    def get_slice(self, name: str) -> OpenSlice:
        """Return a tensor without its content."""

    def get_tensor(self, name: str) -> Tensor:
        """Read a tensor."""


class TensorFiles:
    """Names and shapes of all tensors, known from the files' headers; content on request.

    A tensor that is read lies in pages of its file that the system may drop again, not in memory of the process.
    """

    def __init__(self, files: Mapping[str, OpenFile], paths: Mapping[str, Path]) -> None:
        """``files``: open file by path; ``paths``: file path by tensor name. Use ``open``."""
        self._files = {name: files[str(path)] for name, path in paths.items()}
        self._paths = paths

    @classmethod
    def open(cls, folder: Path, weights: str = WEIGHTS) -> TensorFiles:
        """Open ``folder/weights``, or the shards that the index beside it names.

        Raises:
            CheckpointError: no such file, a shard that is missing, truncated or lacks a tensor, or a tensor twice.
        """
        index = folder / INDEX
        if (folder / weights).is_file():
            path = folder / weights
            file = _open(path)
            return cls({str(path): file}, dict.fromkeys(file.keys(), path))
        if not index.is_file():
            raise CheckpointError(
                f"{folder} must hold its weights as {weights} or as shards with {INDEX}, and holds neither: "
                "other formats have to be converted to safetensors first"
            )
        return cls._sharded(folder, _weight_map(index))

    @classmethod
    def _sharded(cls, folder: Path, weight_map: Mapping[str, str]) -> TensorFiles:
        files, paths = {}, {}
        for shard in sorted(set(weight_map.values())):
            path = folder / shard
            files[str(path)] = _open(path)
            for name in files[str(path)].keys():  # noqa: SIM118 - no dict: it has no __iter__
                if weight_map.get(name) != shard:
                    raise CheckpointError(
                        f"{path} holds {name}, which {INDEX} must place there, but it says {weight_map.get(name)!r}"
                    )
                paths[name] = path
        missing = sorted(weight_map.keys() - paths.keys())
        if missing:
            raise CheckpointError(
                f"{folder / weight_map[missing[0]]} must hold {missing[0]} according to {INDEX}, but does not"
            )
        return cls(files, paths)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it. Raises CheckpointError when there is none of this name."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Return its floating dtype, or None when it is stored as anything else."""
        return FLOATS.get(self._file(name).get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """Read the tensor as stored, on the CPU. Copy it: it is only as durable as its file."""
        file = self._file(name)
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._paths[name]}: {name} cannot be read: {error}") from error

    def _file(self, name: str) -> OpenFile:
        if name not in self._files:
            raise CheckpointError(f"the checkpoint must have a tensor {name}, which is missing")
        return self._files[name]


def _open(path: Path) -> OpenFile:
    if not path.is_file():
        raise CheckpointError(f"{path} must exist: {INDEX} names it")
    try:
        opened: OpenFile = safe_open(path, framework="pt")
        return opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a complete safetensors file: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index} must be JSON with a weight_map from tensor names to files: {error!r}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in found.values()
    ):
        raise CheckpointError(f"weight_map in {index} must give a file name in the same folder for every tensor")
    return found
