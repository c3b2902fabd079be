"""``mplus eval abstention``."""

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
    show_plain,
)


def abstention(
    context: typer.Context,
    model: OptionalModel = None,
    data: OptionalData = None,
    recipe: RecipeName = None,
    protocol: ProtocolName = "squad",
    settings: Set = None,
    episodes: Episodes = 100,
    untold: Annotated[int, typer.Option(min=1, help="Questions per episode whose answer was never told.")] = 1,
    ages: Ages = None,
    tokens: Tokens = None,
    streams: Streams = 8,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = None,
) -> None:
    """Can it be told that an answer is not in memory? Signs compared and combined: AUROC and abstention accuracy.

    Calibrated on every other episode, judged on the rest.
    """
    from mplus.cli.eval.recall import recall_abstention
    from mplus.evaluation.abstention import abstention as run
    from mplus.evaluation.generating import Generation
    from mplus.evaluation.retention import RetentionOptions

    check_given(context, recipe)
    told = numbers(ages, "--ages")
    if recipe is not None:
        show_plain(recall_abstention(recipe, model, told, seed, threads), as_json)
        return
    model, data = both(model, data)
    options = RetentionOptions(ages=told, streams=streams, seed=seed)
    decoder, words = prepare(model, tokenizer, device, dtype, threads)
    given = {"data": data, "episodes": episodes, "seed": seed, "untold": untold}
    made = make_protocol(protocol, words, settings, decoder.mplus_config.chunk_tokens, given)
    generation = Generation.of(words, tokens=tokens or made.answer_tokens)
    show_plain(run(decoder, words, made, options=options, generation=generation, name=model.name), as_json)
