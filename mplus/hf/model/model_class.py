"""The class of a wrapped decoder: the decoder's own, whose ``forward`` and ``generate`` also take ``memory``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import evolve

from mplus.config import Component, JsonValue
from mplus.errors import ConfigError, NotSupported
from mplus.eviction import EVICTION
from mplus.hf.model.modes import with_attention
from mplus.hf.model.sizes import chosen, names
from mplus.hf.pretrained.save import SavesAdditions
from mplus.hf.reading import generation_config
from mplus.hf.reading.arguments import DEFAULTS, GivenArguments, ReadArguments
from mplus.hf.reading.forward import check_memory, forward_with_memory
from mplus.hf.reading.generation import GenerateCall, generate
from mplus.hf.retrofit import attention
from mplus.hf.retrofit.context import subclass
from mplus.hf.types import Argument, Output
from mplus.memory.budget import Budget
from mplus.memory.copying import check_device
from mplus.memory.memory import Memory
from mplus.memory.sources.clock import Clock
from mplus.memory.texts import Texts
from mplus.memory.transaction import Streams
from mplus.stores import STORES
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import GenerationOutput


class MemoryModel(SavesAdditions):
    """The methods that a wrapped decoder has besides those of its class, or in place of them."""

    def mplus_summary(self) -> str:
        """Return a few lines for people: technique, positions and sizes that ``wrap`` chose, and what its checks found.

        Example:
            ```python
            print(mplus.wrap(model).mplus_summary())
            ```
        """
        engine, installed = self.mplus_engine, self.mplus_installed
        positions = engine.retrofit.positions
        kept = f"rows kept as: {engine.memory_rows}"
        if isinstance(engine.projection, str):
            kept += f" ({engine.projection})"
        left_open = chosen(installed.asked, engine.config)
        sizes = {
            name: f"{getattr(engine.config, name):,}{' (chosen)' * (name in left_open)}"
            for name in names(engine.config)
        }
        return "\n".join(
            [
                f"technique: {engine.retrofit.technique.replace('_', ' ')}",
                f"positions of memory: {positions.layout}{', offset' if positions.offset else ''}",
                kept,
                *(f"{name}: {size}" for name, size in sizes.items()),
                *map(str, installed.checks),
                *(f"rejected: {reason}" for reason in installed.rejected),
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
        """Make a memory for this decoder.

        Args:
            batch_size: number of independent streams.
            tokenizer: lets ``Memory.write`` take text; None: the one that was given to ``wrap``, if one was.
            seed: stream i draws the rows that leave its STM from a generator seeded with ``seed + i``.
            store, eviction: override the config, as a name or ``{"name": ..., option: value}``.
            bytes_budget: bytes that the whole memory may take, all layers and streams together, as a number or "8GiB";
                overrides the config, its ``long_term_tokens`` too. ``memory.capacity`` says what that comes to.
            device: where the rows are kept; default: where the decoder's embedding is.
            memory_rows: "projected", "hidden" or "both": keep another form of the rows than the config says.
            keep_text: keep the ids of all that is written, so that ``memory.forget(source, mode="rebuild")`` can write
                the memory again without a source.
            clock: returns the present time, a datetime with a timezone, by which sources are dated and expire; default:
                that of the computer, in UTC.

        Raises:
            ConfigError: a batch size below 1, a budget that is too small, or a bad option.
            NotSupported: rows of this decoder cannot be kept like that.
            UnknownNameError: no such store or eviction policy.

        Example:
            ```python
            memory = model.new_memory(tokenizer=tokenizer, bytes_budget="2GiB", eviction="lru")
            memory.write(document, source="handbook.pdf")
            ```
        """
        engine = self.mplus_engine
        tokenizer = engine.tokenizer if tokenizer is None else tokenizer
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if memory_rows not in (None, "projected", "hidden", "both"):
            raise ConfigError(f"memory_rows must be 'projected', 'hidden' or 'both', got {memory_rows!r}")
        layout = engine.layout if memory_rows is None else engine.layout_of(memory_rows)
        if not isinstance(keep_text, bool):
            raise ConfigError(f"keep_text must be True or False, got {keep_text!r}")
        policy = EVICTION.build(engine.config.eviction if eviction is None else Component.of(eviction))
        layout = evolve(
            layout,
            expiry=layout.expiry or policy.lifetime is not None,
            device=layout.device if device is None else check_device(device),
        )
        generators = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
        states = [engine.new_state(layout) for _ in range(batch_size)]
        if keep_text:
            texts = [Texts.of(generator.get_state()) for generator in generators]
            states = [evolve(state, texts=kept) for state, kept in zip(states, texts, strict=True)]
        chosen_store = engine.config.store if store is None else Component.of(store)
        stores = [STORES.build(chosen_store, layout) for _ in range(batch_size)]
        budget = Budget.of(bytes_budget, engine.config, engine.mechanism, stores[0], batch_size)
        memory = Memory(Streams(engine, states, stores, generators, policy, budget, clock=clock), tokenizer)
        engine.mechanism.calibrate(engine.decoder, memory.snapshot()[0], tokenizer)
        return memory

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
    ) -> Any:  # a tensor or an output, as transformers decides by settings that no type sees
        """``generate`` of the decoder, reading ``memory`` as it is at the call.

        Each of the arguments below may also stand in a ``GenerationConfig``, in that of the call or in the decoder's
        own, ``model.generation_config``; an argument that is not None goes first, then the config of the call, then the
        block of ``reading`` around it. Copies of a config refer to the same memory, and what is made of it as text or a
        file leaves the memory out.

        Args:
            memory: one stream per prompt, or one for all prompts; None everywhere, and no ``reading`` around the call:
                the decoder alone.
            query_tokens: retrieve with the first so many tokens of each prompt, padding not counted; one number, or
                one per prompt. None: as configured, by default with all. Has no effect on a prompt whose cache was
                begun before: rows were retrieved then.
            retrieval_query: retrieve with this and not with the prompt: a text or token ids, for all prompts or one per
                prompt. For memories that choose once what a text reads (``kv``, text).
            min_score: bring back only chunks that the retriever scores higher, of memories that have a threshold
                (``kv``); None: as configured.
            retrieve_every: besides once per prompt, retrieve anew after so many generated tokens.
            output_sources: with ``return_dict_in_generate=True``, the result gets ``memory_sources``: for every batch
                row and memory layer the rows retrieved last (``mplus.hf.reading.reading.RetrievedSource``).
            reuse_memory_cache: accept ``past_key_values`` made under an older state of the memory, and read that one.

        Raises:
            ArgumentError: a keyword is one of these, misspelt.
            ConfigError, InputError: one of them breaks its rule.
            NotSupported: a way of generating that memory cannot follow; the message names it.
            MemoryMismatchError: batch sizes, model or cache do not fit the memory.

        Example:
            ```python
            output = model.generate(
                **tokenizer("Who has the key?", return_tensors="pt"),
                memory=memory,
                output_sources=True,
                return_dict_in_generate=True,
            )
            print(tokenizer.decode(output.sequences[0]), output.memory_sources[0])
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
        return generate(self, self.mplus_engine, type(self).__mplus_base__, own, args, kwargs)

    def reading(
        self,
        memory: Memory | None,
        *,
        query_tokens: int | Sequence[int] | None = None,
        retrieval_query: str | Sequence[int] | Sequence[str | Sequence[int]] | None = None,
        min_score: float | None = None,
        retrieve_every: int | None = None,
        reuse_memory_cache: bool = False,
        threads: bool = False,
    ) -> AbstractContextManager[None]:
        """Let every call of this decoder inside the ``with`` block read ``memory``, whoever makes the call.

        It holds for this decoder, in the context (``contextvars``) that enters the block. A call that names a memory
        itself reads that one by its own arguments; other arguments of a call replace those of the block. Blocks may
        be nested: the innermost counts.

        Args:
            memory: of one stream, for any batch, or of one per batch row; None: the decoder alone.
            query_tokens, retrieval_query, min_score: of every call; see ``generate``.
            retrieve_every, reuse_memory_cache: likewise.
            threads: calls in other threads read the memory too, unless these are in a block of their own. Otherwise
                such a call raises NotSupported while the block is open.

        Raises:
            ConfigError: an argument breaks its rule.
            MemoryMismatchError: the memory belongs to another decoder.

        Example:
            ```python
            with model.reading(memory):
                pipeline("text-generation", model=model, tokenizer=tokenizer)("Who has the key?")
            ```
        """
        if memory is not None:
            check_memory(self.mplus_engine, memory)
        arguments = ReadArguments(
            memory=memory,
            query_tokens=query_tokens,
            retrieval_query=retrieval_query,
            min_score=min_score,
            retrieve_every=retrieve_every,
            reuse_memory_cache=reuse_memory_cache,
        )
        return self.mplus_engine.readings.enter(arguments, threads)

    def generate_batch(self, *args: Any, memory: Memory | None = None, **kwargs: Any) -> dict[str, GenerationOutput]:
        """Generate by continuous batching, as in transformers, with the decoder alone.

        Raises:
            NotSupported: it would read a memory.
        """
        call = GenerateCall(self, {"memory": memory}, args, kwargs)
        if call.read_arguments(self.mplus_engine.readings).memory is not None:
            raise NotSupported(
                "generate_batch (continuous batching) keeps keys and values of many texts in pages and leaves no place "
                "for memory in front of a text: use generate"
            )
        with with_attention(self, self.mplus_installed.base_attention):
            return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """Make a manager as in transformers, within ``generate_batch``.

        Raises:
            NotSupported: it is called elsewhere, where the manager would outlive the call.
        """
        if self.config._attn_implementation.startswith(attention.PREFIX):
            raise NotSupported(
                "continuous batching in a wrapped decoder goes through generate_batch; or use mplus.unwrap first"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def weights_changed(self) -> None:
        """Say that weights were changed in a way that leaves no trace: the next read or write looks at all of them.

        Before every prompt mplus looks at all numbers of the adapters that act, and at ``data_ptr()``, the count of
        in-place changes and 64 numbers of every other weight that memory rows go through. Only a change through
        ``weight.data[...] = ...``, which is not counted, to none of the numbers looked at needs this call.
        """
        self.mplus_engine.watch.forget()

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: bool, **kwargs: bool) -> None:
        """Set it as in transformers; with others than "eager" and "sdpa" memory is refused from then on."""
        wanted = attn_implementation
        if (
            isinstance(wanted, str)
            and wanted in attention.BASES
            and self.mplus_engine.retrofit.technique == "attention"
        ):
            self.mplus_installed.base_attention = wanted
            wanted = attention.PREFIX + wanted
        super().set_attn_implementation(wanted, *args, **kwargs)


def memory_model_class(base: type[PreTrainedModel]) -> type:
    """Return ``base`` with ``MemoryModel`` mixed in, and the arguments of a read in the signature of ``forward``."""
    attention.register()  # here, since a model of this class may come out of a pickle in a new process
    return reading_class(base, MemoryModel, memory_model_class, forward_with_memory)


def reading_class(
    base: type[PreTrainedModel],
    mixin: type[MemoryModel],
    make: Callable[[type[PreTrainedModel]], type],
    read: Callable[..., Output],
) -> type:
    """Return ``base`` with ``mixin`` in front, and a ``forward`` that takes the arguments of a read.

    Args:
        base: class of the decoder.
        mixin: its further methods.
        make: makes this class of ``base``; see ``subclass``.
        read: called with the decoder, ``base``, these arguments, and the others of the call.
    """
    generation_config.register()

    @functools.wraps(base.forward)
    def forward(
        self: PreTrainedModel,
        *args: Argument,
        memory: Memory | None = None,
        query_tokens: int | Sequence[int] | None = None,
        retrieval_query: str | Sequence[int] | Sequence[str | Sequence[int]] | None = None,
        min_score: float | None = None,
        retrieve_every: int | None = None,
        output_sources: bool = False,
        reuse_memory_cache: bool = False,
        **kwargs: Argument,
    ) -> Output:
        asked: GivenArguments = {
            "memory": memory,
            "query_tokens": query_tokens,
            "retrieval_query": retrieval_query,
            "min_score": min_score,
            "retrieve_every": retrieve_every,
            "output_sources": output_sources,
            "reuse_memory_cache": reuse_memory_cache,
        }
        return read(self, base, asked, args, kwargs)

    signature = inspect.signature(base.forward)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in DEFAULTS.items()
    ]
    parameters = list(signature.parameters.values())
    at = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    # generate() checks keywords, and Trainer drops data columns, by this signature.
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], *extra, *parameters[at:]]
    )
    return subclass(base, mixin, make, forward=forward)
