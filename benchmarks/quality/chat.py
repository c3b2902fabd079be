"""What memories are worth to a chat model: one record for each protocol.

    python -m benchmarks.quality.chat notes --model FOLDER --memory kv             # writes records/chat-notes.json
    python -m benchmarks.quality.chat notes --model FOLDER --memory kv --search    # records/chat-notes-search.json

``FOLDER`` is a chat model, such as the one that ``mplus get smollm2`` prints. The options are those of ``mplus eval``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import record_path, write
from mplus.cli.eval_options import assignment
from mplus.config import structure
from mplus.environment import load_average
from mplus.evaluation.chat.memories import compare_memories, memory_configs, wrapped_each
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.chat.search import search_recall
from mplus.evaluation.chat.sizes import SIZES, answer_tokens
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.generating import Generation, Scoring
from mplus.evaluation.options import RunOptions
from mplus.evaluation.tasks import protocol
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.load import load_decoder_with_tokenizer


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the report of a protocol as plain data, with the load of the machine before and after."""
    torch.set_num_threads(given.threads)
    before = load_average()
    decoder, tokenizer = load_decoder_with_tokenizer(given.model)
    words: Any = tokenizer
    cls = protocol(given.protocol)
    sizes: dict[str, Any] = {**SIZES[given.protocol][given.size], "seed": given.seed}
    sizes.update({"data": str(given.data)} if given.data is not None else {})
    sizes.update(map(assignment, given.set))
    task = cls(structure(cls.Options, sizes), Texts(words))
    ages = task.ages or sorted({0, task.passages - 1})
    options = RunOptions(
        ages=ages, streams=1, seed=given.seed, timed=given.timed, answers=given.answers, directory=given.directory
    )
    how: dict[str, Any] = {
        "options": options,
        "generation": Generation.of(words, tokens=given.tokens or answer_tokens(task)),
        "scoring": Scoring(correct="contains_words", normalise="squad"),
        "chat": ChatPrompt.of(words),
    }
    each = (
        (label, GeneratedAnswers(model, words, task, **how))
        for label, model in wrapped_each(decoder, memory_configs(given.memory))
    )
    if given.search:
        found: dict[str, Any] = {**search_recall(each, Path(given.model).name), "size": given.size}
        return {"load_average": [before, load_average()], **found}
    report = compare_memories(each, given.arms and given.arms.split(","), name=Path(given.model).name)
    return {"load_average": [before, load_average()], "size": given.size, **report.plain()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=list(SIZES))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--memory", action="append", required=True, help="as for mplus eval; may be repeated")
    parser.add_argument("--arms")
    parser.add_argument("--search", action="store_true", help="search the memories only")
    parser.add_argument("--size", default="asked")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of the protocol")
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="most of an answer; default: those of the protocol")
    parser.add_argument("--answers", type=Path, help="write every answer here, a line of JSON each")
    parser.add_argument("--directory", type=Path, help="keep memories on disk here, and open them again to ask")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    name = f"chat-{given.protocol}" + "-search" * given.search
    write(given.record or record_path("quality", name), measure(given))


if __name__ == "__main__":
    main()
