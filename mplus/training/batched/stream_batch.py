"""StreamBatch: the memories of many streams as dense tensors, for training and for measuring many questions at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.errors import ConfigError, InputError
from mplus.hf.model.engine import DecoderEngine
from mplus.mechanisms.short_term.write import WritePass, WritePlan
from mplus.training.batched.long_term import LongTermRows
from mplus.training.batched.semantics import check_semantics

CHOICES = 1 << 40
"""Between the seeds of a stream's two generators."""


class StreamBatch:
    """B independent memories that always hold equally many rows.

    The dense twin of ``mplus.Memory`` in the variant "paper": given the same chunks and seeds it holds the same rows.
    Short-term rows may carry the graph of the write that made them; long-term rows never do.

    Attributes:
        engine: the wrapped decoder.
        numbers: global number of each stream; seeds its draws, so a stream does the same in every process layout.
        stm: per layer ``[B, n, d]``, oldest first, n at most ``short_term_tokens``.
        stm_source: per layer ``[B, n]`` int64, the source each row was written from.
        stm_birth: per layer ``[B, n]`` int64, as ``MemoryRows.birth``.
        ltm: per layer, the rows that left the STM.
        clock: rows written so far per layer.
        generators: of each stream, for the rows that leave the STM.
        choices: of each stream, for what a loss chooses at random.
    """

    def __init__(self, engine: DecoderEngine, numbers: Sequence[int], *, seed: int, long_term_tokens: int) -> None:
        """``long_term_tokens`` 0: rows that leave the STM are gone. All streams start without rows.

        Raises:
            ConfigError: no streams; or a variant, pool or setting that only ``Memory`` follows (``check_semantics``).
        """
        config = engine.config
        if not numbers:
            raise ConfigError("a StreamBatch must have at least one stream, got none")
        if config.variant != "paper":
            raise ConfigError(f"training follows variant 'paper', got {config.variant!r}: wrap with variant='paper'")
        check_semantics(config, long_term=long_term_tokens > 0)
        if engine.mechanism.additions.pool is not None:
            raise ConfigError("training starts from empty memories, but this decoder came with a pool of rows")
        self.engine = engine
        self.numbers = tuple(numbers)
        self.long_term_tokens = long_term_tokens
        self.generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        self.choices = [torch.Generator().manual_seed(seed + number + CHOICES) for number in numbers]
        self.reset()

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def rows(self) -> int:
        """Short-term rows of each layer and stream, n."""
        return self.stm[0].shape[1]

    def reset(self) -> None:
        """Forget all rows; the generators go on from where they are."""
        layout, batch = self.engine.layout, len(self)
        layers = range(layout.layers)
        self.clock = 0
        self.stm = [torch.zeros(batch, 0, layout.hidden_size, dtype=layout.dtype, device=layout.device) for _ in layers]
        self.stm_source = [torch.zeros(batch, 0, dtype=torch.int64, device=layout.device) for _ in layers]
        self.stm_birth = list(self.stm_source)
        self.ltm = [LongTermRows(batch, layout, self.long_term_tokens) for _ in layers]

    def detach(self) -> None:
        """Cut short-term rows off from the writes that made them."""
        self.stm = [rows.detach() for rows in self.stm]

    def encode(self, ids: Tensor) -> list[Tensor]:
        """Run the write pass over one chunk ``[B, n]`` of each stream, and change nothing.

        Returns:
            Per layer ``[B, k, d]``, the new rows; with their graph where gradients are enabled.

        Raises:
            InputError: wrong batch size or chunk length.
        """
        config = self.engine.config
        if ids.ndim != 2 or ids.shape[0] != len(self) or not 1 <= ids.shape[1] <= config.chunk_tokens:
            raise InputError(
                f"chunks must be [{len(self)}, 1 to chunk_tokens ({config.chunk_tokens})], got {list(ids.shape)}"
            )
        k = config.memory_tokens_per_chunk
        present = min(k, self.rows)
        context = tuple(rows[:, rows.shape[1] - present :] for rows in self.stm)
        hybrid = self.engine.retrofit.anatomy.hybrid
        reencoded = 0 if hybrid else min(max(k - ids.shape[1], 0), present)
        plan = WritePlan(True, context, reencoded, min(k, ids.shape[1] + reencoded))
        run = WritePass(plan, self.engine.mechanism.additions).run
        return list(run(self.engine.decoder, ids.to(self.engine.device)))

    def absorb(self, block: Sequence[Tensor], source: Tensor) -> None:
        """Take new rows, per layer ``[B, k, d]``, written from ``source`` ``[B]``; a random few leave the full STM."""
        k, config = block[0].shape[1], self.engine.config
        excess = max(self.rows + k - config.short_term_tokens, 0)
        birth = torch.arange(self.clock, self.clock + k, device=block[0].device).expand(len(self), -1)
        source = source.to(block[0].device)[:, None].expand(-1, k)
        orders = self._orders(excess)
        for layer, new in enumerate(block):
            columns = (self.stm[layer], self.stm_source[layer], self.stm_birth[layer])
            if excess:
                order = orders[layer].to(new.device)
                leave = order[:, self.rows - excess :].sort(1).values if self.long_term_tokens else None
                if leave is not None:
                    self.ltm[layer].append(*(_take(column.detach(), leave) for column in columns))
                stay = order[:, : columns[0].shape[1] - excess].sort(1).values
                columns = tuple(_take(column, stay) for column in columns)  # type: ignore[assignment]
            hidden, sources, births = columns
            self.stm[layer] = torch.cat([hidden, new.to(hidden.dtype)], 1)
            self.stm_source[layer] = torch.cat([sources, source], 1)
            self.stm_birth[layer] = torch.cat([births, birth], 1)
        self.clock += k

    def write(self, ids: Tensor, source: Tensor) -> None:
        """Encode one chunk ``[B, n]`` from ``source`` ``[B]`` and absorb it."""
        self.absorb(self.encode(ids), source)

    def _orders(self, excess: int) -> list[Tensor]:
        """Per layer ``[B, n]``, a random permutation for each stream, drawn as ``Memory`` draws them."""
        if not excess:
            return []
        layers = len(self.stm)
        if self.engine.config.drop_per_layer:
            drawn = [[torch.randperm(self.rows, generator=g) for _ in range(layers)] for g in self.generators]
        else:
            drawn = [[torch.randperm(self.rows, generator=g)] * layers for g in self.generators]
        return [torch.stack([stream[layer] for stream in drawn]) for layer in range(layers)]

    def state_dict(self) -> dict[str, Any]:
        """Everything a stream remembers, as tensors and plain data. Gradients are not kept."""
        return {
            "clock": self.clock,
            "stm": [rows.detach() for rows in self.stm],
            "stm_source": list(self.stm_source),
            "stm_birth": list(self.stm_birth),
            "ltm": [rows.state_dict() for rows in self.ltm],
            "generators": [generator.get_state() for generator in self.generators],
            "choices": [generator.get_state() for generator in self.choices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ConfigError when it has another number of streams or layers."""
        given = (len(state["generators"]), len(state["stm"]))
        if given != (len(self), len(self.stm)):
            raise ConfigError(
                f"the saved streams must be {len(self)} with {len(self.stm)} layers, got {given[0]} with {given[1]}"
            )
        device = self.engine.device
        self.clock = state["clock"]
        for name in ("stm", "stm_source", "stm_birth"):
            setattr(self, name, [column.to(device) for column in state[name]])
        for rows, saved in zip(self.ltm, state["ltm"], strict=True):
            rows.load_state_dict(saved)
        for name in ("generators", "choices"):
            for generator, saved in zip(getattr(self, name), state[name], strict=True):
                generator.set_state(saved.cpu())


def _take(column: Tensor, index: Tensor) -> Tensor:
    """``column[b, index[b]]`` for every stream b."""
    return column.gather(1, index if column.ndim == 2 else index[..., None].expand(-1, -1, column.shape[2]))
