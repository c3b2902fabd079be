"""The class of a decoder whose memories are made of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from mplus.config import Component, JsonValue
from mplus.errors import ConfigError
from mplus.eviction import EVICTION
from mplus.hf.model.model_class import MemoryModel, reading_class
from mplus.hf.model.sizes import chosen
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.forward import forward_with_text
from mplus.hf.text.generation import generate_with_text
from mplus.hf.types import Argument
from mplus.memory.memory import Memory
from mplus.memory.sources.clock import Clock
from mplus.memory.transaction import Streams
from mplus.stores import STORES
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IN_FILES = Component("mmap")
"""The store that ``Memory.open`` asks for; of a memory of text it stays empty."""


class TextMemoryModel(MemoryModel):
    """The methods of a wrapped decoder whose memories are made of text, in place of those of ``MemoryModel``."""

    mplus_engine: TextEngine  # type: ignore[assignment]

    def mplus_summary(self) -> str:
        """Return a few lines for people: how its memories are read, and the size of their passages."""
        engine, installed = self.mplus_engine, self.mplus_installed
        mechanism, tokens = engine.mechanism, f"{engine.config.chunk_tokens:,}"
        where = "the start of the prompt" if mechanism.place == "start" else "the opening of the last user turn"
        calls = [] if mechanism.opens is None else [f"calls answered: {mechanism.opens}...{mechanism.closes}"]
        return "\n".join(
            [
                f"memories of text: {mechanism.name}",
                f"recalled text stands at: {where}",
                *calls,
                f"chunk_tokens: {tokens}{' (chosen)' * ('chunk_tokens' in chosen(installed.asked, engine.config))}",
                *map(str, installed.checks),
            ]
        )

    def new_memory(
        self,
        batch_size: int = 1,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        store: Component | str | Mapping[str, JsonValue] | None = None,
        eviction: Component | str | Mapping[str, JsonValue] | None = None,
        bytes_budget: int | str | None = None,
        device: torch.device | str | None = None,
        memory_rows: Literal["projected", "hidden", "both"] | None = None,
        keep_text: bool = False,
        clock: Clock | None = None,
    ) -> Memory:
        """Make a memory of text.

        Args:
            batch_size: number of independent streams.
            tokenizer: counts tokens, and turns what is recalled into them; None: the one that was given to ``wrap``.
                Without one a memory can be listed and made to forget, but not written or read.
            seed: of the generators that every memory has; a memory of text draws nothing.
            store, eviction, bytes_budget, device, memory_rows, keep_text: of memories of rows; refused by name.
            clock: returns the present time, a datetime with a timezone; default: that of the computer, in UTC.

        Raises:
            ConfigError: a batch size below 1, or an argument that means nothing here.

        Example:
            ```python
            memory = model.new_memory(tokenizer=tokenizer)
            memory.write("The key is under the blue stone.", source="garden")
            ```
        """
        engine = self.mplus_engine
        tokenizer = engine.tokenizer if tokenizer is None else tokenizer
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        engine.check_options(
            store=None if store is None or Component.of(store) == IN_FILES else store,
            eviction=eviction,
            bytes_budget=bytes_budget,
            device=None if device is None or torch.device(device).type == "cpu" else device,
            memory_rows=memory_rows,
            keep_text=keep_text,
        )
        layout = engine.layout
        kind = engine.config.store if store is None else Component.of(store)
        states = [engine.new_state(layout) for _ in range(batch_size)]
        stores = [STORES.build(kind, layout) for _ in range(batch_size)]
        generators = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
        streams = Streams(engine, states, stores, generators, EVICTION.build(engine.config.eviction), clock=clock)
        return Memory(streams, tokenizer)

    def generate(
        self,
        *args: Argument,
        memory: Memory | None = None,
        query_tokens: int | Sequence[int] | None = None,
        retrieval_query: str | Sequence[int] | Sequence[str | Sequence[int]] | None = None,
        min_score: float | None = None,
        retrieve_every: int | None = None,
        output_sources: bool | None = None,
        reuse_memory_cache: bool | None = None,
        **kwargs: Argument,
    ) -> Any:  # as of ``MemoryModel.generate``
        """Generate as the decoder does, with what ``memory`` recalls in front of each prompt.

        What comes back is the prompts as they were given and the text behind them; recalled text, calls of the decoder
        and answers are not in it. Processors and criteria of the call see them all the same. A memory whose mechanism
        answers calls is read prompt by prompt.

        Each of the arguments below may also stand in a ``GenerationConfig``, as for memories of rows.

        Args:
            memory: one stream per prompt, or one for all prompts; None: the decoder alone.
            query_tokens: recall by the first so many tokens of each prompt, padding not counted; one number, or one
                per prompt. None: as configured, by default by all.
            retrieval_query: recall by this and not by the prompt: a text or token ids, for all prompts or one for each.
            min_score, retrieve_every: refused.
            output_sources: with ``return_dict_in_generate=True``, the result gets ``memory_sources``: for every prompt
                a list with one layer, which has the entries that were recalled or answered with.
            reuse_memory_cache: of no effect, since no cache is gone on with.

        Raises:
            ArgumentError: a keyword is one of these, misspelt.
            ConfigError, InputError: one of them breaks its rule, or there are no ids.
            NotSupported: a way of generating that memory cannot follow; the message names it.
            MemoryMismatchError: batch sizes or model do not fit the memory.
            MechanismError: the mechanism recalls more than it may.

        Example:
            ```python
            question = tokenizer("Where is the key?", return_tensors="pt")
            print(tokenizer.decode(model.generate(**question, memory=memory)[0]))
            ```
        """
        own = {
            "memory": memory,
            "query_tokens": query_tokens,
            "retrieval_query": retrieval_query,
            "min_score": min_score,
            "retrieve_every": retrieve_every,
            "output_sources": output_sources,
            "reuse_memory_cache": reuse_memory_cache,
        }
        return generate_with_text(self, self.mplus_engine, type(self).__mplus_base__, own, args, kwargs)

    def weights_changed(self) -> None:
        """Do nothing: a memory of text depends on no weights."""

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: bool, **kwargs: bool) -> None:
        """Set it as in transformers."""
        base = type(self).__mplus_base__
        base.set_attn_implementation(self, attn_implementation, *args, **kwargs)


def text_model_class(base: type[PreTrainedModel]) -> type:
    """Return ``base`` with ``TextMemoryModel`` mixed in, and the arguments of a read in its ``forward``."""
    return reading_class(base, TextMemoryModel, text_model_class, forward_with_text)
