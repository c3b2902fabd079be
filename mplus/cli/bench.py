"""``mplus bench``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mplus.cli.bench_options import Bench, measurement, positive

Record = dict[str, Any]


@measurement(long_term=True)
def read(
    bench: Bench,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens of the prompts; default: what the preset says.")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also after 10,000 to 1,000,000 tokens were written.")
    ] = False,
) -> Record:
    """Time fresh reads of a prompt with a full memory, against three plain ways to do it.

    The floor: the decoder's layers over a prefix of ready keys and values, with nothing around them. hf_prefix: the
    decoder of transformers with such a prefix in its cache. published: the steps of the published code, all anew for
    every prompt. What computes something else than it should gets no speed; exit code 1 then.
    """
    from mplus.bench import read as reading

    return reading.measure(*bench.how, bench.backends, positive(lengths, "--lengths"), growth=growth)


@measurement()
def write(bench: Bench) -> Record:
    """Time writing a chunk to several memories, one by one and in a batch, against the bare forward over it."""
    from mplus.bench import write as writing

    return writing.measure(*bench.how, bench.backends)


@measurement()
def decode(bench: Bench) -> Record:
    """Time single tokens behind a prompt, with a cache that grows."""
    from mplus.bench import decode as decoding

    return decoding.measure(*bench.how, bench.backends)


@measurement(backends=False)
def score(bench: Bench) -> Record:
    """Time the retriever's scoring of long-term rows alone."""
    from mplus.bench import score as scoring

    return scoring.measure(*bench.how)


@measurement(backends=False)
def store(
    bench: Bench,
    name: Annotated[str, typer.Option("--store", help="Name of the store.")] = "ram",
    rows: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Rows of the layer; default: 10,000, 100,000 and 1,000,000.")
    ] = None,
) -> Record:
    """Time appending, evicting and merging a chunk's rows in one layer, while it is small and while it is large."""
    from mplus.bench import store as storing

    return storing.measure(*bench.how, name, positive(rows, "--rows"))


@measurement()
def attention(bench: Bench) -> Record:
    """Time the attention of one layer over memory and text alone: backends of mplus, and PyTorch's own ways.

    Backends get memory and text apart, as in a read; PyTorch's ways get them joined. The reference is among the
    backends unless others are named.
    """
    from mplus.bench import attention as attending

    return attending.measure(*bench.how, bench.backends)
