"""The page ``docs/field.md``: memories of the field side by side, from the record of ``benchmarks.quality.field``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.pages.field_chat import chat_sections
from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "field.md"
ORACLE = "-oracle"
"""Ends the name of an arm for which the right passage is found."""
TRACES, CASES = "traces of the published code", "cases computed from its description"
MEMORIES = (
    ("mplus", "M+, 2502.00592", "mplus", TRACES),
    ("memoryllm", "MemoryLLM, 2402.04624", "mplus", TRACES),
    ("kv", "keys and values of tokens", "mplus", "plain references"),
    ("memlong", "MemLong, 2408.16967", "plugins/mplus-memlong", TRACES),
    ("longmem", "LongMem, 2306.07174", "plugins/mplus-longmem", TRACES),
    ("hmt", "HMT, 2405.06067", "plugins/mplus-hmt", TRACES),
    ("lamemo", "LaMemo, 2204.07341", "plugins/mplus-lamemo", TRACES),
    ("memllm", "MemLLM, 2404.11672", "plugins/mplus-memllm", CASES),
    ("retllm", "RET-LLM, 2305.14322", "plugins/mplus-retllm", CASES),
    ("scm", "SCM, 2304.13343", "plugins/mplus-scm", CASES),
)
"""Name, paper with its number at arXiv, package, and what judges it."""
PREAMBLE = """
# The field, side by side

Each memory here is one word in a config, with the same `write`, `save`, `forget`, `generate` and `train`. This page is
made from records by `python -m benchmarks.pages`; [Compare mechanisms](compare.md) says what such a comparison must
hold fixed.
"""
READINGS = {
    "none": "The question alone: what the decoder knows by itself.",
    "window": "The newest tokens as text. Exact, and gone at its edge. Take it where nothing older is asked for.",
    "bm25": "The passages that share words with the question, as text. Take it where the words of questions are those "
    "of the text, and prompts may be long.",
    "memoryllm": "A pool of hidden rows, of which a random few leave with every write. It keeps the gist of the "
    "newest text at a fixed size, and forgets by chance, the older the surer. Here it is M+ read without its long-term "
    "memory, by the decoder that was trained with it.",
    "mplus": "The same pool, and every row that leaves it in a long-term memory, with a trained retriever. It keeps "
    "what the writer learned to put into few rows, and loses what the retriever does not find. Take it where the "
    "decoder can be trained, and an answer may attend to few rows.",
    "kv": "Keys and values of all tokens, found again chunk by chunk. It keeps the text itself, in every layer, and "
    "needs no training; bytes grow with every token. Take it for a decoder that stays as it is.",
    "memlong": "Keys and values of one layer, found by an embedding of whole chunks and read by a few upper layers: "
    "one layer's bytes, where `kv` has those of all. Here the embedding is the decoder's own, and the layer that reads "
    "is trained, as in the paper. What it gets wrong was found, and stood among passages much like it.",
    "scm": "The text of turns: the last one always, the best of the others by their words or vectors. It keeps all "
    "text, and pays for what it brings back in prompt tokens. Take it for a chat model behind an interface that takes "
    "text alone.",
    "hmt": "One vector for each segment, recalled by cross-attention with a summary of the question. What does "
    "not fit into a vector is gone. It has to be trained with the decoder.",
    "longmem": "Keys and values of one layer of a frozen decoder, read by a side network behind a gate. The decoder "
    "stays bit for bit as it was; the side network has to be trained.",
    "lamemo": "A window whose places also look at what came after them. It is no long-term memory: beyond its edge "
    "nothing is kept, so that no training makes it answer what is older.",
    "retllm": "A table of triples, written and asked by calls that the decoder has to learn. Exact for what is a "
    "triple, and blind to everything else.",
    "memllm": "A store of triples with relations by name, asked by calls while text is generated. As `retllm`, with "
    "names that are matched by vectors.",
}
"""A plain reading of each memory, by its name: without numbers, which the tables have."""


def render() -> str:
    """Return the page."""
    record = load("quality", "field")
    sections = [PREAMBLE.strip(), memories(), retention(record), ceilings(record), costs(record)]
    sections += [chat_sections(load("quality", "field-chat")), readings(record)]
    return "\n\n".join(sections) + "\n"


def memories() -> str:
    """Tabulate the memories, where they come from and what judges them."""
    rows = [[f"`{name}`", paper, f"`{package}`", judge] for name, paper, package, judge in MEMORIES]
    closing = "`mplus replay` does the traces and the cases again, and says what differs and what could not be had."
    return "\n\n".join([table(["memory", "paper (arXiv)", "comes as", "judged by"], rows, text_columns=4), closing])


def arms(record: Mapping[str, Any], oracle: bool = False) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield each arm that was measured with its results, one for each seed; a memory's own before the next one's.

    Args:
        record: of the field.
        oracle: those for which the right passage is found, instead of all others.
    """
    for memory in record["memories"].values():
        for place, arm in enumerate(memory["reports"][0]["arms"] if memory["status"] == "measured" else ()):
            if arm["name"].endswith(ORACLE) == oracle:
                yield arm["name"], [report["arms"][place] for report in memory["reports"]]


def shares(name: str, found: list[Mapping[str, Any]], ages: list[str]) -> list[str]:
    """Return the row of an arm: its name, and the share of right answers at each age, over all seeds."""
    asked = {age: sum(one["questions_by_age"].get(age, 0) for one in found) for age in ages}
    right = {age: sum(one["correct_by_age"].get(age, 0) for one in found) for age in ages}
    return [f"`{name}`", *(f"{right[age] / asked[age]:.2f}" if asked[age] else "does not fit" for age in ages)]


def ceilings(record: Mapping[str, Any]) -> str:
    """Tabulate what memories answer where the right passage is found for them, or nothing else was told."""
    ages = [str(age) for age in record["settings"]["ages"]]
    of_arms = {name.removesuffix(ORACLE): shares(name, found, ages)[1:] for name, found in arms(record, oracle=True)}
    rows = []
    for name, memory in record["memories"].items():
        if memory["status"] == "measured":
            alone = memory["oracle"]["correct"] / memory["oracle"]["questions"]
            rows.append([f"`{name}`", f"{alone:.2f}", *of_arms.get(name, ["-"] * len(ages))])
    opening = (
        "How much of that is reading, and how much is finding? `told alone`: the memory holds nothing but the passage "
        "that is asked for. The other columns are of memories that bring rows back: the right passage is found for "
        "them, and beside it as many others, drawn at random, as they bring back in all."
    )
    head = ["memory", "told alone", *(f"{age} chunks" for age in ages)]
    return "\n\n".join(["## Where the right passage is found for them", opening, table(head, rows)])


def retention(record: Mapping[str, Any]) -> str:
    """Tabulate the share of right answers over age."""
    settings = record["settings"]
    ages = [str(age) for age in settings["ages"]]
    rows = [shares(name, found, ages) for name, found in arms(record)]
    rows += [[f"`{name}`", *([status] * len(ages))] for name, status in missing(record)]
    questions = settings["streams"] * settings["rounds"] * len(settings["seeds"])
    opening = (
        f"One fact is told in each chunk of {settings['chunk_tokens']} tokens, all of the same form, and asked for so "
        f"many chunks later. The share of right answers, generated greedily; {questions} questions for each age, over "
        f"{len(settings['seeds'])} seeds of the facts. Memories that need no training are read by the decoder of "
        "`recall-tiny`, which learned the language from a window of text and with M+; this favours M+, and the others "
        "show what they do for a decoder that has never seen them."
    )
    head = ["memory", *(f"{age} chunks" for age in ages)]
    where = next(memory for memory in record["memories"].values() if memory["status"] == "measured")
    closing = measured_on(where, "quality/field")
    return "\n\n".join(["## What is retained, over age", opening, table(head, rows), closing])


def missing(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the memories that were not measured, each with the reason in a few words."""
    return [(name, memory["status"]) for name, memory in record["memories"].items() if memory["status"] != "measured"]


def costs(record: Mapping[str, Any]) -> str:
    """Tabulate bytes, tokens attended, and tokens that go through the decoder."""
    rows = []
    for name, found in arms(record):
        own = record["memories"].get(name, {}).get("costs")
        counted = ["-", "-"]
        if own is not None:
            counted = [f"{own['layer_tokens_per_token_written']:.2f}", f"{own['layer_tokens_per_question']:.0f}"]
        size, attended = found[-1]["state_bytes"], found[-1]["tokens_attended"]
        rows.append([f"`{name}`", *("-" if one is None else f"{one:,}" for one in (size, attended)), *counted])
    rows += [[f"`{name}`", *([status] * 4)] for name, status in missing(record)]
    head = ["memory", "state bytes", "tokens attended", "written: per token", "read: per question"]
    opening = (
        "`state bytes` of one stream after everything was told; `tokens attended` of an answer's first token, rows and "
        "text together. The last two columns count tokens that go through a decoder layer, mean over layers: for each "
        "token that is written, and for one question with its first new token, which has "
        f"{_question_tokens(record):.0f} tokens itself. They do not depend on the machine; text without a memory is "
        "read in full with every question, and has no such numbers."
    )
    return "\n\n".join(["## What it takes", opening, table(head, rows)])


def _question_tokens(record: Mapping[str, Any]) -> float:
    return float(next(one["costs"]["question_tokens"] for one in record["memories"].values() if "costs" in one))


def readings(record: Mapping[str, Any]) -> str:
    """Tabulate what each memory keeps and forgets, and when to take it."""
    names = dict.fromkeys([*(name for name, _ in arms(record)), *record["memories"]])
    lines = [f"- **`{name}`** {READINGS[name]}" for name in names]
    return "\n\n".join(["## What each is for", "\n".join(lines)])
