"""The page ``docs/benchmarks/quality.md`` and its figure: what a trained memory retains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load
from mplus.evaluation.reports.merge import pool
from mplus.evaluation.reports.plots import draw
from mplus.evaluation.reports.report import Report

PAGE = ROOT / "docs" / "benchmarks" / "quality.md"
FIGURE = ROOT / "docs" / "assets" / "recall-tiny.svg"
PREAMBLE = """
# Quality

What a trained memory retains. This page is made from `benchmarks/quality/records` by `python -m benchmarks.pages`. How
to read it: [Evaluation](../evaluation.md).
"""
AGES = ("0", "1", "4", "8", "16", "32", "64", "128")
OLD_AGES = ("128", "500", "1000", "2000", "5000", "10000", "20000")


def render() -> str:
    """Return the page."""
    record = load("quality", "recall-tiny")
    first = next(iter(record["seeds"].values()))
    parts = {
        "A small decoder with facts": recall_tiny(record),
        "Every seed": seeds(record["seeds"]),
        "The retriever": retriever(first["health"]),
        "Knowing what is not there": abstention(record["seeds"]),
        "Thousands of chunks later": recall_long(load("quality", "recall-long")),
        "Stories": stories(load("quality", "stories")),
        "SmolLM2 with a trained M+": smollm2_mplus(load("quality", "smollm2-mplus")),
        "Scores and losses of the retriever": scores(load("quality", "scores")),
    }
    return "\n\n".join([PREAMBLE.strip(), *(f"## {heading}\n\n{text}" for heading, text in parts.items())]) + "\n"


def draw_figure() -> None:
    """Draw accuracy over age of every arm."""
    draw(pooled(load("quality", "recall-tiny")), FIGURE)


def pooled(record: Mapping[str, Any]) -> Report:
    """Pool all seeds of a recall record into one report."""
    return pool([Report.from_plain(facts["retention"]) for facts in record["seeds"].values()])


def accuracies(facts: Mapping[str, Any], part: str = "retention") -> dict[str, dict[str, float]]:
    """Return arm -> age -> accuracy of one seed."""
    return {arm["name"]: arm["accuracy_by_age"] for arm in facts[part]["arms"]}


def recall_tiny(record: Mapping[str, Any]) -> str:
    """Tabulate accuracy over age of every arm, all seeds together."""
    report, measured = pooled(record), record["seeds"]
    first = next(iter(measured.values()))
    rows = []
    for arm in report.arms:
        if arm.status == "ok":
            cells = [arm.at(int(age)) for age in AGES]
            shares = [f"{cell.accuracy:.3f}" if cell else "-" for cell in cells]
            kept = f"{arm.state_bytes:,} bytes" if arm.state_bytes is not None else "-"
            rows.append([arm.name, *shares, kept, f"{arm.tokens_attended}"])
    rows += [
        [f"*{curve.name}, theory*", *(f"{curve.accuracy_by_age[int(age)]:.3f}" for age in AGES), "", ""]
        for curve in report.theory
    ]
    looked_at = record.get("seeds_looked_at")
    opening = (
        f"recall-tiny: a decoder of {record['parameters']:,} parameters learns from nothing to answer from memory. "
        f"{len(measured)} seeds that nothing was chosen by"
        f"{' (the recipe was made with ' + ', '.join(map(str, looked_at)) + ')' if looked_at else ''}; "
        f"{report.arm('mplus').cells[0].questions:,} questions at each age in all, "
        f"{first['retention']['settings']['people']:,} people in four relations, chance {report.chance:.3f}. "
        "Age is in chunks of 16 tokens told since the fact."
    )
    missing = [f"- {arm.name}: {arm.status}: {arm.reason}" for arm in report.arms if arm.status != "ok"]
    where = first["circumstances"]
    commits = ", ".join(sorted({facts["circumstances"]["commit"] for facts in measured.values()}))
    closing = (
        f"Measured on {where['device']}, torch {where['torch']}, transformers {where['transformers']}, commits "
        f"{commits}. Settings and every number: `benchmarks/quality/records/recall-tiny.json`, made by `python -m "
        "benchmarks.quality.recall`."
    )
    parts = [
        opening,
        "![Accuracy over age of every arm](../assets/recall-tiny.svg)",
        table(["arm", *AGES, "state per stream", "attended"], rows),
        "\n".join(["Not in the table:", "", *missing]) if missing else "",
        closing,
    ]
    return "\n\n".join(part for part in parts if part)


def seeds(measured: Mapping[str, Any]) -> str:
    """Tabulate every seed by itself."""
    rows = []
    for seed, facts in measured.items():
        arms, held = accuracies(facts), accuracies(facts, "held_out")["mplus"]
        run = [f"{facts['seconds']:.0f}", f"{facts['steps']:,}", f"{facts['restarts']}"]
        shares = (arms["mplus"]["128"], min(arms["mplus"].values()), min(held.values()))
        others = (arms[name]["64"] for name in ("memoryllm", "mplus-random", "mplus-oracle"))
        rows.append([seed, *run, *(f"{share:.3f}" for share in (*shares, *others))])
    head = ["seed", "training, s", "steps", "restarts", "mplus at 128", "lowest mplus", "lowest, people never seen"]
    return "The seconds are those of a shared machine.\n\n" + table(
        [*head, *(f"{name} at 64" for name in ("memoryllm", "mplus-random", "mplus-oracle"))], rows
    )


def retriever(health: Mapping[str, Any]) -> str:
    """Tabulate what the trained and a random retriever find, for several numbers of rows."""
    rows = []
    for k, found in health["by_retrieved_tokens"].items():
        for name, facts in found.items():
            shares = [facts["accuracy"], facts["accuracy_with_hit"], facts["accuracy_without_hit"]]
            layers = (facts["gold_recall_by_layer"], facts["any_useful_row_by_layer"])
            cells = (" / ".join(f"{share:.3f}" for share in layer) for layer in layers)
            rows.append([k, name, *cells, *("-" if share is None else f"{share:.3f}" for share in shares)])
    return (
        f"The first seed, ages {health['ages']}, {health['long_term_rows']} long-term rows per "
        f"layer; trained with K0 = {health['trained_with']}; standard deviation of the scores "
        f"{' / '.join(map(str, health['logit_std_by_layer']))}.\n\n"
        + table(
            ["K0", "retriever", "gold recall, layer 0 / 1", "any useful row", "accuracy", "with a hit", "without"],
            rows,
            2,
        )
    )


def abstention(measured: Mapping[str, Any]) -> str:
    """Tabulate how well each signal tells whether a fact was told."""
    names = list(next(iter(measured.values()))["abstention"]["features"])
    rows = []
    for seed, facts in measured.items():
        found = facts["abstention"]
        each = [f"{found['features'][name]['auroc']:.4f}" for name in names]
        both, said = found["combined"], found["said_unknown"]
        rates = [f"{both['abstention_accuracy']:.3f}, {both['answered']:.3f}"]
        rates.append(f"{said['of_untold']:.3f} / {said['of_told']:.3f}")
        rows.append([seed, *each, f"{both['auroc']:.4f}", *rates])
    return (
        "AUROC of each signal for whether a fact was told, and of a logistic regression over all, calibrated on other "
        "streams. Half of the questions are about facts never told.\n\n"
        + table(
            ["seed", *names, "all together", "abstains, answers", "says *unknown*, untold / told"],
            rows,
        )
    )


def recall_long(record: Mapping[str, Any]) -> str:
    """Tabulate accuracy over thousands of chunks, from a memory with room for every row."""
    rows, attended = [], 0
    for chunks, found in record["measured"].items():
        arms = {arm["name"]: arm for arm in found["retention"]["arms"]}
        attended = arms["mplus"]["tokens_attended"]
        for name in ("mplus", "mplus-oracle"):
            shares = (arms[name]["accuracy_by_age"].get(age) for age in OLD_AGES)
            cells = ["-" if share is None else f"{share:.3f}" for share in shares]
            rows.append([f"{int(chunks):,}", name, *cells, f"{found['long_term_rows']:,}"])
    return (
        f"The decoder of `{record['model']}` with room for every row, asked for facts told up to 20,000 chunks of 16 "
        f"tokens ago. It attends to {attended} rows and tokens, whatever the age.\n\n"
        + table(["chunks told", "arm", *(f"{int(age):,}" for age in OLD_AGES), "long-term rows per layer"], rows, 2)
        + "\n\n"
        + measured_on(record, "quality/recall-long")
    )


def stories(record: Mapping[str, Any]) -> str:
    """Describe how much of a lost context a memory of children's stories wins back."""
    once, later = record["at_once"], record["after_16_other_chunks"]
    (lost, lost_half), (won, won_half) = once["headroom_nats"], once["won_back_nats"]
    harm, harm_later = (found["unrelated_memory_perplexity_percent"] for found in (once, later))
    return (
        "stories260K, frozen, with adapters trained by the recipe `stories`. Losing the "
        f"{once['context_tokens']} tokens before a text costs {lost:.4f} nats per token (95 % interval "
        f"±{lost_half:.4f}, {once['documents']:,} texts). Memory wins back {won:.4f} (±{won_half:.4f}), "
        f"{once['won_back_share']:.0%} of it; after 16 chunks of other stories {later['won_back_share']:.0%}. The same "
        f"checkpoint with a memory of other stories has {harm:+.2f} % perplexity against the decoder alone, and "
        f"{harm_later:+.2f} % with a fuller one. {measured_on(record, 'quality/stories')}"
    )


def smollm2_mplus(record: Mapping[str, Any]) -> str:
    """Tabulate what the M+ memory of a chat model answers."""
    rows = []
    for name, forms in record["memory"].items():
        for form, found in forms.items():
            rows.append([f"M+, {name}, {FORMS[form]}", *answered(found)])
    runs, plain = record["training"], record["plain_text"]
    cost = plain["change_percent"]["unrelated"]
    interval = " to ".join(f"{end:+.1f}" for end in cost["interval"])
    training = measured_on({"circumstances": runs[0]["starts"][0]})
    steps, minutes = (sum(run[name] for run in runs) for name in ("steps", "seconds"))
    parts = " in runs of " + " and ".join(f"{run['steps']}" for run in runs) if len(runs) > 1 else ""
    return (
        f"SmolLM2-135M-Instruct, frozen, with adapters trained by the recipe `smollm2`: {steps} steps{parts}, "
        f"{minutes / 60:.0f} minutes, one seed. {training} Facts about people are told in novels that it was "
        "not trained on, one in every chunk of 32 tokens; names, values, sentences and questions are none that were "
        "trained. The short-term memory holds four chunks, and all four are asked about. There is no long-term "
        "memory.\n\n"
        f"{table(['', 'right', 'questions', *(f'{age} chunks ago' for age in '0123')], rows)}\n\n"
        f"The perplexity of a novel is {plain['perplexity']['none']:.2f} for the decoder alone, "
        f"{plain['perplexity']['empty']:.2f} with the adapters and an empty memory, since they have read a novel, and "
        f"{plain['perplexity']['unrelated']:.2f} with a memory full of another one: {cost['percent']:+.1f} % against "
        f"the decoder alone (95 % interval {interval} %, {plain['predicted_tokens']:,} tokens). "
        f"{measured_on(record, 'quality/smollm2-mplus')}"
    )


FORMS = {"plain": "asked plainly", "chat": "asked in the chat template"}


def answered(found: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: share of right answers, questions, and shares by age."""
    by_age = found["right_by_age_in_chunks"]
    return [f"{found['right']:.3f}", f"{found['questions']:,}", *(f"{by_age[age]:.3f}" for age in "0123")]


def scores(record: Mapping[str, Any]) -> str:
    """Tabulate scores and losses that the retriever was trained with."""
    rows, newest = [], {}
    for language, variants in record.items():
        for variant, measured in variants.items():
            for seed, found in measured.items():
                shares = [found["mplus"][age] for age in ("8", "32", "128")] + [found["mplus-oracle"]["128"]]
                recall = " / ".join(f"{share:.3f}" for share in found["gold_recall_by_layer"])
                rows.append([language, variant, seed, *(f"{share:.3f}" for share in shares), recall])
                newest = found
    head = ["language", "score, loss", "seed", "at 8", "at 32", "at 128", "oracle at 128", "gold recall, layer 0 / 1"]
    return (
        "The recipe recall-tiny with the published score and loss of the retriever, with the default ones, and "
        "with the published score and the default loss; nothing else differs. The fifth relation has values of two "
        f"words.\n\n{table(head, rows, 2)}\n\n{measured_on(newest, 'quality/scores')}"
    )
