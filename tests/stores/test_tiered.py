"""Rows in tiers: what is read is what is stored, and comes up."""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import attrs
import pytest
import torch

from mplus.errors import ConfigError, MemoryMismatchError
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.stores.tiered import TieredStore
from mplus.stores.tiers import shared_cache
from mplus.stores.tiers.resident import ResidentColumns
from mplus.stores.tiers.transfer import CopyEvent, Transfer
from mplus.testing.drawing import draw_rows
from mplus.testing.stores import StoreConformance
from tests.helpers.tiering import CONTENT_BYTES, LAYOUT, SMALL_BYTES, SMALL_SLABS, TIGHT, append, assert_same, tiered
from tests.memory import tiny
from tests.references.quantized import QuantizedConformance

if TYPE_CHECKING:
    from mplus.stores.base import StoreView


class TestTightBudgets(StoreConformance):
    implementation = TieredStore
    machines = 3

    def make(self, layout: StoreLayout) -> TieredStore:
        return tiered(layout)


class TestQuantizedRowsInTiers(QuantizedConformance):
    options: ClassVar = {"inner": {"name": "tiered", **TIGHT}, "group": 2}
    machines = 1


class TestTiersOfQuantizedRows(QuantizedConformance):
    implementation = TieredStore
    machines = 1

    def make(self, layout: StoreLayout) -> TieredStore:
        return tiered(layout, inner={"name": "quantized", "inner": SMALL_SLABS})


class Counted:
    """Counts the rows that are read from the store below."""

    def __init__(self, store: TieredStore, patch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        gather = type(store.inner).gather

        def counting(view: StoreView, layer: int, ids: torch.Tensor, leave_out=()):
            self.rows += len(ids) if "hidden" not in leave_out else 0
            return gather(view, layer, ids, leave_out)

        patch.setattr(type(store.inner), "gather", counting)


class TestWhatIsReadComesUp:
    def test_from_below_to_the_host_to_the_device(self, monkeypatch):
        """Device: 16 rows of a layer, host: 48."""
        device, host = 2 * 16 * CONTENT_BYTES, 2 * 48 * CONTENT_BYTES
        store = tiered(device_bytes=device, host_bytes=host, small_share=0.0)
        ids = append(store, 200)
        below = Counted(store, monkeypatch)
        device, host, last = store.tiers()
        assert (device.rows, host.rows, last.rows) == (16, 48, 200)
        assert (device.name, host.name, last.name) == ("device", "host", "ram")

        def read(wanted: torch.Tensor) -> tuple[int, int, int]:
            before, seen = store.tiers(), below.rows
            assert_same(store.gather(0, wanted), draw_rows(LAYOUT, 200, 0).select(wanted))
            found = tuple(now.hits - then.hits for now, then in zip(store.tiers(), before, strict=True))
            assert below.rows - seen == found[2]
            return found

        some = ids[100:112]
        assert read(some) == (0, 0, 12)
        assert read(some) == (12, 0, 0)
        assert read(ids[120:130]) == (0, 0, 10)  # on the device some make room, on the host others do
        assert read(some) == (6, 6, 0)
        assert read(some.flip(0).repeat(3)) == (12, 0, 0), "a row that is asked for three times is read once"

    def test_what_fits_is_never_read_from_below(self, monkeypatch):
        store = tiered(device_bytes=0, host_bytes=10**6)
        ids = append(store, 300)
        below = Counted(store, monkeypatch)
        store.gather(0, ids)
        assert below.rows == 0

    @pytest.mark.parametrize("tier", ["device", "host"])
    @pytest.mark.parametrize("removed", [0, 8])
    def test_new_rows_do_not_push_out_those_that_were_read(self, tier, removed):
        """Two sets of 16 places: even ids go to one, odd ones to the other."""
        budgets = {"device_bytes": 0, "host_bytes": 0, f"{tier}_bytes": 2 * 32 * CONTENT_BYTES}
        store = tiered(**budgets, small_share=0.0)
        ids = append(store, 60)
        store.remove(0, ids[1 : 1 + 2 * removed : 2])
        read = ids[20:52:2].contiguous()
        store.gather(0, read)
        append(store, 60, seed=1)
        place = ["device", "host"].index(tier)
        assert store.tiers()[place].rows == 32
        before = store.tiers()[place].hits
        store.gather(0, read)
        assert store.tiers()[place].hits - before == 16

    @pytest.mark.parametrize(("device", "host"), [(0, 10**4), (10**4, 0), (2 * 16 * CONTENT_BYTES, 10**4)])
    def test_rows_of_several_tiers_come_in_the_order_asked_for(self, device, host):
        store = tiered(device_bytes=device, host_bytes=host, small_share=0.0)
        ids, rows = append(store, 1000), draw_rows(LAYOUT, 1000, 0)
        for wanted in ([900, 901, 902], [901, 950], [700, 901, 800, 950, 990], [3, 950, 600, 902, 4, 801, 800, 601]):
            for order in (wanted, sorted(wanted)):
                places = torch.tensor(order)
                assert_same(store.gather(0, ids[places]), rows.select(places))
                column, at = store.locate(0, "hidden", ids[places]).contiguous()
                assert torch.equal(column[at], rows.hidden[places])

    def test_removed_rows_make_room(self):
        store = tiered(device_bytes=10**5, host_bytes=10**5)
        ids = append(store, 30)
        store.remove(0, ids[5:])
        assert [report.rows for report in store.tiers()] == [5, 5, 5]

    def test_content_alone_is_located(self):
        store = tiered()
        ids = append(store, 9)
        for view in (store, store.snapshot()):
            column, places = view.locate(0, "hidden", ids[[3, 3, 8, 0]]).contiguous()
            expected = draw_rows(LAYOUT, 9, 0).hidden[[3, 3, 8, 0]]
            assert torch.equal(column[places], expected)
            assert view.locate(0, "projected", ids) is None
            with pytest.raises(KeyError, match="77 in layer 0"):
                view.locate(0, "hidden", torch.tensor([3, 77]))


class PretendedTransfer(Transfer):
    """As to a GPU, but that rows arrive at once: what is copied where, and what is waited for."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.pinned, self.log = True, log

    @contextmanager
    def on_stream(self):
        yield

    def to_device(self, column: torch.Tensor) -> torch.Tensor:
        self.log.append("sent")
        return column.clone()

    def event(self) -> CopyEvent:
        return CopyEvent("event")


def test_what_travels_is_awaited_when_it_is_looked_at(monkeypatch):
    store = tiered(device_bytes=2 * 16 * CONTENT_BYTES, host_bytes=2 * 48 * CONTENT_BYTES, small_share=0.0)
    ids, rows, log = append(store, 200), draw_rows(LAYOUT, 200, 0), []
    store.shared.transfer = PretendedTransfer(log)
    without_pinning = types.SimpleNamespace(**vars(torch))

    def empty(*shape, pin_memory, **named):
        log.append("pinned") if pin_memory else None
        return torch.empty(*shape, **named)

    without_pinning.empty = empty
    monkeypatch.setattr(shared_cache, "torch", without_pinning)
    monkeypatch.setattr(CopyEvent, "wait", lambda own, columns: log.append(f"awaited {own.event}"))
    for wanted in ([100, 3, 60], [100, 20, 150, 2, 60, 101], [*range(90, 130), 5, 40]):
        places = torch.tensor(wanted)
        assert_same(store.gather(0, ids[places]), rows.select(places))
        assert log[-2:] == ["sent", "awaited event"]
        log.clear()
    places = torch.tensor([170, 100, 30])
    located = store.locate(0, "hidden", ids[places])
    assert log[0] == "pinned"
    assert log[-1] == "sent", "nothing is awaited yet"
    column, at = located.contiguous()
    assert log[-1] == "awaited event"
    assert torch.equal(column[at], rows.hidden[places])


class TestSmallColumns:
    @pytest.mark.parametrize(("device", "host", "where"), [(10**5, 10**5, 0), (100, 10**5, 1), (100, 100, 2)])
    def test_they_are_in_the_fastest_tier_with_room(self, device, host, where):
        store = tiered(device_bytes=device, host_bytes=host)
        append(store, 100)
        store.column(0, "key")
        assert [report.small_rows for report in store.tiers()] == [100 * (place == where) for place in range(3)]
        assert torch.equal(store.column(0, "key"), draw_rows(LAYOUT, 100, 0).key)

    def test_they_move_down_when_they_outgrow_a_tier_and_up_again(self):
        store = tiered(device_bytes=2 * 100 * SMALL_BYTES, host_bytes=10**6)
        places = []
        for seed in range(30):
            append(store, 5, seed)
            store.keys(0)
            places.append([report.small_rows > 0 for report in store.tiers()].index(True))
        assert places == sorted(places)
        assert set(places) == {0, 1}
        store.remove(0, store.ids(0)[5:])
        for _ in range(2):
            append(store, 5, 40)  # on the host there is room; whoever is there stays there
            store.keys(0)
        assert store.tiers()[1].small_rows == 15
        assert store.fork().keys(0).equal(store.keys(0))

    def test_they_are_read_once_from_rows_that_were_there_before(self, monkeypatch):
        store = tiered(device_bytes=10**5)
        append(store, 30)
        store.resident = [
            ResidentColumns(store.shared.allocators) for _ in store.resident
        ]  # as if a directory had been opened
        store.remove(0, store.ids(0)[3:9])
        store.resident = [ResidentColumns(store.shared.allocators) for _ in store.resident]
        left = torch.tensor([*range(3), *range(9, 30)])
        assert store.ids(0).tolist() == left.tolist()
        assert torch.equal(store.keys(0), draw_rows(LAYOUT, 30, 0).key[left])
        monkeypatch.setattr(RamStore, "chunks", None)
        monkeypatch.setattr(RamStore, "column", None)
        ids = append(store, 4, seed=1)
        assert torch.equal(store.keys(0)[-4:], draw_rows(LAYOUT, 4, 1).key)
        assert store.snapshot().chunks(0, "key")
        assert ids.tolist() == store.ids(0)[-4:].tolist()


class TestSharing:
    def test_forks_share_tiers_and_not_their_new_rows(self):
        store = tiered(device_bytes=10**5)
        ids = append(store, 10)
        fork = store.fork()
        forks_fork = fork.fork()
        snapshot = fork.snapshot()
        assert {int(one.lineage.owners[-1]) for one in (store, fork, forks_fork)} == {0}, "none was written yet"
        stores = (store, fork, forks_fork)
        for seed, one in enumerate(stores, 1):
            assert append(one, 5, seed).tolist() == list(range(10, 15))
        again = fork.fork()
        for _ in range(2):
            for seed, one in ((1, store), (2, fork), (3, forks_fork), (2, again)):
                expected = MemoryRows.cat([draw_rows(LAYOUT, 10, 0), draw_rows(LAYOUT, 5, seed)])
                assert_same(one.gather(0, one.ids(0)), expected)
        assert store.tiers()[2].hits == 0
        before = again.tiers()[0].hits
        again.gather(0, ids)
        assert store.tiers()[0].hits - before == 10
        store.remove(0, ids[:5])
        assert len(fork.gather(0, ids)) == 10
        fork.restore(snapshot)
        assert append(fork, 3, seed=4).tolist() == [15, 16, 17]
        assert append(store, 3, seed=5).tolist() == [15, 16, 17]
        assert_same(fork.gather(0, fork.ids(0)), MemoryRows.cat([draw_rows(LAYOUT, 10, 0), draw_rows(LAYOUT, 3, 4)]))
        assert_same(store.gather(0, store.ids(0)[-3:].contiguous()), draw_rows(LAYOUT, 3, 5))

    def test_another_dtype_has_tiers_of_its_own(self):
        store = tiered(device_bytes=10**5)
        ids = append(store, 10)
        half = store.to(dtype=torch.bfloat16)
        assert half.shared is not store.shared
        assert torch.equal(half.gather(0, ids).hidden, store.gather(0, ids).hidden.bfloat16())
        assert half.keys(0).dtype == torch.bfloat16
        assert store.to("cpu").shared is store.shared

    def test_a_snapshot_of_another_store_is_refused(self):
        store = tiered()
        append(store, 3)
        for other in (store.fork(), tiered(), RamStore(LAYOUT)):
            with pytest.raises(MemoryMismatchError, match="snapshot of this store"):
                store.restore(other.snapshot())
        assert store.count(0) == 3

    @pytest.mark.parametrize("step", ["appended", "removed"])
    def test_an_interrupted_change_leaves_no_wrong_columns(self, monkeypatch, step):
        store = tiered(device_bytes=10**5)
        append(store, 10)
        snapshot = store.snapshot()

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ResidentColumns, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                append(store, 5, seed=1) if step == "appended" else store.remove(0, store.ids(0)[2:5])
        rows = MemoryRows.cat([draw_rows(LAYOUT, 10, 0), draw_rows(LAYOUT, 5, 1)])
        left = torch.arange(15) if step == "appended" else torch.tensor([0, 1, *range(5, 10)])
        assert store.ids(0).tolist() == left.tolist()
        assert_same(store.gather(0, left), rows.select(left))
        store.restore(snapshot)
        assert store.ids(0).tolist() == list(range(10))
        with pytest.raises(KeyError, match="12"):
            store.gather(0, torch.tensor([12]))

    def test_an_interrupted_restore_leaves_no_wrong_columns(self, monkeypatch):
        store = tiered(device_bytes=10**5)
        append(store, 10)
        snapshot = store.snapshot()
        append(store, 5, seed=1)
        assert len(store.keys(0)) == 15
        restore = RamStore.restore

        def interrupted(own, view):
            restore(own, view)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RamStore, "restore", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.restore(snapshot)
        assert torch.equal(store.keys(0), draw_rows(LAYOUT, 10, 0).key)

    def test_snapshots_are_read_while_rows_come_and_go(self):
        store = tiered(device_bytes=2000, host_bytes=3000)
        append(store, 60)
        snapshot, expected = store.snapshot(), draw_rows(LAYOUT, 60, 0)

        def read(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(60):
                ids = torch.randint(60, (20,), generator=generator)
                assert_same(snapshot.gather(0, ids), expected.select(ids))

        with ThreadPoolExecutor(3) as threads:
            readers = [threads.submit(read, seed) for seed in range(3)]
            for seed in range(40):
                append(store, 3, seed)
                store.remove(0, store.ids(0)[:3])
                store.gather(0, store.ids(0)[:40:7].contiguous())
            for reader in readers:
                reader.result()
        rest = MemoryRows.cat([draw_rows(LAYOUT, 3, seed) for seed in range(20, 40)])
        assert_same(store.gather(0, store.ids(0)), rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_bytes": "much"}, "device_bytes must be a whole number of bytes"),
        ({"host_bytes": -1}, "host_bytes must be a whole number of bytes"),
        ({"host_bytes": False}, "host_bytes must be"),
        ({"small_share": 1}, r"small_share must be .* below 1, got 1"),
        ({"inner": 3}, "a name or a table"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        TieredStore.Options(**options)


def test_budgets_can_be_written_with_units():
    assert [report.budget for report in tiered(device_bytes="2KiB", host_bytes="1kB").tiers()] == [2048, 1000, None]


def test_a_memory_reads_the_same_through_tiers():
    model = tiny.variant("paper")
    store = {"name": "tiered", "inner": "mmap", "device_bytes": "8KiB", "host_bytes": "16KiB"}
    memories = [model.new_memory(store=store), model.new_memory()]
    for number in range(12):
        for memory in memories:
            memory.write(tiny.ids(40, number), source=f"{number % 3}")
    prompt = tiny.prompts(1)
    with torch.no_grad():
        for _ in range(2):
            one, other = (model(prompt, memory=memory).logits for memory in memories)
            assert torch.equal(one, other)
    device, host, below = memories[0].stores[0].tiers()
    assert device.hits > 0
    assert device.hits + host.hits + below.hits > 0
    assert attrs.evolve(below, name="ram").budget is None
    for memory in memories:
        memory.forget("1")
    assert tiny.difference(tiny.content(memories[0]), tiny.content(memories[1])) == []
