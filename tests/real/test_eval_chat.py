"""The harness on a real chat model: the right chunk out of the memory says what its text says."""

from __future__ import annotations

import copy

import mplus
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.generating import Generation
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import make_arms
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.texts import Texts


def test_the_right_chunk_alone_answers_as_its_text_does(decoder, tokenizer):
    wrapped = mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig(mechanism="kv"))
    notes = Notes(Notes.Options(notes=4, facts=2, questions=3, split="choose"), Texts(tokenizer))
    made = GeneratedAnswers(
        wrapped,
        tokenizer,
        notes,
        options=RunOptions(streams=1),
        generation=Generation.of(tokenizer, tokens=8),
        chat=ChatPrompt.of(tokenizer),
    )
    [moment] = list(made.moments())
    text, rows = (
        [answer.generated.text for answer in arm.answers(moment, moment.due)]
        for arm in make_arms(made, ArmOptions(arms=("ceiling", "kv-oracle"), window_converged=0))[0]
    )
    assert rows == text
