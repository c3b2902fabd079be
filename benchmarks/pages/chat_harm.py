"""The section about what an unrelated memory does to the reading of other text, of ``docs/benchmarks/chat.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import measured_on, table

AIM = 0.5
"""Percent of perplexity that the project wants an unrelated memory to cost at most."""


def unharmed(record: Mapping[str, Any]) -> str:
    """Return the section of the record of ``benchmarks.quality.chat_harm``."""
    memories = record["memories"]
    first = memories["with the threshold"]
    rows, said = [], []
    for name, facts in memories.items():
        change = facts["change_percent"]["unrelated"]
        low, high = change["interval"]
        nothing, identical = facts["pieces_without_chunks"], facts["of_these_identical"]
        alone, beside = (facts["perplexity"][way] for way in ("none", "unrelated"))
        changed = f"{change['percent']:+.2f} % ({low:+.2f} to {high:+.2f})"
        rows.append([name, f"{alone:.2f}", f"{beside:.2f}", changed, f"{nothing} of {facts['pieces']}", str(identical)])
        reached = "reached" if change["percent"] <= AIM else "not reached"
        said.append(f"- {name}: the aim of at most +{AIM} % is {reached}")
    head = [
        "threshold",
        "perplexity alone",
        "beside the memory",
        "change (95 %)",
        "read nothing",
        "of these, identical",
    ]
    settings, written = first["settings"], first["unrelated_tokens_written"]
    opening = (
        f"Perplexity of {first['pieces']} pieces of `{record['text']}`, of {settings['text_tokens']} tokens each, "
        f"behind {settings['known_tokens']} that are known and ask; with {written:,} tokens of `{record['unrelated']}` "
        "in memory (`kv`). Where nothing passes the threshold nothing is read, and the decoder computes bit for bit "
        "what it computes alone."
    )
    before, after = record["load_average"]
    where = measured_on(
        {"circumstances": first["circumstances"]},
        "quality/chat-harm",
        f"load average {before} before and {after} after",
    )
    return "\n\n".join(["## An unrelated memory", opening, table(head, rows), "\n".join(said), where])
