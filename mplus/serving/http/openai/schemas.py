"""Bodies of OpenAI's routes: the fields that this server has, with the ranges of the HTTP contract."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mplus.serving.http.bodies import Body, Id
from mplus.serving.http.errors import bad_request
from mplus.serving.messages import Sampling

MOST = 2**20
"""Tokens that may be asked for, all answers of a request together."""
MOST_MESSAGES = 4096
"""Messages of a conversation, and parts of a message."""
TokenCount = Annotated[int, Field(ge=1, le=MOST)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
SourceName = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


class GenerationBody(Body):
    """Fields that all routes share which generate.

    ``memory`` is the id of the memory that is read: "default" where it is absent, none at all where it is null.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    memory: Id | None = None
    min_score: Annotated[float, Field(ge=0)] | None = None
    memory_sources: bool | None = None
    ignore_eos: bool | None = None

    @property
    def memory_id(self) -> str | None:
        """The id of the memory to read; None: none."""
        return self.memory if "memory" in self.model_fields_set else "default"

    def sampling(self, most: int | None, seed: int | None = None, logprobs: int | None = None) -> Sampling:
        """Return how tokens are chosen, at most ``most`` of them."""
        return Sampling(
            max_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            logprobs=logprobs,
            ignore_end=bool(self.ignore_eos),
        )


class CompletionFields(GenerationBody):
    """Fields of chat completions and completions."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: TokenCount | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """A stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Check what fields have to do with each other. Raises ServingError (400)."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options goes with stream", "stream_options", "invalid_value")
        _check_count("max_tokens", self.n, self.max_tokens)


def _check_count(name: str, answers: int | None, tokens: int | None) -> None:
    if (answers or 1) * (tokens or 1) > MOST:
        raise bad_request(f"n times {name} must be at most {MOST}", name, "invalid_value")


class TextPart(Body):
    """A part of a message: text is the only kind."""

    unsupported = frozenset({"annotations", "logprobs"})
    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    unsupported = frozenset({"refusal", "annotations", "audio", "tool_calls", "function_call"})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES, fail_fast=True)]
    name: SourceName | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The words."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        found = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return found | {name: value for name, value in extra.items() if value is not None}


class Remembering(GenerationBody):
    """Fields by which what was said is written to the memory."""

    remember: Literal["off", "user", "both"] | None = None
    conversation: SourceName | None = None


class ChatBody(CompletionFields, Remembering):
    """``POST /v1/chat/completions``."""

    unsupported = frozenset(
        {
            "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "metadata", "modalities",
            "moderation", "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key",
            "prompt_cache_retention", "reasoning_effort", "response_format", "safety_identifier", "service_tier",
            "store", "tool_choice", "tools", "user", "verbosity", "web_search_options",
        }
    )  # fmt: skip
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self) -> None:
        """Check what fields have to do with each other. Raises ServingError (400)."""
        super().check()
        _check_count("max_completion_tokens", self.n, self.max_completion_tokens)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_completion_tokens and max_tokens are the same: give one"
            raise bad_request(message, "max_completion_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs goes with logprobs", "top_logprobs", "invalid_value")


class CompletionBody(CompletionFields):
    """``POST /v1/completions``."""

    unsupported = frozenset(
        {"best_of", "echo", "frequency_penalty", "logit_bias", "presence_penalty", "suffix", "user"}
    )
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=32, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=32, fail_fast=True),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
