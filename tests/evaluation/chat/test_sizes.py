"""How long a chat model's answers may be."""

from __future__ import annotations

from mplus.evaluation.chat.sizes import SIZES, answer_tokens
from mplus.evaluation.tasks import protocol


def test_a_chat_model_may_say_a_sentence_to_questions_of_public_data_sets():
    found = {name: answer_tokens(protocol(name)) for name in SIZES}
    assert found == {
        "notes": 16,
        "needles": 16,
        "conversations": 24,
        "squad": 24,
        "natural-questions": 24,
        "babi": 24,
    }
