"""Write ``docs/results.md``, its figure and what the README quotes from records.

python -m benchmarks.pages.results
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.records import ROOT, load
from mplus.evaluation.reports.plots import draw
from mplus.evaluation.reports.pooling import pool
from mplus.evaluation.reports.report import Report

PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "assets" / "recall-tiny.svg"
README = ROOT / "README.md"
QUOTE = re.compile(r"(?<=<!-- recall -->\n).*?(?=<!-- /recall -->\n)", re.DOTALL)
AGES = ("0", "1", "4", "8", "16", "32", "64", "128")


def pooled(record: dict[str, Any]) -> Report:
    """All seeds of a recall record as one report."""
    return pool([Report.from_plain(facts["retention"]) for facts in record["seeds"].values()])


def accuracies(facts: dict[str, Any], part: str = "retention") -> dict[str, dict[str, float]]:
    """Arm -> age -> accuracy of one seed."""
    return {arm["name"]: arm["accuracy_by_age"] for arm in facts[part]["arms"]}


def recall_tiny(record: dict[str, Any]) -> str:
    """The section on recall-tiny."""
    report, seeds = pooled(record), record["seeds"]
    first = next(iter(seeds.values()))
    settings = first["retention"]["settings"]
    head = f"| arm | {' | '.join(AGES)} | state per stream | attended |"
    rows = [head, "| --- |" + " ---: |" * (len(AGES) + 2)]
    for arm in report.arms:
        if arm.status == "ok":
            cells = [arm.at(int(age)) for age in AGES]
            shares = [f"{cell.accuracy:.3f}" if cell else "-" for cell in cells]
            kept = f"{arm.state_bytes:,} bytes" if arm.state_bytes is not None else "-"
            rows.append(f"| {arm.name} | {' | '.join(shares)} | {kept} | {arm.tokens_attended} |")
    for curve in report.theory:
        shares = [f"{curve.accuracy_by_age[int(age)]:.3f}" for age in AGES]
        rows.append(f"| *{curve.name}, theory* | {' | '.join(shares)} | | |")
    missing = [f"- {arm.name}: {arm.status}: {arm.reason}" for arm in report.arms if arm.status != "ok"]
    where = first["circumstances"]
    commits = ", ".join(sorted({facts["circumstances"]["commit"] for facts in seeds.values()}))
    opening = (
        f"A decoder of {record['parameters']:,} parameters learns from nothing to answer from memory. "
        f"{len(seeds)} seeds that nothing was chosen by{_looked_at(record)}; "
        f"{report.arm('mplus').cells[0].questions:,} questions at each age in all, "
        f"{settings['people']:,} people in four relations, chance {report.chance:.3f}. "
        "Age is in chunks of 16 tokens told since the fact."
    )
    closing = (
        f"Measured on {where['device']}, torch {where['torch']}, transformers {where['transformers']}, commits "
        f"{commits}; the seconds are those of a shared machine. Settings and "
        "every number: `benchmarks/quality/records/recall-tiny.json`, made by `python -m benchmarks.quality.recall`."
    )
    parts = [
        "## recall-tiny",
        opening,
        "![Accuracy over age of every arm](assets/recall-tiny.svg)",
        "\n".join(rows),
        "\n".join(["Not in the table:", "", *missing]) if missing else "",
        "Every seed by itself:",
        _seeds(seeds),
        _health(first["health"]),
        _abstention(seeds),
        closing,
    ]
    return "\n\n".join(part for part in parts if part)


def _looked_at(record: dict[str, Any]) -> str:
    seeds = record.get("seeds_looked_at")
    return f" (the recipe was made with {', '.join(map(str, seeds))})" if seeds else ""


def _seeds(seeds: dict[str, Any]) -> str:
    names = ("memoryllm", "mplus-random", "mplus-oracle")
    rows = [
        "| seed | training, seconds | steps | restarts | mplus at 128 | lowest mplus | lowest, people never seen | "
        + " | ".join(f"{name} at 64" for name in names)
        + " | window |",
        "| ---: |" + " ---: |" * 9 + " --- |",
    ]
    for seed, facts in seeds.items():
        arms, held = accuracies(facts), accuracies(facts, "held_out")["mplus"]
        window = next(arm for arm in facts["retention"]["arms"] if arm["name"] == "window")
        others = " | ".join(f"{arms[name]['64']:.3f}" for name in names)
        told = f"{arms['mplus']['128']:.3f} | {min(arms['mplus'].values()):.3f} | {min(held.values()):.3f}"
        run = f"{facts['seconds']:.0f} | {facts['steps']:,} | {facts['restarts']}"
        rows.append(f"| {seed} | {run} | {told} | {others} | {window['status']} |")
    return "\n".join(rows)


def _health(health: dict[str, Any]) -> str:
    rows = ["| K0 | retriever | gold recall, layer 0 / 1 | any useful row | accuracy | with a hit | without |"]
    rows.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for k, found in health["by_retrieved_tokens"].items():
        for name, facts in found.items():
            recall = " / ".join(f"{share:.3f}" for share in facts["gold_recall_by_layer"])
            useful = " / ".join(f"{share:.3f}" for share in facts["any_useful_row_by_layer"])
            hit, miss = (
                "-" if facts[key] is None else f"{facts[key]:.3f}"
                for key in ("accuracy_with_hit", "accuracy_without_hit")
            )
            rows.append(f"| {k} | {name} | {recall} | {useful} | {facts['accuracy']:.3f} | {hit} | {miss} |")
    return (
        f"Retriever health of the first seed, ages {health['ages']}, {health['long_term_rows']} long-term rows per "
        f"layer; trained with K0 = {health['trained_with']}; standard deviation of the scores "
        f"{' / '.join(map(str, health['logit_std_by_layer']))}:\n\n" + "\n".join(rows)
    )


def _abstention(seeds: dict[str, Any]) -> str:
    names = list(next(iter(seeds.values()))["abstention"]["features"])
    rows = [
        "| seed | " + " | ".join(names) + " | all together | abstains, answers | says *unknown*, untold / told |",
        "| ---: |" + " ---: |" * (len(names) + 3),
    ]
    for seed, facts in seeds.items():
        found = facts["abstention"]
        each = " | ".join(f"{found['features'][name]['auroc']:.4f}" for name in names)
        combined, said = found["combined"], found["said_unknown"]
        rows.append(
            f"| {seed} | {each} | {combined['auroc']:.4f} | {combined['abstention_accuracy']:.3f}, "
            f"{combined['answered']:.3f} | {said['of_untold']:.3f} / {said['of_told']:.3f} |"
        )
    return (
        "Knowing what is not there: AUROC of each sign for whether a fact was told, and of a logistic regression over "
        "all, calibrated on other streams; half of the questions are about facts never told:\n\n" + "\n".join(rows)
    )


def others() -> list[str]:
    """Sections on what else was measured, each as far as its record exists."""
    speed = load("speed", "batched_training")
    rows = ["| decoder | ratio | samples/s, batch and one | tokens/s, batch and one |", "| --- | ---: | ---: | ---: |"]
    for name, facts in speed.items():
        if isinstance(facts, dict) and "ratio" in facts:
            samples, tokens = facts["samples_per_second"], facts["tokens_per_second"]
            rows.append(
                f"| {name} | {facts['ratio']} | {samples['batch']:,} and {samples['one']:,} | "
                f"{tokens['batch']:,} and {tokens['one']:,} |"
            )
    return [
        "## recall-long\n\n" + load("quality", "recall-long")["text"],
        "## stories\n\n" + load("quality", "stories")["text"],
        f"## Training many memories at once\n\n{speed['streams']} streams per step against one, same objective, "
        "chunks and number of steps, interleaved in one run "
        f"({speed['circumstances']['device']}, {speed['circumstances']['threads']} thread(s)).\n\n" + "\n".join(rows),
        "## Scores of the retriever\n\n" + scores(load("quality", "scores")),
    ]


def scores(record: dict[str, Any]) -> str:
    """The table of scores and losses."""
    rows = [
        "| language | score, loss | seed | at 8 | at 32 | at 128 | oracle at 128 | gold recall, layer 0 / 1 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    where: dict[str, Any] = {}
    for language, ways in record.items():
        for way, seeds in ways.items():
            for seed, found in seeds.items():
                shares = " | ".join(f"{found['mplus'][age]:.3f}" for age in ("8", "32", "128"))
                recall = " / ".join(f"{share:.3f}" for share in found["gold_recall_by_layer"])
                oracle = found["mplus-oracle"]["128"]
                rows.append(f"| {language} | {way} | {seed} | {shares} | {oracle:.3f} | {recall} |")
                where = found["circumstances"]
    return (
        "The recipe recall-tiny with the published score and loss of the retriever, with the default ones, and "
        "with the published score and the default loss; nothing else differs. The fifth relation has values of two "
        "words.\n\n" + "\n".join(rows) + f"\n\n{where['device']}, torch {where['torch']}, commit {where['commit']}."
    )


def render() -> str:
    """The page."""
    record = load("quality", "recall-tiny")
    opening = (
        "# Results\n\nWhat was measured, and nothing else; this page is made from `benchmarks/quality/records` by "
        "`python -m benchmarks.pages.results`. How to read it: [Evaluation](evaluation.md)."
    )
    return "\n\n".join([opening, recall_tiny(record), *others()]) + "\n"


def quote(record: dict[str, Any]) -> str:
    """The lines of the README."""
    report, seeds = pooled(record), record["seeds"]
    memory, short = report.arm("mplus"), report.arm("memoryllm")
    old = memory.at(128), short.at(128), report.arm("mplus-random").at(128)
    worst = min(accuracies(facts)["mplus"]["128"] for facts in seeds.values())
    last, lost, drawn = (cell.accuracy if cell is not None else float("nan") for cell in old)
    lines = [
        f"`mplus demo`: a decoder of {record['parameters']:,} parameters, trained from nothing in minutes on a CPU, is",
        f"told facts once. 128 chunks (2,048 tokens, a fact in each) later it answers {last:.1%} of the questions from",
        f"memory, attending to {memory.tokens_attended} rows and tokens; without long-term memory {lost:.1%}, with",
        f"random retrieval {drawn:.1%}, by chance {report.chance:.1%}. {len(seeds)} seeds, the worst at {worst:.1%}:",
        "see [Results](docs/results.md).",
    ]
    return "".join(f"> {line}\n" for line in lines)


def main() -> None:
    """Write all of it."""
    record = load("quality", "recall-tiny")
    PAGE.write_text(render(), encoding="utf-8")
    draw(pooled(record), FIGURE)
    page = README.read_text(encoding="utf-8")
    README.write_text(QUOTE.sub(lambda _: quote(record), page), encoding="utf-8")


if __name__ == "__main__":
    main()
