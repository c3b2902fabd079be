"""Log-probabilities in the two forms that OpenAI's routes have."""

from __future__ import annotations

from collections.abc import Sequence

from mplus.config import JsonValue
from mplus.serving.http.openai.rows import Scored
from mplus.serving.http.tokenizer import Tokenizer

LEAST = -9999.0
"""In the place of minus infinity, which JSON does not have."""


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> dict[str, JsonValue]:
    """Return ``logprobs`` of a chat completion's choice."""

    def entry(token: int, value: float) -> dict[str, JsonValue]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(value, LEAST), "bytes": list(raw)}

    content = [
        {
            **entry(one.id, one.logprobs.chosen),
            "top_logprobs": [entry(token, value) for token, value in one.logprobs.best],
        }
        for one in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> dict[str, JsonValue]:
    """Return ``logprobs`` of a completion's choice."""

    def text(token: int) -> str:
        return tokenizer.token_bytes(token).decode(errors="replace")

    return {
        "tokens": [text(one.id) for one in scored],
        "token_logprobs": [max(one.logprobs.chosen, LEAST) for one in scored],
        "top_logprobs": [{text(token): max(value, LEAST) for token, value in one.logprobs.best} for one in scored],
        "text_offset": [one.offset for one in scored],
    }
