"""BatchedStreams: the memories of many streams of M+ or MemoryLLM as one tensor per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import attrs
import torch
from torch import Tensor

from mplus.backends.base import Segment
from mplus.config import Component, MPlusConfig, options_of
from mplus.errors import ConfigError, InputError
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.build import memory_mechanism
from mplus.mechanisms.decoder import Adapter, Decoder, Prefix, Project, Rows
from mplus.mechanisms.short_term.batched_prefix import BatchedPrefix, RowSelector, ScoreSelector
from mplus.mechanisms.short_term.long_term_rows import LongTermRows
from mplus.mechanisms.short_term.write import (
    Drop,
    MadeFrom,
    MadeOf,
    WritePass,
    assemble,
    oldest_last,
    plan_write,
    split_order,
)
from mplus.mechanisms.streams import Candidates, Read, TrainingStreams
from mplus.memory.writing.update import Update
from mplus.stores.base import StoreLayout


class BatchedStreams(TrainingStreams):
    """B independent memories that always hold equally many rows.

    Given the same chunks and seeds they hold the same rows as ``mplus.Memory`` does: the write pass, its plan, the
    random drop and the layout of a read are the same functions. Short-term rows may carry the graph of the write that
    made them; long-term rows never do.

    Attributes:
        stm: per layer ``[B, n, d]``, oldest first, n at most ``short_term_tokens``.
        stm_source: per layer ``[B, n]`` int64, the source each row was written from.
        stm_birth: per layer ``[B, n]`` int64, as ``MemoryRows.birth``.
        ltm: per layer, the rows that left the STM.
        long_term_tokens: capacity of ``ltm``; 0: rows that leave the STM are gone.
    """

    def __init__(
        self,
        config: MPlusConfig,
        additions: MemoryAdditions,
        decoder: Decoder,
        layout: StoreLayout,
        numbers: Sequence[int],
        *,
        seed: int,
        long_term_tokens: int,
    ) -> None:
        """All streams start without rows.

        Raises:
            ConfigError: no streams; or a variant, pool or setting that these streams do not follow
                (``check_batched``).
        """
        super().__init__(numbers, seed)
        if config.variant != "paper":
            raise ConfigError(f"training follows variant 'paper', got {config.variant!r}: wrap with variant='paper'")
        check_batched(config, long_term=long_term_tokens > 0)
        if additions.pool is not None:
            raise ConfigError("these streams start from empty memories, but this decoder came with a pool of rows")
        self.config, self.additions, self.decoder, self.layout = config, additions, decoder, layout
        self.long_term_tokens = long_term_tokens
        options = config.mechanism.options
        self.made_of: MadeOf = "inputs" if options.get("rows") == "inputs" else "outputs"
        self.made_from: MadeFrom = cast("MadeFrom", options.get("tokens", "last"))
        self.drop: Drop = cast("Drop", options.get("drop", "random"))
        self.reset()

    @property
    def rows(self) -> int:
        """Short-term rows of each layer and stream, n."""
        return self.stm[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.stm) + sum(rows.hidden.nbytes for rows in self.ltm)

    def reset(self) -> None:
        layout, batch = self.layout, len(self)
        layers = range(layout.layers)
        self.clock = 0
        self.stm = [torch.zeros(batch, 0, layout.hidden_size, dtype=layout.dtype, device=layout.device) for _ in layers]
        self.stm_source = [torch.zeros(batch, 0, dtype=torch.int64, device=layout.device) for _ in layers]
        # The same empty tensors: columns are replaced, never written into.
        self.stm_birth = list(self.stm_source)
        self.ltm = [LongTermRows(batch, layout, self.long_term_tokens) for _ in layers]

    def detach(self) -> None:
        self.stm = [rows.detach() for rows in self.stm]

    def encode(self, ids: Tensor) -> Update:
        config = self.config
        if ids.ndim != 2 or ids.shape[0] != len(self) or not 1 <= ids.shape[1] <= config.chunk_tokens:
            raise InputError(
                f"chunks must be [{len(self)}, 1 to chunk_tokens ({config.chunk_tokens})], got {list(ids.shape)}"
            )
        reencode = not self.decoder.shape.hybrid
        plan = plan_write(self.stm, ids.shape[1], config.memory_tokens_per_chunk, reencode=reencode)
        write = WritePass(plan, self.additions, self.made_of, self.made_from)
        return Update(write.run(self.decoder, ids.to(self.layout.device)))

    def absorb(self, update: Update, source: Tensor) -> None:
        """Take the new rows; a random few leave the full STM."""
        k = update.hidden[0].shape[1]
        excess = max(self.rows + k - self.config.short_term_tokens, 0)
        device = update.hidden[0].device
        birth = torch.arange(self.clock, self.clock + k, device=device).expand(len(self), -1)
        source = source.to(device)[:, None].expand(-1, k)
        orders = self._orders(excess)
        for layer, new in enumerate(update.hidden):
            columns = (self.stm[layer], self.stm_source[layer], self.stm_birth[layer])
            if excess:
                stay, leave = (places.to(new.device) for places in split_order(orders[layer], excess))
                if self.long_term_tokens:
                    self.ltm[layer].append(*(_take(column.detach(), leave) for column in columns))
                columns = tuple(_take(column, stay) for column in columns)  # type: ignore[assignment]
            hidden, sources, births = columns
            self.stm[layer] = torch.cat([hidden, new.to(hidden.dtype)], 1)
            self.stm_source[layer] = torch.cat([sources, source], 1)
            self.stm_birth[layer] = torch.cat([births, birth], 1)
        self.clock += k

    def _orders(self, excess: int) -> list[Tensor]:
        """Per layer ``[B, n]``, an order for each stream; a random one is drawn as ``Memory`` draws it."""
        if not excess:
            return []
        layers = len(self.stm)
        if self.drop == "oldest":
            return [oldest_last(self.rows, excess).expand(len(self), -1)] * layers
        if self.config.drop_per_layer:
            drawn = [[torch.randperm(self.rows, generator=g) for _ in range(layers)] for g in self.generators]
        else:
            drawn = [[torch.randperm(self.rows, generator=g)] * layers for g in self.generators]
        return [torch.stack([stream[layer] for stream in drawn]) for layer in range(layers)]

    def read(
        self,
        texts: Tensor,
        *,
        queries: Tensor | None = None,
        candidates: Candidates | None = None,
        logits_to_keep: int = 0,
        selector: RowSelector | Literal["retriever"] | None = "retriever",
        retrieved_tokens: int | None = None,
    ) -> Read:
        """Read R texts of each stream: ``[begin | selected long-term rows | STM | text]`` (M+ section 3.3).

        Args:
            texts: ``[B, R, T]`` int64, padding on the right.
            queries: ``[B, R, T]`` bool, the tokens that retrieval sees; None: all.
            candidates: chooses rows for a retriever loss.
            logits_to_keep: compute the logits of so many last tokens only; 0: of all.
            selector: chooses long-term rows; "retriever": the mechanism's own does; None: none are read.
            retrieved_tokens: K0 for this read; None: that of the config.
        """
        if selector == "retriever":
            retriever = self.additions.retriever
            selector = None if retriever is None or not self.long_term_tokens else ScoreSelector(retriever)
        k0 = self.config.retrieved_tokens if retrieved_tokens is None else retrieved_tokens
        rows = 1 + self.rows + max(min(k0 if selector else 0, ltm.count) for ltm in self.ltm)
        queries = torch.ones_like(texts, dtype=torch.bool) if queries is None else queries
        source = BatchedPrefix(self, self.config, self.additions.begin, self.decoder, queries, selector, candidates, k0)
        return Read(self._logits(source.prefix, texts, rows, "read", logits_to_keep), source.layers)

    def read_update(self, update: Update, texts: Tensor, adapter: Adapter) -> Read:
        """Read texts ``[B, R, T]`` with ``[begin | update]`` in front, which keeps its graph (published: "write")."""
        each = texts.shape[1]
        begin = self.additions.begin

        def prefix(layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
            new = update.hidden[layer].repeat_interleave(each, 0)
            return (project(Rows(assemble(begin[layer], [new], hidden, batch=hidden.shape[:1]))),)

        return Read(self._logits(prefix, texts, 1 + update.hidden[0].shape[1], adapter), {})

    def _logits(self, prefix: Prefix, texts: Tensor, rows: int, adapter: Adapter, logits_to_keep: int = 0) -> Tensor:
        found = self.decoder.run(
            texts.flatten(0, 1),
            prefix=prefix,
            prefix_rows=rows,
            adapter=adapter,
            collect={"logits"},
            logits_to_keep=logits_to_keep,
        )
        assert found.logits is not None  # noqa: S101  (they were asked for)
        return found.logits.view(*texts.shape[:2], *found.logits.shape[1:])

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self.clock,
            "stm": [rows.detach() for rows in self.stm],
            "stm_source": list(self.stm_source),
            "stm_birth": list(self.stm_birth),
            "ltm": [rows.state_dict() for rows in self.ltm],
            **self.generator_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        given = (len(state["generators"]), len(state["stm"]) if "stm" in state else 0)
        if given != (len(self), len(self.stm)):
            raise ConfigError(
                f"the saved streams must be {len(self)} with {len(self.stm)} layers, got {given[0]} with {given[1]}"
            )
        self.clock = state["clock"]
        for name in ("stm", "stm_source", "stm_birth"):
            setattr(self, name, [column.to(self.layout.device) for column in state[name]])
        for rows, saved in zip(self.ltm, state["ltm"], strict=True):
            rows.load_state_dict(saved)
        self.load_generator_states(state)


def _take(column: Tensor, index: Tensor) -> Tensor:
    """Return ``column[b, index[b]]`` of every stream b."""
    return column.gather(1, index if column.ndim == 2 else index[..., None].expand(-1, -1, column.shape[2]))


BATCHED = ("mplus", "memoryllm")
"""Mechanisms whose streams can be held together."""
FOLLOWED = ("rows", "tokens", "drop", "begin")
"""Options of theirs that such streams follow."""
EVICTION = Component("fifo")


def check_batched(memory: MPlusConfig, *, long_term: bool) -> None:
    """Refuse a configuration that batched streams would not follow, for whoever needs these and no others.

    Settings of long-term memory matter only to streams that have one (``long_term``).

    Raises:
        ConfigError: a mechanism or a setting that they do not follow; named.
        UnknownNameError: no mechanism has the name.
    """
    name = memory.mechanism.name
    if name not in BATCHED:
        raise ConfigError(
            f"mechanism must be {' or '.join(map(repr, BATCHED))} here, got {name!r} ({MECHANISMS.origin(name)}): "
            "evaluations that hold many memories as dense tensors know the rows of these two, so that absorb and "
            f"retrieve of {name!r} would never be called. Take one of the two, or measure {name!r} with another "
            "evaluation, or with a program of your own, by memory.write and model(..., memory=memory)"
        )
    if long_term and not memory_mechanism(name).uses_retriever:
        raise ConfigError(
            f"mechanism {name!r} has no long-term memory, and streams with one were asked for: "
            "set long_term to false and long_term_tokens to 0, or take the mechanism 'mplus'"
        )
    changed = changed_options(memory)
    if changed and (long_term or name == "memoryllm"):
        raise ConfigError(
            f"options of the mechanism {name!r} must be left out here, got {', '.join(changed)}: memories that are "
            "held as dense tensors would ignore them. Leave them out, and wrap the trained decoder with them"
        )
    if long_term and memory.eviction != EVICTION:
        raise ConfigError(
            f"eviction must be 'fifo' for streams with long-term memory, got {memory.eviction.plain()!r}: in memories "
            "that are held as dense tensors the oldest rows make room. Leave it out, and give the policy to "
            "new_memory of the trained decoder"
        )


def can_be_batched(memory: MPlusConfig, *, long_term: bool) -> bool:
    """Return whether batched streams follow all of a configuration."""
    changed = changed_options(memory)
    known = memory.mechanism.name in BATCHED and memory.variant == "paper"
    return (
        known
        and not (changed and (long_term or memory.mechanism.name == "memoryllm"))
        and (not long_term or memory.eviction == EVICTION)
    )


def changed_options(memory: MPlusConfig) -> list[str]:
    """Return ``name=value`` of the mechanism's options that differ from their defaults and would be ignored."""
    cls = MECHANISMS.get(memory.mechanism.name)
    options, defaults = options_of(cls, memory.mechanism.options), cls.Options()
    values = attrs.asdict(options)
    return [
        f"{name}={value!r}"
        for name, value in values.items()
        if name not in FOLLOWED and value != getattr(defaults, name)
    ]
