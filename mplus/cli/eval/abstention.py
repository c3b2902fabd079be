"""``mplus eval abstention``."""

from __future__ import annotations

from typing import Annotated

import typer

from mplus.cli.eval.options import QUESTIONS, EvalOptions, experiment, show_plain


@experiment({"untold": "ages"})
def abstention(
    options: EvalOptions,
    untold: Annotated[int, typer.Option(min=1, help="Questions per episode whose answer was never told.")] = 1,
) -> None:
    """Can it be told that an answer is not in memory? Signs compared and combined: AUROC and abstention accuracy.

    Calibrated on every other episode, judged on the rest.
    """
    from mplus.evaluation.abstention import abstention as run

    with_recipe = options.recipe is not None
    execution = options.facts(QUESTIONS, untold=True) if with_recipe else options.generated_answers(untold=untold)
    show_plain(run(execution, name=options.name), options.as_json)
