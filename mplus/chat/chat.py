"""Chat: a session with a decoder, the last turns of which stand in the prompt and the others in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from attrs import evolve

from mplus.chat.answer import Answer
from mplus.chat.exchange import ROLES, SPEAKERS, Exchange, Message, Turn, to_turns, told
from mplus.chat.journal import FILE, Journal
from mplus.chat.prompt import ChatFormat
from mplus.chat.reply import Reply, recalled_of
from mplus.chat.streaming import Watch
from mplus.errors import ConfigError, InputError
from mplus.memory import Memory

if TYPE_CHECKING:
    from mplus.hf.types import Argument, PreTrainedTokenizerBase

WINDOW, NEW = 1024, 256
"""Tokens of a prompt and of an answer where nobody says."""


class Chat:
    """A session over a decoder and a memory: messages in, streamed answers out.

    The last exchanges (a message and its answer) stand in the prompt, as many as fit into ``window_tokens``. An
    exchange that leaves it goes into memory, once, as a source of its own, named by when it was said, with speakers.
    ``close`` puts the rest there, so that a later session knows everything. With a memory in a directory the exchanges
    in the prompt are on disk there too (``chat.jsonl``): after a crash the next session begins with them.

    A message and its answer enter the session together, when the answer is over: after an error all is as before, and
    the message may be sent again. An answer that was interrupted counts with what was said of it, if anything was.

    Example:
        >>> with mplus.Chat(model, memory) as chat:
        ...     reply = chat.send("My dog is called Pepper.")
        ...     for piece in chat.stream("What is the name of my dog?"):
        ...         print(piece, end="")

    Attributes:
        model: the decoder, wrapped unless there is no memory.
        memory: of one stream; None: what leaves the prompt is lost.
        system: what the system says at the beginning of every prompt; None: what the template says.
        window_tokens: most tokens of a prompt, system text and template included, memory not.
        exchanges: those in the prompt, oldest first.
        recalls: whether answers read the memory; may be set at any time, to compare.
        reply: the last one; None: there was none yet.
    """

    def __init__(
        self,
        model: Any,  # any decoder of transformers, whose classes have no type in common that generates
        memory: Memory | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        system: str | None = None,
        window_tokens: int | None = None,
        speakers: Mapping[str, str] = SPEAKERS,
        remember: Sequence[str] = ROLES,
        plain: bool = False,
        clock: Callable[[], datetime] | None = None,
        **generation: Argument,
    ) -> None:
        """Begin a session, or go on with one that a crash ended.

        Args:
            model, memory, system: see above.
            tokenizer: of the decoder; default: that of the memory.
            window_tokens: see above; default: 1,024, or half of the decoder's positions where that is less.
            speakers: names by role ("user", "assistant", "tool"), as memory knows them.
            remember: the roles whose turns go into memory. Without "assistant", as for a decoder that makes things up,
                turns that do nothing but ask do not go there either: without the answer they tell nothing.
            plain: write prompts as lines of "User: ..." and "Assistant: ...", for decoders without a chat template.
            clock: returns the present time, in UTC; default: that of the computer.
            generation: arguments of ``generate``; ``max_new_tokens`` is 256, or a quarter of the positions, otherwise.

        Raises:
            ConfigError: no tokenizer, or one without a chat template and not ``plain``; a window that is too long; no
                such role.
            InputError: the memory has several streams.
            MemoryFileError: the exchanges on disk cannot be read.
        """
        self.model, self.memory, self.system = model, memory, system
        if tokenizer is None and memory is not None:
            tokenizer = cast("PreTrainedTokenizerBase | None", memory.tokenizer)
        if tokenizer is None:
            raise ConfigError("a chat needs a tokenizer: pass tokenizer=, here or where the memory is made")
        if memory is not None and memory.batch_size != 1:
            raise InputError(
                f"a chat needs a memory of one stream, got {memory.batch_size}: pick one with memory.select([row])"
            )
        self.format = ChatFormat(tokenizer, plain)
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
        self.generation: dict[str, Argument] = {"max_new_tokens": min(NEW, positions // 4), **generation}
        self.window_tokens = min(WINDOW, positions // 2) if window_tokens is None else window_tokens
        new = cast("int", self.generation["max_new_tokens"])
        if self.window_tokens < 1 or self.window_tokens + new > positions:
            raise ConfigError(
                f"window_tokens must be at least 1 and leave room for max_new_tokens ({new}) in the {positions:,} "
                f"positions of the decoder, got {window_tokens}"
            )
        if unknown := sorted({*remember, *speakers} - set(ROLES)):
            raise ConfigError(f"remember and speakers must name roles ({', '.join(ROLES)}), got {', '.join(unknown)}")
        self.speakers, self.remember = {**SPEAKERS, **speakers}, tuple(remember)
        self.recalls, self._clock = True, clock or partial(datetime.now, UTC)
        self.reply: Reply | None = None
        self._lock = threading.Lock()
        directory = None if memory is None else memory.directory
        self._journal = None if directory is None else Journal(directory.path / FILE)
        kept = [] if self._journal is None else self._journal.read()
        # Of a session that ended in a crash, without the exchange that had just gone into memory.
        self.exchanges: list[Exchange] = [one for one in kept if one.name not in self._names()]

    # ------------------------------------------------------------------ talking

    def send(self, message: str | Message | Sequence[Message], *, keep: bool = True, **generation: Argument) -> Reply:
        """Return the answer to a message.

        Args:
            message: a text of the user, a message (a dict with "role", "content" and, if known, "name"), or several.
            keep: let message and answer enter the session; False: it is as if nothing had been asked.
            generation: arguments of ``generate`` for this answer.

        Raises:
            InputError: it is no message, is too long for the window, or another answer is being given.
            MPlusError: what ``Memory.write`` and ``generate`` raise.
        """
        answer = self.stream(message, keep=keep, **generation)
        for _ in answer:
            pass
        return answer.reply

    def stream(
        self, message: str | Message | Sequence[Message], *, keep: bool = True, **generation: Argument
    ) -> Answer:
        """Return the answer to a message as an iterator over its pieces of text, for ``for`` and ``async for``.

        Arguments as for ``send``. Raises InputError: it is no message. The rest is raised by the iterator.
        """
        turns = to_turns(message, self.speakers)
        watch = partial(Watch, self.format.tokenizer, self.format.stops)
        return Answer(watch, lambda watch: self._answer(turns, watch, keep, {**self.generation, **generation}))

    async def asend(
        self, message: str | Message | Sequence[Message], *, keep: bool = True, **generation: Argument
    ) -> Reply:
        """Return the answer to a message, and let other tasks run meanwhile; as ``send`` otherwise.

        Cancelled, it ends the answer at its next token.
        """
        answer = self.stream(message, keep=keep, **generation)
        async for _ in answer:
            pass
        return answer.reply

    def _answer(self, turns: tuple[Turn, ...], watch: Watch, keep: bool, generation: dict[str, Argument]) -> Reply:
        """Generate an answer, in whatever thread."""
        if not self._lock.acquire(blocking=False):
            raise InputError("one answer at a time: another one of this chat has not been read to its end")
        try:
            exchange = self._exchange(turns)
            ids = self._make_room(exchange)
            if watch.interrupted:
                return Reply(text="", prompt_tokens=len(ids), interrupted=True)
            reply = self._generate(ids, watch, generation)
            if keep and (reply.text or not reply.interrupted):
                said = Turn("assistant", reply.text, self.speakers["assistant"])
                self._keep([*self.exchanges, evolve(exchange, turns=(*turns, said))])
            self.reply = reply
            return reply
        finally:
            self._lock.release()

    def _generate(self, ids: list[int], watch: Watch, generation: dict[str, Argument]) -> Reply:
        memory = self.memory if self.recalls else None
        prompt = torch.tensor([ids], device=self.model.get_input_embeddings().weight.device)
        ends = {"eos_token_id": self._ends()} if "eos_token_id" not in generation else {}
        reads = {} if memory is None else {"memory": memory, "output_sources": True}
        # A memory whose mechanism answers calls of the decoder takes back some of what is generated.
        streams = memory is None or getattr(memory.engine.mechanism, "opens", None) is None
        output = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True,
            stopping_criteria=[watch], **({"streamer": watch} if streams else {}), **ends, **{**generation, **reads},
        )  # fmt: skip
        if not streams:
            watch.put(prompt)
            watch.put(output.sequences[0, prompt.shape[1] :])
            watch.end()
        return Reply(
            text=watch.said.strip(),
            recalled=() if memory is None else recalled_of(output.memory_sources[0]),
            prompt_tokens=len(ids),
            tokens=len(watch.tokens),
            first_seconds=None if watch.first is None else watch.first - watch.started,
            seconds=time.perf_counter() - watch.started,
            interrupted=watch.interrupted,
        )

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer: by the decoder's settings, and by the tokenizer."""
        own = self.model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), self.format.tokenizer.eos_token_id]
        return sorted({token for token in ends if token is not None})

    # ------------------------------------------------------------------ keeping

    def _exchange(self, turns: tuple[Turn, ...]) -> Exchange:
        """Return an exchange that begins now, under a name that nothing else has."""
        now = self._clock()
        taken = {*self._names(), *(exchange.name for exchange in self.exchanges)}
        stem = f"chat {now:%Y-%m-%d %H:%M:%S}"
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem} ({count})"
        return Exchange(name, now, turns)

    def _names(self) -> set[str | None]:
        """Return the names of the sources in memory."""
        return set() if self.memory is None else {source.name for source in self.memory.states[0].sources}

    def _make_room(self, exchange: Exchange) -> list[int]:
        """Let the oldest exchanges go into memory until the prompt fits; return its tokens."""
        alone = self.format.ids(self._messages([exchange]))
        if len(alone) > self.window_tokens:
            raise InputError(
                f"a message must fit into window_tokens ({self.window_tokens}) with the template around it, got "
                f"{len(alone)} tokens: write a long text into the memory (memory.write) and ask about it"
            )
        while self.exchanges:
            ids = self.format.ids(self._messages([*self.exchanges, exchange]))
            if len(ids) <= self.window_tokens:
                return ids
            self._let_go()
        return alone

    def _messages(self, exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(turn.message() for one in exchanges for turn in one.turns)]

    def _let_go(self) -> None:
        """Write the oldest exchange into memory, and take it out of the prompt."""
        oldest, *rest = self.exchanges
        text = told(oldest, self.remember)
        if self.memory is not None and text:
            # ``write_id``: after a crash before the next line it is written again, and counts once.
            self.memory.write(text, source=oldest.name, write_id=oldest.name, atomic=True, progress=False)
        self._keep(rest)

    def _keep(self, exchanges: list[Exchange]) -> None:
        self.exchanges = exchanges
        if self._journal is not None:
            self._journal.write(exchanges)

    def forget(self, name: str) -> None:
        """Forget an exchange, in the prompt or in memory, or another source of the memory.

        Raises InputError: there is none of this name; and as ``Memory.forget``.
        """
        if any(exchange.name == name for exchange in self.exchanges):
            self._keep([exchange for exchange in self.exchanges if exchange.name != name])
        elif self.memory is not None:
            self.memory.forget(name)
        else:
            raise InputError(f"there must be an exchange of this name, got {name!r}")

    def close(self) -> None:
        """Put the exchanges that are still in the prompt into memory; the memory itself stays open. Idempotent."""
        while self.exchanges:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
