"""GraphStore is a store like the others, but that its rows keep their graph."""

from __future__ import annotations

import torch

from mplus.mechanisms.graph_store import GraphStore
from mplus.testing.stores import LAYOUT, StoreConformance, draw_rows


class TestGraphStore(StoreConformance):
    implementation = GraphStore
    test_inference_mode_leaves_no_trace = None  # inference tensors have no graph, and never get one

    def test_appending_copies_and_forgets_how_rows_were_computed(self):
        """It copies, and remembers."""
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 3, 1)
        weight = torch.ones((), requires_grad=True)
        kept, made = rows.hidden.clone(), rows.hidden.clone() * weight
        store.append(0, rows.replace(hidden=made))
        with torch.no_grad():
            made.zero_()
        assert torch.equal(store.gather(0, store.ids(0)).hidden, kept)
        (gradient,) = torch.autograd.grad(store.snapshot().gather(0, store.ids(0)).hidden.sum(), weight)
        torch.testing.assert_close(gradient, kept.sum())
