"""Memories of the field that need no training, on a chat model: notes, and paragraphs of SQuAD.

    python -m benchmarks.quality.field_chat --model FOLDER --data FILE_OF_SQUAD     # writes records/field-chat.json

``FOLDER`` is a chat model, such as the one that ``mplus get smollm2`` prints. The samples are small; the page says how
many questions there were, and gives intervals. With ``--only`` the other parts of the record stay as they were.

Memories of triples are told the same notes as calls that were written by hand ("dictated"), as by a decoder that
writes without fault, and as notes, of which this decoder writes what it can ("written"). Of paragraphs nobody has
triples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from mplus_memllm import write_call as memllm_call
from mplus_retllm import write_call as retllm_call

from benchmarks.quality.layer_tokens import counted
from benchmarks.records import load, record_path, write
from mplus.config import MPlusConfig, structure
from mplus.environment import load_average
from mplus.evaluation.chat.memories import compare_memories, wrapped_each
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.chat.sizes import PLAIN
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.generating import Generation, Scoring
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.tasks import protocol
from mplus.evaluation.tasks.base import Episode, Passage, Question
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.tasks.people.unseen import ATTRIBUTES
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.load import load_decoder_with_tokenizer

RELATIONS = list(ATTRIBUTES)
MEMORIES: dict[str, dict[str, Any]] = {
    "kv": {"mechanism": "kv"},
    "memlong": {"mechanism": {"name": "memlong", "group_tokens": 32}, "retrieved_tokens": 128, "adapters": False},
    "scm": {
        "mechanism": {"name": "scm", "turns": 3, "needed": "off", "enough": "off", "summaries": "off", "recency": 0.0}
    },
    "retllm": {"mechanism": {"name": "retllm", "reads": "prompt"}},
    "memllm": {"mechanism": {"name": "memllm", "reads": "prompt", "relations": RELATIONS}},
}
"""With settings that ask no decision and no call of the decoder but those it can be held to."""
TRIPLES: dict[str, Callable[[tuple[str, str, str]], str]] = {
    "retllm": retllm_call,
    "memllm": lambda triple: memllm_call([triple]),
}
"""Memory of triples -> the call that writes one."""
OF_TEXT = ("kv", "memlong", "scm")
"""Memories that keep any text."""
PARTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "notes": ("notes", OF_TEXT, {"notes": 12, "questions": 12, "episodes": 1, "split": "unseen"}),
    "dictated": ("notes", tuple(TRIPLES), {"notes": 12, "questions": 12, "episodes": 1, "split": "unseen"}),
    "written": ("notes", tuple(TRIPLES), {"notes": 12, "questions": 12, "episodes": 1, "split": "unseen"}),
    "squad": (
        "squad",
        OF_TEXT,
        {"contexts": 8, "questions": 8, "passages": 9, "episodes": 1, "passage_tokens": 200, "answer_tokens": 16,
         "golds": "all", "prompt": PLAIN},
    ),
}  # fmt: skip
"""Part of the record -> protocol, memories and options."""
TOLD = 4
"""Passages that are told before costs are counted."""


class Dictated(Notes):
    """Notes that are told as calls of a memory of triples; each of them has to be asked for.

    Args:
        options, texts: as of ``Notes``.
        call: makes the call that writes a triple.
    """

    def __init__(self, options: Any, texts: Texts, call: Callable[[tuple[str, str, str]], str]) -> None:
        super().__init__(options, texts)
        self.call = call

    def episodes(self) -> list[Episode]:
        return [self._dictated(episode) for episode in super().episodes()]

    def _dictated(self, episode: Episode) -> Episode:
        told = {question.needs[0]: self.call(triple(question)) for question in episode.questions}
        passages = (Passage(text=told[at], source=one.source) for at, one in enumerate(episode.passages))
        return evolve(episode, passages=tuple(passages))


def triple(question: Question) -> tuple[str, str, str]:
    """Return person, relation and value of what a question about unseen people asks for."""
    for relation, attribute in ATTRIBUTES.items():
        before, _, behind = attribute.asked[0].partition("{name}")
        if question.prompt.startswith(before):
            return question.prompt.removeprefix(before).partition(behind)[0], relation, question.answers[0]
    raise ValueError(f"no attribute is asked for by {question.prompt!r}")


def measure(part: str, decoder: Any, tokenizer: Any, name: str, data: Path | None, **more: Any) -> dict[str, Any]:
    """Return the report of one part as plain data, with what each memory costs.

    Args:
        part: of the record.
        decoder: not wrapped.
        tokenizer: with a chat template.
        name: of the decoder.
        data: file of SQuAD.
        more: options of the protocol that differ.
    """
    name_, labels, options = PARTS[part]
    task_class: Any = protocol(name_)
    given = {**options, **({"data": str(data)} if name_ == "squad" else {}), **more}
    configs = {label: MPlusConfig.from_dict(MEMORIES[label]) for label in labels}
    texts, found = Texts(tokenizer), dict[str, dict[str, float]]()

    def executions() -> Iterator[tuple[str, GeneratedAnswers]]:
        for label, model in wrapped_each(decoder, configs):
            settled = structure(task_class.Options, given)
            dictated = part == "dictated"
            task = Dictated(settled, texts, TRIPLES[label]) if dictated else task_class(settled, texts)
            one = GeneratedAnswers(
                model,
                tokenizer,
                task,
                options=RunOptions(ages=task.ages or (0,), streams=1),
                generation=Generation.of(tokenizer, tokens=task.answer_tokens),
                scoring=Scoring(correct="contains_words", normalise="squad"),
                chat=ChatPrompt.of(tokenizer),
            )
            found[label] = costs(model, tokenizer, one)
            yield label, one

    before = load_average()
    arms = ("none", "ceiling", "bm25", *labels) if labels == OF_TEXT else labels
    report = compare_memories(executions(), arms, options=ArmOptions(bm25_passages=1), name=name, progress=False)
    return {"load_average": [before, load_average()], "costs": found, **report.plain()}


@torch.no_grad()
def costs(model: Any, tokenizer: Any, execution: GeneratedAnswers) -> dict[str, float]:
    """Count the tokens that go through a decoder layer for each token written, and for a question besides its own."""
    [episode] = execution.episodes[:1]
    told: Sequence[str] = [passage.text for passage in episode.passages[:TOLD]]
    with counted(model) as passed:
        memory = model.new_memory(tokenizer=tokenizer)
        for number, text in enumerate(told):
            memory.write(text + "\n", source=f"told {number}")
        writing, passed[0] = passed[0], 0
        ids = torch.tensor([ChatPrompt.of(tokenizer).prompt(episode.questions[0].prompt)])
        model.generate(ids, attention_mask=torch.ones_like(ids), memory=memory, max_new_tokens=1, do_sample=False)
        return {
            "layer_tokens_per_token_written": writing / sum(map(execution.texts.count, told)),
            "layer_tokens_per_question": passed[0],
            "question_tokens": float(ids.shape[1]),
        }


def main() -> None:
    """Measure, and write the record anew after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="SQuAD's dev-v1.1.json, for the part of that name")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    path = record_path("quality", "field-chat")
    found: dict[str, Any] = load("quality", "field-chat") if path.exists() else {}
    decoder, tokenizer = load_decoder_with_tokenizer(asked.model)
    for part in asked.only:
        found[part] = measure(part, decoder, tokenizer, asked.model.name, asked.data)
        write(path, {name: found[name] for name in PARTS if name in found})


if __name__ == "__main__":
    main()
