"""The numbers that the README quotes, from the records of ``chat_demo``, ``recall`` and ``demo``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.pages.quality import accuracies, pooled
from benchmarks.records import ROOT, load

PAGE = ROOT / "README.md"


def render(page: str) -> str:
    """Return the README with the quotes of the newest records."""
    page = replace(page, "chat", chat(load("quality", "chat-demo")))
    page = replace(page, "recall", recall(load("quality", "recall-tiny")))
    return replace(page, "demo", demo(load("speed", "demo")))


def replace(page: str, mark: str, quote: str) -> str:
    """Put a quote between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    between = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->\n)", re.DOTALL)
    return between.sub(lambda _: quote, page)


def chat(record: Mapping[str, Any]) -> str:
    """Return what is said of ``mplus demo``."""
    memory, nothing, window, found = record["arms"]
    asked, again = len(memory["said"]), record["reopened"]["said"]
    same = sum(one["text"] == before["text"] for one, before in zip(again, memory["said"], strict=False))
    late = {arm["name"]: f"{arm['first_seconds'] / nothing['first_seconds']:.1f}" for arm in record["arms"]}
    text = (
        f"`mplus demo`: SmolLM2-135M-Instruct, as it comes, reads {record['tokens']:,} tokens of a novel, with notes "
        f"and a conversation about people in it, and keeps them as `{record['mechanism']}` in "
        f"{memory['bytes'] / 2**20:,.0f} MiB (float32). Asked {asked} questions about the people, it gives "
        f"**{memory['right']} right answers from memory**; without it {nothing['right']}, with the last "
        f"{window['text_tokens']:,} tokens in its window {window['right']}, with the pieces that memory found put into "
        f"the prompt as text {found['right']}. A new process that opens the memory answers {same} of {len(again)} "
        f"questions word for word the same. The first token takes {late[memory['name']]} times as long as without "
        f"memory, behind the full window {late[window['name']]} times, once that was read. — {record['device']}, "
        f"{record['threads']} thread{'s' * (record['threads'] > 1)}, torch {record['torch']}; {time_taken(record)}."
    )
    return "".join(f"> {line}\n" for line in textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False))


def time_taken(record: Mapping[str, Any]) -> str:
    """Return how long the demo took, or that other work took part of the machine."""
    load = record["load_average"][0]
    if load > record["threads"]:
        return f"the machine had other work (load average {load:.0f}), so no times are given"
    return f"{record['seconds']:.0f} s for the whole demo"


def recall(record: Mapping[str, Any]) -> str:
    """Return what is said of ``mplus demo --recall``."""
    report, seeds = pooled(record), record["seeds"]
    memory = report.arm("mplus")
    old = memory.at(128), report.arm("memoryllm").at(128), report.arm("mplus-random").at(128)
    worst = min(accuracies(facts)["mplus"]["128"] for facts in seeds.values())
    last, lost, drawn = (cell.accuracy if cell is not None else float("nan") for cell in old)
    lines = [
        f"`mplus demo --recall`: a decoder of {record['parameters']:,} parameters, trained in minutes on a CPU, is",
        f"told facts once. 128 chunks (2,048 tokens, a fact in each) later it answers {last:.1%} of the questions from",
        f"memory, attending to {memory.tokens_attended} rows and tokens; without long-term memory {lost:.1%}, with",
        f"random retrieval {drawn:.1%}, by chance {report.chance:.1%}. {len(seeds)} seeds, the worst at {worst:.1%}:",
        "see [Benchmarks](docs/benchmarks/index.md).",
    ]
    return "".join(f"> {line}\n" for line in lines)


def demo(record: Mapping[str, Any]) -> str:
    """Return what is said of ``mplus demo-novel``."""
    layer, write, read, saved = record["layers"][0], record["write"], record["read"], record["saved"]
    rows = layer["short_term"] + layer["pending"] + layer["long_term"]
    pairs = list(zip(saved["here"]["tokens"], saved["in_new_process"]["tokens"], strict=True))
    return (
        f"> `mplus demo-novel`: a decoder of {record['parameters']:,} parameters reads all of "
        f"*{record['novel'].partition(' (')[0]}*, {record['tokens']:,} tokens.\n"
        f"> It writes {write['tokens_per_second']:,.0f} tokens/s into memory "
        f"(the decoder alone runs over them at {write['base_tokens_per_second']:,.0f}) and keeps\n"
        f"> {rows:,} rows per layer, {record['bytes'] / 2**20:.0f} MiB. With retrieval from all of it, "
        f"it reads {read['tokens_per_second']:,.0f} tokens/s\n"
        f"> (alone: {read['base_tokens_per_second']:,.0f}). Saved and loaded in a new process, it generates the same "
        f"{sum(a == b for a, b in pairs)} of {len(pairs)} tokens.\n"
        f"> — {record['device']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}, "
        f"torch {record['torch']}; {record['seconds']:.0f} s for the whole demo.\n"
    )
