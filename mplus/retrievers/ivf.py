"""IvfIndex: the keys of one layer of one store, sorted into cells, so that a search looks into a few of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import faiss
import torch
from torch import Tensor

from mplus.errors import InputError, NonFiniteError, NotSupported

PIECE_ROWS = 2**16
"""Keys given to faiss at a time, so that converting them takes little room."""
MANY_ROWS = 4096
"""Keys from which on an addition is shared among threads; for fewer, waking them takes longer."""
POINTS_PER_CELL = 64
"""Keys that the cells are found with, for each of them; more make training slower and hardly better."""
GPU_MOST = 2048
"""Rows that faiss finds on a GPU at a time, and cells that it looks into, without cuVS."""
TRAINING_STEPS = 8
"""Steps of k-means."""


class IvfIndex:
    """An inverted file of faiss (``IndexIVFFlat``, inner product) over rows that are known by their ids.

    Keys are copied into it in float32: 4 r + 8 bytes a row, and about 60 more that let rows be removed at once.
    Not safe to use from several threads: an unlocked addition during a search ends the process.

    Attributes:
        trained_on: rows there were when its cells were made.
        added: rows added since then.
        resources: of a GPU (``faiss.StandardGpuResources``) on which a copy is searched that is made when rows have
            changed; None: no copy.
    """

    def __init__(self, centers: Tensor, trained_on: int) -> None:
        """Make an index without rows; ``centers`` ``[cells, r]`` float32 are on the CPU, one for each cell."""
        cells, width = centers.shape
        self._quantizer = faiss.IndexFlatIP(width)
        self._quantizer.add(_numpy(centers))
        self._index = faiss.IndexIVFFlat(self._quantizer, width, cells, faiss.METRIC_INNER_PRODUCT)
        self._index.is_trained = True
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # removing then costs what is removed
        self._pieces = [torch.empty(0, dtype=torch.int64)]
        self.trained_on = trained_on
        self.added = 0
        self.resources: Any = None
        self._copy: Any = None

    @staticmethod
    def train(keys: Tensor, cells: int, trained_on: int) -> IvfIndex:
        """Make an index without rows, whose cells k-means finds among ``keys`` ``[m, r]``; equal keys give equal cells.

        Args:
            keys: ``POINTS_PER_CELL`` for each cell are enough.
            cells: how many to make.
            trained_on: rows that ``keys`` were taken from.

        Raises:
            InputError: fewer keys than cells.
            NonFiniteError: keys hold NaN or Inf.
        """
        if keys.shape[0] < cells:
            raise InputError(
                f"an index must be trained on at least as many keys as it has cells ({cells}), got {keys.shape[0]}"
            )
        with _threads(torch.get_num_threads()):
            means = faiss.Kmeans(
                keys.shape[1], cells, niter=TRAINING_STEPS, spherical=True, min_points_per_centroid=1, seed=1234
            )
            means.train(_numpy(_finite(keys)))
        return IvfIndex(torch.from_numpy(means.centroids).clone(), trained_on)

    @property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending: the rows it holds."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces)]
        return self._pieces[0]

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return int(self._index.nlist)

    @torch.no_grad()
    def add(self, ids: Tensor, keys: Tensor, cells: Tensor | None = None) -> None:
        """Add rows with ``keys`` ``[n, r]`` and ``ids`` ``[n]``, ascending and larger than all before.

        Args:
            ids, keys: of the rows.
            cells: ``[n]`` int64, the cell of each where that is known.

        Raises:
            NonFiniteError: keys hold NaN or Inf; nothing was added.
        """
        given = ids.cpu()
        last = next((int(part[-1]) for part in reversed(self._pieces) if len(part)), -1)
        if len(given) and int(given[0]) <= last:
            raise InputError(f"ids must be larger than those in the index ({last}), got {int(given[0])}")
        keys, self._copy = _finite(keys), None
        with _threads(torch.get_num_threads() if len(given) > MANY_ROWS else 1):
            for start in range(0, len(given), PIECE_ROWS):
                part = slice(start, start + PIECE_ROWS)
                piece, numbers = _numpy(keys[part]), given[part].contiguous().numpy()
                if cells is None:
                    self._index.add_with_ids(piece, numbers)
                else:
                    own = cells[part].cpu().contiguous().numpy()
                    pointers = (faiss.swig_ptr(array) for array in (piece, numbers, own))
                    self._index.add_core(len(numbers), *pointers)
        self._pieces.append(given)
        self.added += len(given)

    def remove(self, ids: Tensor) -> None:
        """Drop the rows with these ids, which it holds."""
        gone = ids.cpu().contiguous()
        if not len(gone):
            return
        numbers, self._copy = gone.numpy(), None
        self._index.remove_ids(faiss.IDSelectorArray(numbers))
        held = self.ids
        if torch.equal(held[: len(gone)], gone):  # the oldest
            self._pieces = [held[len(gone) :]]
            return
        kept = torch.ones(len(held), dtype=torch.bool)
        kept[torch.searchsorted(held, gone)] = False
        self._pieces = [held[kept]]

    @torch.no_grad()
    def search(self, query: Tensor, count: int, probes: int, without: Tensor | None = None) -> Tensor:
        """Find ids ``[n]`` of ``min(count, rows)`` rows with large inner products, in the cells looked into.

        More cells than ``probes`` are looked into where these hold too few rows. A GPU is used where there is one for
        all but what it cannot do: more rows or cells than ``GPU_MOST``, rows left out.

        Args:
            query: ``[r]``.
            count: how many rows to find.
            probes: cells to look into, those whose centers have the largest inner products with the query.
            without: ``[x]`` int64, ids of rows that it holds and that are not to be found.
        """
        excluded = torch.empty(0, dtype=torch.int64) if without is None else without.cpu().contiguous()
        count = min(count, len(self) - len(excluded))
        if count <= 0:
            return torch.empty(0, dtype=torch.int64)
        asked, numbers = _numpy(query.detach()[None]), excluded.numpy()
        inner = faiss.IDSelectorBatch(numbers) if len(excluded) else None
        options = {} if inner is None else {"sel": faiss.IDSelectorNot(inner)}
        with _threads(1):
            while True:
                probes = min(probes, self.cells)
                index = self._index if options or max(count, probes) > GPU_MOST else self._searched()
                _, found = index.search(asked, count, params=faiss.SearchParametersIVF(nprobe=probes, **options))
                ids = torch.from_numpy(found[0])
                ids = ids[ids >= 0]
                # FAISS fills up with -1 where the cells looked into hold too few rows: look into twice as many.
                if len(ids) == count or probes == self.cells:
                    return ids
                probes *= 2

    def _searched(self) -> Any:
        if self.resources is None:
            return self._index
        if self._copy is None:
            self._copy = faiss.index_cpu_to_gpu(self.resources, 0, self._index)
        return self._copy

    def keys(self, ids: Tensor) -> Tensor:
        """Return float32 keys ``[n, r]`` of the rows with these ids, which it holds."""
        if not len(ids):
            return torch.empty(0, self._index.d)
        with _threads(1):
            return torch.from_numpy(self._index.reconstruct_batch(ids.cpu().contiguous().numpy()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors from which ``of`` builds this index again, given the keys.

        Returns:
            ``centers`` ``[cells, r]`` float32, ``cell`` ``[m]`` int32 in the order of ``ids``, and ``trained_on`` and
            ``added``, int64.
        """
        lists = self._index.invlists
        numbers, cells = [], []
        for cell in range(self.cells):
            size = lists.list_size(cell)
            if size:
                numbers.append(torch.from_numpy(faiss.rev_swig_ptr(lists.get_ids(cell), size).copy()))
                cells.append(torch.full((size,), cell, dtype=torch.int32))
        order = torch.cat(numbers).argsort() if numbers else torch.empty(0, dtype=torch.int64)
        return {
            "centers": torch.from_numpy(self._quantizer.reconstruct_n(0, self.cells)),
            "cell": torch.cat(cells)[order] if cells else torch.empty(0, dtype=torch.int32),
            "trained_on": torch.tensor(self.trained_on),
            "added": torch.tensor(self.added),
        }

    @staticmethod
    def of(tensors: Mapping[str, Tensor], rows: int, pieces: Iterable[tuple[Tensor, Tensor]]) -> IvfIndex:
        """Build the index again that gave ``tensors``, over the same ``rows``: ``pieces`` are ids and keys, in order.

        Raises:
            InputError: the tensors cannot be those of an index over these keys; the message says why.
        """
        problem = _problem(tensors, rows)
        if problem:
            raise InputError(f"an index cannot be built again: {problem}")
        index, done = IvfIndex(tensors["centers"].cpu().contiguous(), int(tensors["trained_on"])), 0
        width = tensors["centers"].shape[1]
        for ids, keys in pieces:
            if keys.shape[1] != width:
                raise InputError(f"an index cannot be built again: its keys must be {width} wide, got {keys.shape[1]}")
            index.add(ids, keys, tensors["cell"][done : done + len(ids)].long())
            done += len(ids)
        index.added = int(tensors["added"])
        return index


def gpu_resources() -> Any:
    """Return the resources that searches on a GPU share. Raises NotSupported where faiss sees no GPU."""
    if not faiss.get_num_gpus():
        raise NotSupported(
            "searching an index on a GPU takes a faiss that was built for GPUs and sees one, and this one sees none: "
            "install 'mplus[faiss-gpu]' instead of 'mplus[faiss]', or leave gpu out"
        )
    return faiss.StandardGpuResources()


def _problem(tensors: Mapping[str, Tensor], rows: int) -> str | None:
    """Return what is wrong with the tensors of an index over so many rows, or None; faiss itself checks nothing."""
    missing = {"centers", "cell", "trained_on", "added"} - tensors.keys()
    if missing:
        return f"it must have {', '.join(sorted(missing))}, which are missing"
    centers, cell = tensors["centers"], tensors["cell"]
    if centers.ndim != 2 or centers.dtype != torch.float32 or not centers.numel():
        return f"centers must be [cells, r] float32, got {list(centers.shape)} {centers.dtype}"
    if not bool(centers.isfinite().all()):
        return "centers must be finite"
    if cell.dtype != torch.int32 or list(cell.shape) != [rows]:
        return f"cell must be [{rows}] int32, got {list(cell.shape)} {cell.dtype}"
    if len(cell) and not 0 <= int(cell.min()) <= int(cell.max()) < len(centers):
        return f"cell must be in 0..{len(centers) - 1}, got {int(cell.min())} to {int(cell.max())}"
    for name in ("trained_on", "added"):
        if tensors[name].dtype != torch.int64 or tensors[name].ndim or int(tensors[name]) < 0:
            return f"{name} must be a number of at least 0, got {tensors[name]!r}"
    return None


def _finite(keys: Tensor) -> Tensor:
    if not all(bool(part.isfinite().all()) for part in keys.split(PIECE_ROWS)):
        raise NonFiniteError("keys in an index must be finite, but some are NaN or Inf")
    return keys


def _numpy(keys: Tensor) -> Any:
    """Return a contiguous float32 array, without a copy where it is one already."""
    return keys.to(device="cpu", dtype=torch.float32).contiguous().numpy()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let faiss use so many threads when called from this one; it has a number of its own for each."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
