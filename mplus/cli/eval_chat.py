"""``mplus eval notes`` and so on: what memories are worth to a chat model, one command for each protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mplus.cli.eval_options import Device, Dtype, Json, Threads, assignment, numbers, set_threads, show_plain
from mplus.config import JsonValue
from mplus.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from mplus.evaluation.chat.prompt import ChatTokenizer
    from mplus.evaluation.execution import GeneratedAnswers
    from mplus.evaluation.options import RunOptions
    from mplus.evaluation.tasks.base import Protocol
    from mplus.evaluation.texts import Tokenizer
    from mplus.hf.model.model_class import MemoryModel

TOLD = {
    "notes": "Notes about invented people, alone or among novels, told to a memory and asked for at the end.",
    "needles": "One sentence in a novel, at several depths, asked for at the end.",
    "conversations": "Talk over many sessions, in the format of LoCoMo or generated, and questions by category.",
    "squad": "Paragraphs of SQuAD behind paragraphs of other articles.",
    "natural-questions": "Gold passages of NaturalQuestions behind those of other questions.",
    "babi": "The sentences of little stories of bAbI, hidden in novels.",
}
"""Protocol -> what its command tells and asks."""

Memories = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        metavar="LABEL",
        help="Memory to measure: a mechanism, MECHANISM:RETRIEVER, MECHANISM:* for every retriever, a config as JSON, "
        "or LABEL=FOLDER of one that was trained. May be repeated; default: kv.",
    ),
]
Arms = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME,...",
        help="Arms to run: none, window, full-context, ceiling, bm25, snapkv, and of each memory its label, "
        "LABEL-text and MECHANISM-oracle; default: all but bm25 and snapkv.",
    ),
]


def chat_command(protocol: str) -> Callable[..., None]:
    """Return the command that tells and asks what a protocol makes."""

    def command(
        model: Annotated[Path, typer.Option("--model", help="Folder of a chat model.", show_default=False)],
        data: Annotated[Path | None, typer.Option(help="File of the data set, or folder of novels.")] = None,
        memories: Memories = None,
        arms: Arms = None,
        size: Annotated[
            str, typer.Option(help="small, over in about a minute; asked, as results are asked for; or another.")
        ] = "small",
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Option of the protocol. May be repeated."),
        ] = None,
        ages: Annotated[
            str | None,
            typer.Option(
                metavar="N,N,...",
                help="Passages told since the right one, to ask at; default: 0 and as many as there are.",
            ),
        ] = None,
        tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Tokens generated for an answer; default: 24, or what the protocol says."),
        ] = None,
        timed: Annotated[int, typer.Option(min=0, help="Questions of each arm to time the first token of.")] = 4,
        directory: Annotated[
            Path | None, typer.Option(help="Keep memories on disk in this folder, and open them again to ask.")
        ] = None,
        search: Annotated[
            bool,
            typer.Option("--search", help="Search the memories only: is the right chunk among the best? No answers."),
        ] = False,
        answers: Annotated[
            Path | None, typer.Option(help="Write every answer of every arm to this file, a line of JSON each.")
        ] = None,
        export: Annotated[Path | None, typer.Option(help="Write the questions for benchmarks/snapkv here.")] = None,
        snapkv: Annotated[Path | None, typer.Option(help="Answers of benchmarks/snapkv to the same questions.")] = None,
        seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
        device: Device = None,
        dtype: Dtype = "auto",
        threads: Threads = None,
        as_json: Json = None,
        markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown to this file.")] = None,
        plot: Annotated[
            list[Path] | None, typer.Option(help="Draw the arms into this file (.png or .svg). May be repeated.")
        ] = None,
    ) -> None:
        from rich.console import Console

        from mplus.evaluation.chat.memories import compare_memories, memory_configs, wrapped_each
        from mplus.evaluation.chat.search import search_recall
        from mplus.evaluation.options import ArmOptions, RunOptions
        from mplus.evaluation.reports.plots import check_paths
        from mplus.evaluation.reports.worth import show_worth, worth_markdown
        from mplus.evaluation.reports.worth_plots import draw_worth
        from mplus.hf.pretrained.load import load_decoder_with_tokenizer

        check_paths(plot or ())  # before the work, not after it
        if threads is not None:
            set_threads(threads)
        configs = memory_configs(memories or ["kv"])
        decoder, tokenizer = load_decoder_with_tokenizer(model, device=device, dtype=dtype)
        words = cast("ChatTokenizer", tokenizer)
        task = _task(protocol, words, size, {"seed": seed, **({"data": str(data)} if data else {})}, settings)
        asked_at = numbers(ages, "--ages") or task.ages or sorted({0, task.passages - 1})
        options = RunOptions(
            ages=asked_at,
            streams=1,
            seed=seed,
            timed=timed,
            answers=answers,
            directory=directory,
            export=export,
        )
        each = (
            (label, _execution(wrapped, words, task, options, tokens))
            for label, wrapped in wrapped_each(decoder, configs)
        )
        if search:
            show_plain(search_recall(each, model.name), as_json)
            return
        wanted = None if arms is None else [name.strip() for name in arms.split(",")]
        report = compare_memories(each, wanted, options=ArmOptions(snapkv_answers=snapkv), name=model.name)
        if as_json is not None:
            report.save(as_json)
        if markdown is not None:
            markdown.write_text(worth_markdown(report), encoding="utf-8")
        if plot:
            draw_worth(report, *plot)
        show_worth(report, Console(highlight=False))

    command.__name__ = protocol
    command.__doc__ = (
        f"{TOLD[protocol]}\n\nPrints what each memory is worth to the chat model, beside its own window, all the text, "
        "and the right text alone."
    )
    return command


def _task(
    name: str, tokenizer: Tokenizer, size: str, given: Mapping[str, JsonValue], settings: list[str] | None
) -> Protocol:
    """Return the protocol at a size, with the options given and those of ``--set``."""
    from mplus.cli.eval_options import needs_data
    from mplus.config import structure
    from mplus.evaluation.chat.sizes import SIZES
    from mplus.evaluation.tasks import protocol
    from mplus.evaluation.texts import Texts

    cls = protocol(name)
    if size not in SIZES[name]:
        raise UnknownNameError(f"the size of {name} must be one of {', '.join(SIZES[name])}, got {size!r}")
    options = {**SIZES[name][size], **given, **dict(map(assignment, settings or ()))}
    if needs_data(name) and "data" not in options:
        raise ConfigError(f"mplus eval {name} needs --data, the file of the data set or the folder of novels")
    return cls(structure(cls.Options, options), Texts(tokenizer))


def _execution(
    model: MemoryModel, tokenizer: ChatTokenizer, task: Protocol, options: RunOptions, tokens: int | None
) -> GeneratedAnswers:
    from mplus.evaluation.chat.prompt import ChatPrompt
    from mplus.evaluation.chat.sizes import answer_tokens
    from mplus.evaluation.execution import GeneratedAnswers
    from mplus.evaluation.generating import Generation, Scoring

    return GeneratedAnswers(
        model,
        tokenizer,
        task,
        options=options,
        generation=Generation.of(tokenizer, tokens=tokens or answer_tokens(task)),
        # Whole words, without case: a chat model answers in a sentence of its own.
        scoring=Scoring(correct="contains_words", normalise="squad"),
        chat=ChatPrompt.of(tokenizer),
    )
