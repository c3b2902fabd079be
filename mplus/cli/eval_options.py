"""What the commands of ``mplus eval`` share: options, the execution made from them, and where a report goes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from attrs import define, evolve

from mplus.config import JsonValue
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.evaluation import texts
    from mplus.evaluation.execution import Execution, GeneratedAnswers
    from mplus.evaluation.generating import Scoring
    from mplus.evaluation.reports.report import Report
    from mplus.evaluation.tasks.base import Protocol
    from mplus.evaluation.tasks.facts import Facts
    from mplus.hf.model.model_class import MemoryModel

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
    str,
    typer.Option(
        "--protocol",
        help="What is told and asked: squad, natural-questions, key-value, babi, notes, needles, conversations.",
    ),
]
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
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file.")]


@define(frozen=True, kw_only=True)
class EvalOptions:
    """Options of every experiment, as they were given; the command says which were left out.

    Attributes:
        model: folder of the decoder.
        data: file of the data set.
        recipe: instead of a data set, facts of the little language.
        protocol, settings, episodes: what is told and asked.
        ages: to ask at.
        tokens: generated for an answer.
        streams: episodes at a time.
        seed: of everything that is drawn.
        tokenizer, device, dtype, threads: how the decoder is loaded and computes.
        as_json: file for the report.
    """

    model: OptionalModel = None
    data: OptionalData = None
    recipe: RecipeName = None
    protocol: ProtocolName = "squad"
    settings: Set = None
    episodes: Episodes = 100
    ages: Ages = None
    tokens: Tokens = None
    streams: Streams = 8
    seed: Seed = 0
    tokenizer: Tokenizer = None
    device: Device = None
    dtype: Dtype = "auto"
    threads: Threads = None
    as_json: Json = None

    @property
    def name(self) -> str | None:
        """Return the name of the model in reports."""
        return self.recipe if self.model is None else self.model.name

    def facts(
        self,
        questions: int,
        held_out: bool = False,
        usual_ages: tuple[int, ...] | None = None,
        untold: bool = False,
    ) -> Execution[Any, Any]:
        """Return facts of the language of ``--recipe`` with its decoder.

        Args:
            questions: at each age, rounded up to a multiple of the streams at a time.
            held_out: tell of people never seen in training.
            usual_ages: to ask at without ``--ages``; None: those of the recipe.
            untold: let answers that are generated be about facts that were never told, too; streams of M+ and
                MemoryLLM are asked about these in any case.

        Raises:
            ConfigError: a recipe of another language, or one whose decoder does not come with mplus.
        """
        from mplus.evaluation.execution import ParallelStreams
        from mplus.evaluation.tasks.facts import Facts
        from mplus.mechanisms.short_term.batched_streams import BATCHED

        decoder = self._recipe_decoder()
        streams = min(PARALLEL, questions)
        rounds = -(-questions // streams)
        task = Facts(streams=streams, rounds=rounds, held_out=held_out, seed=self.seed)
        ages = numbers(self.ages, "--ages") or usual_ages or (LONG_AGES if self.recipe == "recall-long" else None)
        if ages is not None:
            task = evolve(task, ages=ages)
        if decoder.mplus_config.mechanism.name in BATCHED:
            return ParallelStreams(decoder, task)
        return _generated_facts(decoder, evolve(task, untold_seed=1) if untold else task)

    def _recipe_decoder(self) -> MemoryModel:
        """Return the decoder that a run of the recipe left at ``--model``, or the one that comes with mplus."""
        from mplus.hf.pretrained.shipped import load_recall

        if self.recipe not in RECIPES:
            raise ConfigError(f"--recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if self.model is not None:
            return prepare(self.model, None, None, "auto", self.threads)[0]
        if self.recipe != "recall-tiny":
            raise ConfigError(
                f"the decoder of {self.recipe} does not come with mplus: train it, and give its folder as --model"
            )
        if self.threads is not None:
            set_threads(self.threads)
        model: MemoryModel = load_recall()[0]
        return model

    def generated_answers(
        self, scoring: Scoring | None = None, export: Path | None = None, **given: JsonValue
    ) -> GeneratedAnswers:
        """Return the data set with the decoder; ``given`` are further options of the protocol.

        Raises:
            ConfigError: there is no model or no data.
        """
        from mplus.evaluation.execution import GeneratedAnswers
        from mplus.evaluation.generating import Generation
        from mplus.evaluation.options import RunOptions

        if self.model is None or (self.data is None and needs_data(self.protocol)):
            raise ConfigError("this needs --recipe, or --model and --data")
        options = RunOptions(ages=numbers(self.ages, "--ages"), streams=self.streams, seed=self.seed, export=export)
        decoder, tokenizer = prepare(self.model, self.tokenizer, self.device, self.dtype, self.threads)
        given = {"episodes": self.episodes, "seed": self.seed, **given}
        if self.data is not None:
            given["data"] = str(self.data)
        made = make_protocol(self.protocol, tokenizer, self.settings, decoder.mplus_config.chunk_tokens, given)
        generation = Generation.of(tokenizer, tokens=self.tokens or made.answer_tokens)
        return GeneratedAnswers(decoder, tokenizer, made, options=options, generation=generation, scoring=scoring)


def _generated_facts(decoder: MemoryModel, task: Facts) -> GeneratedAnswers:
    """Return facts told to memories of any mechanism, and answered by generating."""
    from mplus.evaluation.execution import GeneratedAnswers
    from mplus.evaluation.generating import Generation, Scoring
    from mplus.evaluation.options import RunOptions
    from mplus.facts.episodes import recall_tokenizer

    return GeneratedAnswers(
        decoder,
        recall_tokenizer(task.language),
        task,
        options=RunOptions(streams=PARALLEL, separator=" ", seed=task.seed),
        generation=Generation(tokens=task.answer_tokens, batch=PARALLEL),
        scoring=Scoring(correct="exact"),
    )


def experiment(
    before: Mapping[str, str], *, with_recipe: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes ``EvalOptions`` and options of its own.

    Args:
        before: in ``--help``, the option of all experiments that each own one stands before; at the end without.
        with_recipe: own options that mean something with ``--recipe``; the others are refused with it.
    """

    def command_of(run: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(EvalOptions, eval_str=True).parameters
        own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
        options: list[inspect.Parameter] = []
        for option in shared.values():
            options += [one for one in own if before.get(one.name) == option.name] + [option]
        options += [one for one in own if one.name not in before]

        def command(context: typer.Context, **given: Any) -> None:
            check_given(context, given["recipe"], with_recipe)
            run(EvalOptions(**{name: given.pop(name) for name in shared}), **given)

        first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        every = [first, *(option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options)]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {option.name: option.annotation for option in every}
        # Typer makes the options of a command from its signature.
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        return command

    return command_of


RECIPES = ("recall-tiny", "recall-long")
PARALLEL = 64
"""Most streams of facts at a time; further questions are put to them later."""
LONG_AGES = (0, 8, 32, 128, 500, 1000, 2000)
QUESTIONS = 256
"""About facts, at each age, for what needs no more."""
WITH_RECIPE = frozenset({"recipe", "model", "ages", "seed", "threads", "as_json"})
"""Options of every experiment that mean something with ``--recipe``."""
RECIPE_ONLY = frozenset({"questions", "held_out"})
"""Options that mean something with ``--recipe`` only."""


def check_given(context: typer.Context, recipe: str | None, also: Sequence[str]) -> None:
    """Refuse options that would change nothing.

    Args:
        context: of the command.
        recipe: value of ``--recipe``.
        also: further parameters of this command that mean something with ``--recipe``.

    Raises:
        ConfigError: an option was given that only goes with a data set, or only with ``--recipe``; all are named.
    """
    sources = {option: context.get_parameter_source(str(option.name)) for option in context.command.params}
    given = [option for option, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if recipe is None:
        idle = [option for option in given if option.name in RECIPE_ONLY]
        advice = "about facts of the little language: give --recipe, or leave it out"
    else:
        idle = [option for option in given if option.name not in WITH_RECIPE | RECIPE_ONLY | set(also)]
        advice = "about a data set: give --model and --data instead of --recipe, or leave it out"
    if idle:
        raise ConfigError(f"{', '.join(option.opts[0] for option in idle)}: {advice}")


def prepare(
    model: Path, tokenizer: str | None, device: str | None, dtype: str, threads: int | None
) -> tuple[MemoryModel, texts.Tokenizer]:
    """Return the decoder and its tokenizer."""
    from mplus.hf.pretrained.load import load_with_tokenizer

    if dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise ConfigError(f"dtype must be one of auto, float32, bfloat16, float16, got {dtype!r}")
    if threads is not None:
        set_threads(threads)
    made = load_with_tokenizer(model, tokenizer=tokenizer, device=device, dtype=dtype)
    return cast("tuple[MemoryModel, texts.Tokenizer]", made)


def set_threads(threads: int) -> None:
    """Let torch compute with so many CPU threads."""
    import torch

    torch.set_num_threads(threads)


def make_protocol(
    name: str,
    tokenizer: texts.Tokenizer,
    settings: Sequence[str] | None,
    chunk_tokens: int,
    given: Mapping[str, JsonValue],
) -> Protocol:
    """Return the protocol with the options ``given`` and those of ``--set``; a passage is a chunk unless set."""
    from mplus.config import structure
    from mplus.evaluation.tasks import protocol
    from mplus.evaluation.texts import Texts

    cls = protocol(name)
    options = {"passage_tokens": chunk_tokens, **given, **dict(map(assignment, settings or ()))}
    return cls(structure(cls.Options, options), Texts(tokenizer))


def needs_data(name: str) -> bool:
    """Return whether a protocol reads files; others can generate what is told."""
    import attrs

    from mplus.evaluation.tasks import protocol

    return attrs.fields_dict(protocol(name).Options)["data"].default is attrs.NOTHING


def assignment(text: str) -> tuple[str, JsonValue]:
    """Parse ``name=value``: JSON where it is, else text. Raises ConfigError without an equals sign."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set must be NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Parse ``0,1,2``. Raises ConfigError, which names ``option``."""
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


def show_plain(facts: Mapping[str, JsonValue], as_json: Path | None) -> None:
    """Print any other report, fact by fact, and write it as JSON if wanted."""
    from rich.console import Console
    from rich.markup import escape

    from mplus.evaluation.reports.tables import flat

    if as_json is not None:
        as_json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    for name, value in flat(facts).items():
        console.print(f"{escape(name)}: {escape(value)}", soft_wrap=True)
