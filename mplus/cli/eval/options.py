"""What the commands of ``mplus eval`` share: options, loading, and where a report goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mplus.evaluation.reports.report import Report
    from mplus.evaluation.tasks.base import Protocol
    from mplus.retrievers.base import Retriever

Model = Annotated[
    Path, typer.Option("--model", help="Decoder with memory: folder written by save_pretrained.", show_default=False)
]
OptionalModel = Annotated[
    Path | None, typer.Option("--model", help="Decoder with memory: folder written by save_pretrained.")
]
OptionalData = Annotated[Path | None, typer.Option("--data", help="File of the data set, as published.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Instead of a data set: facts of the little language, for a decoder trained by this recipe "
        "(recall-tiny or recall-long); without --model the one that comes with mplus.",
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Where its tokenizer is; default: with the model, else with its base.")
]
Device = Annotated[str | None, typer.Option(help="Device to compute on, cuda for instance; default: the CPU.")]
Dtype = Annotated[str, typer.Option(help="Numbers to compute with: auto, float32, bfloat16, float16.")]
ProtocolName = Annotated[
    str, typer.Option("--protocol", help="What is told and asked: squad, natural-questions, key-value, babi.")
]
Data = Annotated[Path, typer.Option(help="File of the data set, as published.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Option of the protocol, such as passages=129, prompt='Q: {question} A:', novels=FOLDER. May be repeated.",
    ),
]
Episodes = Annotated[int, typer.Option(min=1, help="Most episodes; each is one stream.")]
Ages = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Ages in passages to ask at; default: 0, 1, 2, 4, 8 and so on."),
]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens generated for an answer; default: what the protocol asks for.")
]
Streams = Annotated[int, typer.Option(min=1, help="Episodes at a time.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads for torch; default: torch's own choice.")]
Retrievers = Annotated[
    list[str] | None,
    typer.Option(
        "--retriever",
        metavar="NAME,NAME,...",
        help="Retrievers to read with besides the decoder's own; default: all usable. One with options is given by "
        "itself, as 'faiss_ivf least=64 probes=2'. May be repeated.",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file.")]


def prepare(model: Path, tokenizer: str | None, device: str | None, dtype: str, threads: int | None) -> tuple[Any, Any]:
    """The decoder and its tokenizer."""
    import torch

    from mplus.errors import ConfigError
    from mplus.hf.pretrained.load import load_with_tokenizer

    if dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise ConfigError(f"dtype must be one of auto, float32, bfloat16, float16, got {dtype!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    return load_with_tokenizer(model, tokenizer=tokenizer, device=device, dtype=dtype)


def both(model: Path | None, data: Path | None) -> tuple[Path, Path]:
    """Model and data. Raises ConfigError where one of them is missing."""
    from mplus.errors import ConfigError

    if model is None or data is None:
        raise ConfigError("this needs --recipe, or --model and --data")
    return model, data


NO_DATA_SET = frozenset({"recipe", "model", "ages", "seed", "threads", "as_json"})
"""Options of every command that mean something with ``--recipe``, by the names of their parameters."""
LANGUAGE_ONLY = frozenset({"questions", "held_out"})
"""Options that mean something with ``--recipe`` only."""


def check_given(context: typer.Context, recipe: str | None, *also: str) -> None:
    """Refuse options that would change nothing.

    Args:
        context: of the command.
        recipe: value of ``--recipe``.
        also: further parameters of this command that mean something with ``--recipe``.

    Raises:
        ConfigError: an option was given that only goes with a data set, or only with ``--recipe``; all are named.
    """
    from mplus.errors import ConfigError

    sources = {option: context.get_parameter_source(str(option.name)) for option in context.command.params}
    given = [option for option, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if recipe is None:
        idle = [option for option in given if option.name in LANGUAGE_ONLY]
        advice = "about facts of the little language: give --recipe, or leave it out"
    else:
        idle = [option for option in given if option.name not in NO_DATA_SET | LANGUAGE_ONLY | set(also)]
        advice = "about a data set: give --model and --data instead of --recipe, or leave it out"
    if idle:
        raise ConfigError(f"{', '.join(option.opts[0] for option in idle)}: {advice}")


def make_protocol(
    name: str, tokenizer: Any, settings: Sequence[str] | None, chunk_tokens: int, given: Mapping[str, Any]
) -> Protocol:
    """The protocol with the options ``given`` and those of ``--set``; passages are as long as a chunk unless set."""
    from mplus.config import structure
    from mplus.evaluation.tasks import protocol
    from mplus.evaluation.texts import Texts

    cls = protocol(name)
    options = {"passage_tokens": chunk_tokens, **given, **dict(map(assignment, settings or ()))}
    return cls(structure(cls.Options, options), Texts(tokenizer))


def retrievers(model: Any, given: Sequence[str] | None) -> dict[str, Retriever]:
    """The retrievers that are asked for by ``--retriever``, by what was given; None: all usable ones.

    Raises:
        As ``mplus.evaluation.retriever_swap.retriever_for``.
    """
    from mplus.errors import ConfigError
    from mplus.evaluation.retriever_swap import usable, with_own_parameters

    if given is None:
        return usable(model)
    found = {}
    for text in given:
        for one in text.split(",") if "=" not in text else [text]:
            words = one.split()
            if not words:
                raise ConfigError(f"--retriever must be names with commas between, or one with options, got {text!r}")
            found[" ".join(words)] = with_own_parameters(model, words[0], **dict(map(assignment, words[1:])))
    return found


def assignment(text: str) -> tuple[str, Any]:
    """``name=value``: JSON where it is, else text. Raises ConfigError without an equals sign."""
    from mplus.errors import ConfigError

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set must be NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """``0,1,2``. Raises ConfigError, which names ``option``."""
    from mplus.errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} must be whole numbers with commas between, got {text!r}") from error


def show_report(report: Report, as_json: Path | None, plots: Sequence[Path] | None, markdown: Path | None) -> None:
    """Print a report of retention and write it wherever it is wanted."""
    from rich.console import Console

    from mplus.evaluation.reports.plots import draw
    from mplus.evaluation.reports.tables import markdown as as_markdown
    from mplus.evaluation.reports.tables import show

    if as_json is not None:
        report.save(as_json)
    if markdown is not None:
        markdown.write_text(as_markdown(report), encoding="utf-8")
    if plots:
        draw(report, *plots)
    show(report, Console(highlight=False))


def show_plain(facts: Mapping[str, Any], as_json: Path | None) -> None:
    """Print any other report, fact by fact, and write it as JSON if wanted."""
    from rich.console import Console
    from rich.markup import escape

    from mplus.evaluation.reports.tables import flat

    if as_json is not None:
        as_json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    for name, value in flat(facts).items():
        console.print(f"{escape(name)}: {escape(value)}", soft_wrap=True)
