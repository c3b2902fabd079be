"""Records as tables in plain text, for terminals and for pages."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define

from mplus.bench.record import Entry, RateFacts, Record, Section


@define(frozen=True)
class Table:
    """A table in plain text.

    Attributes:
        title: above it.
        head: of the columns.
        rows: as many cells each.
        notes: below it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(record: Record) -> list[Table]:
    """Return all tables of a record of any kind."""
    found = []
    for threads, section in record["by_threads"].items():
        where = f"{threads} thread" if threads == "1" else f"{threads} threads"
        found += [_with_machine(table, where, section["machine"]) for table in _KINDS[record["kind"]](record, section)]
    if record.get("growth"):
        found.append(_growth(record))
    return found


def opening(record: Record) -> str:
    """Return a line or two on where and with what a record was measured."""
    preset, where = record["preset"], record["circumstances"]
    commit = f"{where['commit']}{' with changes' if where.get('modified') else ''}"
    return (
        f"{preset['name']}: {preset['layers']} layers of width {preset['hidden_size']:,}, {preset['dtype']}, "
        f"{record['prefix_rows']:,} rows in front of the text, {preset['long_term_rows']:,} long-term rows. "
        f"{where['device']}; torch {where['torch']}, transformers {where['transformers']}, mplus {where['mplus']}, "
        f"commit {commit}, {where['date']}."
    )


def refused(record: Record) -> list[str]:
    """Return a line for every variant that has no speed."""
    return [
        f"{name}: {facts['status']}: {facts['reason']}"
        for name, facts in record["gate"].items()
        if facts["status"] != "ok"
    ]


def _with_machine(table: Table, where: str, machine: RateFacts) -> Table:
    rates = (
        f"the machine copies {machine['copy_gb_per_s']} GB/s, fills new memory at {machine['fresh_gb_per_s']} GB/s and "
        f"multiplies matrices at {machine['matmul_gflop_per_s']} GFLOP/s ({machine['matmul_dtype']})"
    )
    before, after = machine["load_average"]
    load = f"load average {before} before and {after} after"
    return Table(f"{table.title}, {where}", table.head, table.rows, (*table.notes, rates, load))


TIMES = ("p20 ms", "p50 ms", "p80 ms")


def _times(entry: Entry) -> tuple[str, str, str]:
    if entry["status"] != "ok":
        return (entry["status"], "-", "-")
    return (f"{entry['p20_ms']:.3f}", f"{entry['p50_ms']:.3f}", f"{entry['p80_ms']:.3f}")


def _share(entry: Entry) -> str:
    share = entry.get("share_of_roofline")
    return "-" if share is None else f"{share:.1%}"


def _over(entry: Entry, base: Entry | None) -> str:
    """Return the median as a multiple of another variant's."""
    if base is None or entry["status"] != "ok" or base["status"] != "ok":
        return "-"
    return f"{entry['p50_ms'] / base['p50_ms']:.2f}"


def _ratios(found: Mapping[str, float | None]) -> str:
    said = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in found.items() if value is not None]
    return "; ".join(said) or "no ratios"


def _read(record: Record, section: Section) -> list[Table]:
    found = []
    for length, facts in section["by_length"].items():
        arms = facts["arms"]
        rows = tuple((name, *_times(entry), _over(entry, arms.get("floor"))) for name, entry in arms.items())
        notes = (
            f"medians of ratios within a round, backend {facts['best_backend']}: {_ratios(facts['ratios'])}",
            f"the floor attends with: {facts['floor_attention'].get('won', '-')}",
        )
        title = f"Reading {length} tokens"
        found.append(Table(title, ("variant", *TIMES, "times the floor"), rows, notes))
    return [*found, *_decode(record, section["decode"])]


def _decode(record: Record, section: Section) -> list[Table]:
    arms = section["arms"]
    rows = tuple((name, *_times(entry), _over(entry, arms.get("floor")), _share(entry)) for name, entry in arms.items())
    title = f"One token behind a prompt of {record['preset']['prompt']}"
    head = ("variant", *TIMES, "times the floor", "of the roofline")
    return [Table(title, head, rows, (f"backend {section['best_backend']}: {_ratios(section['ratios'])}",))]


def _write(record: Record, section: Section) -> list[Table]:
    rows = tuple(
        (name, *_times(entry), _rate(entry.get("tokens_per_s")), _rate(entry.get("rows_per_s")))
        for name, entry in section["arms"].items()
    )
    settings = record["settings"]
    title = f"Writing {settings['chunk_tokens']} tokens to each of {settings['streams']} memories"
    head = ("variant", *TIMES, "tokens/s", "rows/s")
    return [Table(title, head, rows, (f"backend {section['best_backend']}: {_ratios(section['ratios'])}",))]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _score(record: Record, section: Section) -> list[Table]:
    found = []
    for keys, by_length in section["by_rows"].items():
        rows = tuple(
            (length, name, *_times(entry), _share(entry))
            for length, facts in by_length.items()
            for name, entry in facts["arms"].items()
            if entry["status"] == "ok"
        )
        title = f"Scoring {int(keys):,} rows by keys of width {record['settings']['width']}"
        notes = ("the roofline is that of memory: keys that stay in caches can be faster",)
        found.append(Table(title, ("queries", "score and variant", *TIMES, "of the roofline"), rows, notes))
    return found


def _attention(record: Record, section: Section) -> list[Table]:
    found = []
    for case in section["cases"]:
        arms = case["arms"]
        best = arms.get(case["best_of_torch"])
        rows = tuple((name, *_times(entry), _over(entry, best), _share(entry)) for name, entry in arms.items())
        title = f"Attention of {case['queries']} queries over {case['memory_rows']:,} rows and {case['text_keys']} keys"
        found.append(Table(title, ("variant", *TIMES, "times the best of torch", "of the roofline"), rows))
    return found


def _growth(record: Record) -> Table:
    columns = ("read/sigmoid_mean", "select/sigmoid_mean", "read/mean_dot", "select/mean_dot", "floor")
    rows = []
    for point in record["growth"]:
        size = (f"{point['written_tokens']:,}", f"{point['short_term_rows']:,}", f"{point['long_term_rows']:,}")
        arms = point.get("arms", {})
        rows.append((*size, *(f"{arms[name]['p50_ms']:.3f}" if name in arms else "-" for name in columns)))
    missing = [point["reason"] for point in record["growth"] if point["status"] != "ok"]
    title = f"Reading {record['preset']['prompt']} tokens after more and more was written, medians in ms"
    head = ("tokens written", "short-term rows", "long-term rows", *columns)
    return Table(title, head, tuple(rows), ("select: scoring and picking alone, in all layers", *missing))


def _store(record: Record, section: Section) -> list[Table]:
    settings, arms = record["settings"], section["arms"]
    rows = tuple(
        (kind, f"{int(count):,}", *_times(arms[f"{kind}/{count}"]))
        for kind, _, count in (name.partition("/") for name in arms)
    )
    title = f"Changing a layer of the store {settings['store']} by {settings['rows_per_chunk']} rows"
    note = f"rows of {settings['row_bytes']:,} bytes; medians of ratios within a round: {_ratios(section['ratios'])}"
    return [Table(title, ("change", "rows of the layer", *TIMES), rows, (note,))]


_KINDS = {"read": _read, "decode": _decode, "write": _write, "score": _score, "attention": _attention, "store": _store}
