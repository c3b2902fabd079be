"""``mplus eval retriever``."""

from __future__ import annotations

from typing import Annotated

import typer

from mplus.cli.eval.options import (
    Ages,
    Device,
    Dtype,
    Episodes,
    Json,
    OptionalData,
    OptionalModel,
    ProtocolName,
    RecipeName,
    Retrievers,
    Seed,
    Set,
    Streams,
    Threads,
    Tokenizer,
    Tokens,
    both,
    check_given,
    make_protocol,
    numbers,
    prepare,
    retrievers,
    show_plain,
)


def retriever(
    context: typer.Context,
    model: OptionalModel = None,
    data: OptionalData = None,
    recipe: RecipeName = None,
    protocol: ProtocolName = "squad",
    settings: Set = None,
    episodes: Episodes = 100,
    ages: Ages = None,
    retrieved_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Rows a read brings back; default: 1/4 to 4 times as configured."),
    ] = None,
    retriever: Retrievers = None,
    tokens: Tokens = None,
    streams: Streams = 8,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = None,
) -> None:
    """Does the retriever bring back what a question needs, per layer and against others, and does that decide?

    For every retriever: gold recall, accuracy, the share of the exact best rows that it finds, and the time it takes.
    """
    from mplus.cli.eval.recall import recall_health
    from mplus.evaluation.generating import Generation
    from mplus.evaluation.health import health
    from mplus.evaluation.retention import RetentionOptions

    check_given(context, recipe, "retrieved_tokens", "retriever")
    told = numbers(ages, "--ages")
    tried = numbers(retrieved_tokens, "--retrieved-tokens")
    if recipe is not None:
        show_plain(recall_health(recipe, model, told, tried, retriever, seed, threads), as_json)
        return
    model, data = both(model, data)
    options = RetentionOptions(ages=told, streams=streams, seed=seed)
    decoder, words = prepare(model, tokenizer, device, dtype, threads)
    given = {"data": data, "episodes": episodes, "seed": seed}
    made = make_protocol(protocol, words, settings, decoder.mplus_config.chunk_tokens, given)
    generation = Generation.of(words, tokens=tokens or made.answer_tokens)
    report = health(
        decoder,
        words,
        made,
        options=options,
        retrieved_tokens=tried,
        retrievers=retrievers(decoder, retriever),
        generation=generation,
        name=model.name,
    )
    show_plain(report, as_json)
