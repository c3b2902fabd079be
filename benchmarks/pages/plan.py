"""The page ``docs/plan.md``: what 10, 1,000 and 100,000 users need, by arithmetic from records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from attrs import define

from benchmarks.pages.markdown import table
from benchmarks.pages.memory import LLAMA3_8B
from benchmarks.records import ROOT, load, record_path
from mplus.stores.ram import RamStore

PAGE = ROOT / "docs" / "plan.md"
USERS = (10, 1_000, 100_000)
TOLD = 20_000
"""Tokens that each user has told."""
ACTIVE = 20
"""One user of so many asks something in the busiest minute."""
ANSWER, PER_MINUTE = 200, 1
"""Tokens of an answer, and answers a minute of a user who is active."""
PREAMBLE = f"""
# Plan for many users

What a server for 10, 1,000 or 100,000 users needs, by arithmetic from the records in `benchmarks/`, and what has to
change on the way. How a server is started: [Many users at once](many-users.md). This page is made by `python -m
benchmarks.pages`; its assumptions are

- every user has told {TOLD:,} tokens, an hour's reading;
- in the busiest minute one user in {ACTIVE} asks something: the memories that are open then;
- an answer has {ANSWER} tokens.

With other numbers for yours, scale the tables: all of them are proportional.
"""
STATE = """
A user's state is a directory: rows or keys and values, names of sources, and a journal. It lies on the disk at all
times, and in RAM while the memory is open, whole with the store `ram`, in part with `mmap`. An open memory takes two
file descriptors, a memory that is not open none. A running answer has a row in the batch's buffer besides: as many keys
and values as prompt, answer and retrieved rows have tokens.
"""
CHANGES = {
    "server": [
        "`mplus serve`, no keys on loopback",
        "one `mplus serve` with keys, or a few engines on one machine with `--ray`",
        "`mplus serve --ray` over several machines",
    ],
    "memories open": [
        "all",
        "as many as `--open` and `--ram` allow, the least recently used are closed",
        "the same in every engine; engines by the tables above",
    ],
    "file descriptors": [
        "no concern",
        "two for each open memory: raise `ulimit -n` over twice `--open`",
        "the same in every engine",
    ],
    "disk": [
        "the machine's own",
        "the machine's own SSD: acknowledged means synced, so its latency is the user's",
        "a file system that all engines share, or a part of the users for every machine, each with a disk of its own",
    ],
    "locks": [
        "one process has all",
        "one process has all",
        "one engine owns a memory at a time: rendezvous hashing over the live engines, `flock` against mistakes",
    ],
    "a crash": [
        "the server starts again and replays journals",
        "the same; `Idempotency-Key` makes retries safe",
        "users of the lost engine move to others at once; what is on the disk is there",
    ],
    "limits": [
        "none needed",
        "memories, bytes and waiting requests per tenant",
        "the same; `--tenant-disk` bounds what one may cost",
    ],
    "copies": [
        "copy the folder while the server is down",
        "`export` while it runs; a snapshot of the file system",
        "snapshots; `export` of one user's memory is what to hand out",
    ],
}
"""What is so for each of ``USERS``."""
PLACEMENT = """
**One owner.** A memory has one writer. On Ray every front computes the owner of a memory from its id and the list of
live engines (highest hash of both); nothing is written down and nobody has to agree. When an engine comes or goes, one
memory in as many as there are engines moves. The new owner opens it when it is first asked for; a memory that its
old owner still holds is asked back, which it gives as soon as nothing reads it.

**Shared disks.** What several machines share must have `flock` that is released when a process dies, `fsync` that means
it, and renames that others see at once. A local disk has. NFS (version 4 maps `flock` to locks of the server, which
last as long as the lease of a client that died), CephFS and Lustre were **not tested**; until they are, give each
machine its own part of the users: a front that sends a tenant to the machine that is written down for it, each with one
server and a local disk. Nothing in mplus has to change for that.

**Hot users.** One memory is read by any number of answers at once in one engine, and written in order. A memory that
needs more than one engine's tokens per second must be forked into copies that are read only.
"""


@define(frozen=True)
class State:
    """What a kind of memory takes.

    Attributes:
        name: for the table.
        bytes_per_token: on the disk, of text that was written.
        source: the record, or the arithmetic.
    """

    name: str
    bytes_per_token: float
    source: str


def states() -> list[State]:
    """Return what memories take, from records; of a decoder that was not run, by arithmetic from its shape."""
    kv, demo, million = load("speed", "kv_writing"), load("speed", "demo"), load("memory", "million")
    room = kv["novel"]["room"]
    cache, saved = room["cache_bytes_per_token_bfloat16"], room["bfloat16"]["saved"]
    chat = load("quality", "chat-demo")
    large = 2 * 2 * LLAMA3_8B.layers * 8 * 128
    row = RamStore(LLAMA3_8B).bytes_per_row * LLAMA3_8B.layers
    return [
        State("`kv`, SmolLM2-135M, bfloat16", cache * saved, "`speed/kv_writing`"),
        State("`kv`, SmolLM2-135M, float32", chat["arms"][0]["bytes"] / chat["tokens"], "`quality/chat-demo`, in RAM"),
        State("`kv`, shape of Llama-3.1-8B, bfloat16", large * saved, "arithmetic; not run"),
        State("`mplus`, shape of Llama-3.1-8B, bfloat16, 256 rows for 512 tokens", row / 2, "arithmetic; not run"),
        State("`mplus`, recall-tiny, on disk", million["disk_bytes"] / million["tokens"], "`memory/million`"),
        State("`mplus`, stories260K, 32 rows for 256 tokens", demo["saved"]["bytes"] / demo["tokens"], "`speed/demo`"),
    ]  # fmt: skip


def render() -> str:
    """Return the page."""
    return (
        "\n\n".join(
            [
                PREAMBLE.strip(),
                f"## State per user\n\n{STATE.strip()}\n\n{per_user()}",
                f"## Disk and RAM\n\n{by_users()}",
                f"## Tokens per second and cost\n\n{cost()}",
                f"## What changes\n\n{changes()}",
                f"## Placement and locks\n\n{PLACEMENT.strip()}",
            ]
        )
        + "\n"
    )


def changes() -> str:
    """Tabulate what changes on the way."""
    return table(["", *(f"{users:,} users" for users in USERS)], [[what, *each] for what, each in CHANGES.items()], 4)


def per_user() -> str:
    """Tabulate the bytes of a token and of a user."""
    rows = [
        [state.name, f"{state.bytes_per_token:,.0f}", amount(state.bytes_per_token * TOLD), state.source]
        for state in states()
    ]
    return table(["memory", "bytes a token", f"a user ({TOLD:,} tokens)", "from"], rows).replace(
        "---: |\n", "--- |\n", 1
    )


def by_users() -> str:
    """Tabulate the disk of all users, and the RAM of those who are active."""
    rows = []
    for state in states():
        each = state.bytes_per_token * TOLD
        rows.append(
            [state.name, *(f"{amount(each * users)} / {amount(each * open_memories(users))}" for users in USERS)]
        )
    head = ["all on the disk / open in RAM (store `ram`)", *(f"{users:,} users" for users in USERS)]
    closing = (
        f"Open at once: {', '.join(f'{open_memories(users):,}' for users in USERS)}. With the store `mmap` long-term "
        "rows stay in files, and RAM holds what was read lately; with `quantized` rows take about half. A memory of "
        "`kv` keeps every token: with `long_term_tokens` or `bytes_budget` a user costs what you say."
    )
    return f"{table(head, rows)}\n\n{closing}"


def cost() -> str:
    """Say what answers cost: how many engines, from the tokens per second of the record, if there is one."""
    wanted = {users: math.ceil(users / ACTIVE) * PER_MINUTE * ANSWER / 60 for users in USERS}
    lines = [
        "Engines = the larger of (tokens asked for per second / tokens per second of one engine) and (bytes of open "
        "memories / RAM of one machine). Asked for, by the assumptions above: "
        + ", ".join(f"{tokens:,.0f} tokens/s for {users:,} users" for users, tokens in wanted.items())
        + ". Cost = engines x price of a machine, and the disk."
    ]
    record = load("serving", "load") if record_path("serving", "load").exists() else None
    lines.append(throughput(record, wanted))
    return "\n\n".join(lines)


def throughput(record: Mapping[str, Any] | None, wanted: Mapping[int, float]) -> str:
    """Say how many engines of the kind that was measured would do."""
    if record is None:
        return (
            "Not measured yet: tokens per second of one engine (`benchmarks/serving/records/load.json`). Measure them "
            "on your machine, with your decoder: small ones on a CPU say nothing about large ones on a GPU."
        )
    most = f"users {max(record['settings']['users'])}"
    measured = median(one[most]["tokens_per_second"] for one in record["rounds"])
    engines = ", ".join(f"{math.ceil(tokens / measured):,} for {users:,} users" for users, tokens in wanted.items())
    return (
        f"One engine gave {measured:,.0f} tokens/s with the decoder and machine of `serving/load`; at that rate, "
        f"engines by tokens alone: {engines}. Measure it with your decoder: small ones on a CPU say nothing about "
        "large ones on a GPU."
    )


def open_memories(users: int) -> int:
    """Return how many memories are open in the busiest minute."""
    return math.ceil(users / ACTIVE)


def amount(count: float) -> str:
    """Return bytes as text with three digits."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = min(len(units) - 1, int(math.log2(max(count, 1)) / 10))
    scaled = count / 2 ** (10 * power)
    return f"{scaled:,.0f} {units[power]}" if scaled >= 1000 else f"{scaled:.3g} {units[power]}"
