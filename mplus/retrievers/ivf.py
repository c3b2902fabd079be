"""IvfIndex: the keys of one layer of one store, sorted into cells, so that a search looks into a few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import faiss
import torch
from torch import Tensor

from mplus.errors import InputError, NonFiniteError

PIECE_ROWS = 2**16
"""Keys given to faiss at a time, so that converting them takes little room."""
POINTS_PER_CELL = 64
"""Keys that the cells are found with, for each of them; more make training slower and hardly better."""
TRAINING_STEPS = 8
"""Of k-means."""


class IvfIndex:
    """An inverted file of faiss (``IndexIVFFlat``, inner product) over rows that are known by their ids.

    Keys are copied into it in float32: 4 r + 8 bytes a row, and about 60 more that let rows be removed at once.
    Not safe to use from several threads: an unlocked addition during a search ends the process.

    Attributes:
        ids: ``[m]`` int64, ascending: the rows it holds.
        trained_on: rows there were when its cells were made.
        added: rows added since then.
    """

    def __init__(self, centers: Tensor, trained_on: int) -> None:
        """Without rows. ``centers`` are ``[cells, r]`` float32 on the CPU, one for each cell."""
        cells, width = centers.shape
        self._quantizer = faiss.IndexFlatIP(width)
        self._quantizer.add(_numpy(centers))
        self._index = faiss.IndexIVFFlat(self._quantizer, width, cells, faiss.METRIC_INNER_PRODUCT)
        self._index.is_trained = True
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # removing then costs what is removed
        self.ids = torch.empty(0, dtype=torch.int64)
        self.trained_on = trained_on
        self.added = 0

    @staticmethod
    def train(keys: Tensor, cells: int) -> IvfIndex:
        """An index whose cells are made for ``keys`` ``[m, r]``, of which it holds none yet.

        K-means over at most ``POINTS_PER_CELL`` keys for each cell, spread evenly, always the same for equal keys.

        Raises:
            InputError: fewer keys than cells.
            NonFiniteError: keys hold NaN or Inf.
        """
        count = keys.shape[0]
        if count < cells:
            raise InputError(
                f"an index must be trained on at least as many keys as it has cells ({cells}), got {count}"
            )
        sample = min(count, POINTS_PER_CELL * cells)
        chosen = keys[torch.arange(sample, device=keys.device) * count // sample]
        with _threads():
            means = faiss.Kmeans(
                keys.shape[1], cells, niter=TRAINING_STEPS, spherical=True, min_points_per_centroid=1, seed=1234
            )
            means.train(_numpy(_finite(chosen)))
        return IvfIndex(torch.from_numpy(means.centroids).clone(), count)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return int(self._index.nlist)

    @torch.no_grad()
    def add(self, ids: Tensor, keys: Tensor, cells: Tensor | None = None) -> None:
        """Take rows with ``keys`` ``[n, r]`` and ``ids`` ``[n]``, ascending and larger than all before.

        Args:
            ids, keys: of the rows.
            cells: ``[n]`` int64, the cell of each where that is known.

        Raises:
            NonFiniteError: keys hold NaN or Inf; nothing was added.
        """
        given = ids.cpu()
        if len(given) and len(self) and int(given[0]) <= int(self.ids[-1]):
            raise InputError(f"ids must be larger than those in the index ({int(self.ids[-1])}), got {int(given[0])}")
        keys = _finite(keys)
        with _threads():
            for start in range(0, len(given), PIECE_ROWS):
                part = slice(start, start + PIECE_ROWS)
                piece, numbers = _numpy(keys[part]), given[part].contiguous().numpy()
                if cells is None:
                    self._index.add_with_ids(piece, numbers)
                else:
                    own = cells[part].cpu().contiguous().numpy()
                    pointers = (faiss.swig_ptr(array) for array in (piece, numbers, own))
                    self._index.add_core(len(numbers), *pointers)
        self.ids = torch.cat([self.ids, given])
        self.added += len(given)

    def remove(self, ids: Tensor) -> None:
        """Drop the rows with these ids, which it holds."""
        gone = ids.cpu().contiguous()
        if not len(gone):
            return
        numbers = gone.numpy()
        self._index.remove_ids(faiss.IDSelectorArray(numbers))
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[torch.searchsorted(self.ids, gone)] = False
        self.ids = self.ids[kept]

    @torch.no_grad()
    def search(self, query: Tensor, count: int, probes: int, without: Tensor | None = None) -> Tensor:
        """Ids ``[n]`` of ``min(count, rows)`` rows with large inner products, those of the cells looked into.

        More cells than ``probes`` are looked into where these hold too few rows.

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
        selector = None if inner is None else faiss.IDSelectorNot(inner)
        with _threads():
            while True:
                probes = min(probes, self.cells)
                options = {} if selector is None else {"sel": selector}
                settings = faiss.SearchParametersIVF(nprobe=probes, **options)
                _, found = self._index.search(asked, count, params=settings)
                ids = torch.from_numpy(found[0])
                ids = ids[ids >= 0]
                if len(ids) == count or probes == self.cells:
                    return ids
                probes *= 2

    def tensors(self) -> dict[str, Tensor]:
        """What it takes to build this index again from keys, at the cost of copying them.

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
    def of(tensors: Mapping[str, Tensor], ids: Tensor, keys: Tensor) -> IvfIndex:
        """The index that ``tensors`` are of, over the same rows: ``keys`` ``[m, r]`` with ``ids`` ``[m]``, ascending.

        Raises:
            InputError: the tensors cannot be those of an index over these keys; the message says why.
        """
        problem = _problem(tensors, keys)
        if problem:
            raise InputError(f"an index cannot be built again: {problem}")
        index = IvfIndex(tensors["centers"].cpu().contiguous(), int(tensors["trained_on"]))
        index.add(ids, keys, tensors["cell"].long())
        index.added = int(tensors["added"])
        return index


def _problem(tensors: Mapping[str, Tensor], keys: Tensor) -> str | None:
    """What is wrong with the tensors of an index over ``keys``, if anything is: faiss itself looks at nothing."""
    missing = {"centers", "cell", "trained_on", "added"} - tensors.keys()
    if missing:
        return f"it must have {', '.join(sorted(missing))}, which are missing"
    centers, cell = tensors["centers"], tensors["cell"]
    if centers.ndim != 2 or centers.dtype != torch.float32 or centers.shape[1] != keys.shape[1] or not len(centers):
        return f"centers must be [cells, {keys.shape[1]}] float32, got {list(centers.shape)} {centers.dtype}"
    if not bool(centers.isfinite().all()):
        return "centers must be finite"
    if cell.dtype != torch.int32 or list(cell.shape) != [keys.shape[0]]:
        return f"cell must be [{keys.shape[0]}] int32, got {list(cell.shape)} {cell.dtype}"
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
    """A contiguous float32 array, without a copy where it is one already."""
    return keys.to(device="cpu", dtype=torch.float32).contiguous().numpy()


@contextmanager
def _threads() -> Iterator[None]:
    """Let faiss use as many threads as torch in this thread; it counts its own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
