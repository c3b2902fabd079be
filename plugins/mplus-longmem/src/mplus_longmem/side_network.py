"""The side network: copies of some of the decoder's layers, which go over its hidden states once more, with memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import define
from torch import Tensor, nn

from mplus.backends import AttentionRequest, AttentionResult
from mplus.errors import ConfigError, MemoryMismatchError
from mplus.mechanisms import CopiedLayer, DecoderShape, PassResult, TokenTensors
from mplus.mechanisms.decoder import Attend, Compute
from mplus_longmem.bank import Bank, ChunkRead, ChunkSearch, gated

SAME_DECODER = 0.5
"""Least mean cosine of two marks of one decoder: it may be in another dtype, or have been trained in between."""


@define(frozen=True)
class Plan:
    """Which layer of the decoder goes with which side layer.

    Attributes:
        cuts: side layer i stands beside the decoder's layers ``cuts[i] .. cuts[i + 1] - 1``.
        bank_layer: the decoder's layer whose keys and values are kept, r.
        reader: the side layer that reads them.
        reduction: decoder layers to a side layer, f.
    """

    cuts: tuple[int, ...]
    bank_layer: int
    reader: int
    reduction: int

    @staticmethod
    def of(depth: int, reduction: int, bank_layer: int | None) -> Plan:
        """Return the plan for a decoder of ``depth`` layers.

        Side layer r // f reads, as published. Where f does not divide the depth, the last side layer takes the rest,
        and reads where r // f would be behind it.

        Raises:
            ConfigError: there are fewer layers than a side layer stands for, or no layer r.
        """
        if reduction > depth:
            raise ConfigError(
                f"reduction must be at most {depth}, the layers of the decoder, got {reduction}: there would be no "
                "side layer"
            )
        chosen = max(3 * depth // 4 - 1, 0) if bank_layer is None else bank_layer
        if chosen >= depth:
            raise ConfigError(f"layer must be below {depth}, the layers of the decoder, got {chosen}")
        count = depth // reduction
        cuts = (*range(0, count * reduction, reduction), depth)
        return Plan(cuts, chosen, min(chosen // reduction, count - 1), reduction)

    @property
    def copied(self) -> tuple[int, ...]:
        """The decoder layer that each side layer is a copy of: f i + 1, and i itself where f is 1."""
        return tuple(first + min(1, self.reduction - 1) for first in self.cuts[:-1])


class SideNetwork(nn.Module):
    """What LongMem trains: its layers, its final norm and the gate of each head; they start as copies and at 0.

    ``s_0 = h[0]; s_{i+1} = layer_i(s_i) + h[cuts[i+1]] - h[cuts[i]]`` (paper section 2.3), with h the hidden states of
    the decoder, which gets no gradient.

    Args:
        shape: of the decoder.
        plan: which layers are copied.
        search: of the reading layer.
        normed_last: the last h is taken behind the decoder's final norm, as in the published code.

    Attributes:
        decoder_mark: ``[L, d]``, from which a decoder is known: what each of its layers receives for the token that
            begins a text; zeros: it is trained from nothing.
    """

    decoder_mark: Tensor

    def __init__(self, shape: DecoderShape, plan: Plan, search: ChunkSearch, normed_last: bool) -> None:
        super().__init__()
        assert shape.copies is not None  # noqa: S101 - of a real decoder
        self.plan, self.normed_last = plan, normed_last
        self.layers = nn.ModuleList(shape.copies.layer(index) for index in plan.copied)
        self.final_norm = shape.copies.final_norm()
        self.memory_bias = nn.Parameter(torch.zeros(search.heads.count))
        self.search = search
        mark = shape.begin_inputs[:, 0].clone()
        self.register_buffer("decoder_mark", mark)
        self._built_for = mark.float().cpu()

    def check_decoder(self) -> None:
        """Raise MemoryMismatchError where parameters were loaded that were trained beside another decoder."""
        saved = self.decoder_mark.float().cpu()
        alike = torch.cosine_similarity(saved, self._built_for, dim=-1).mean()
        if bool(saved.any()) and float(alike) < SAME_DECODER:
            raise MemoryMismatchError(
                "this side network was trained beside another decoder: its first layers would be given states that it "
                "has never seen. Load it with the decoder that it was saved with"
            )

    def forward(self, result: PassResult, banks: Sequence[Bank], cache: TokenTensors | None) -> Tensor:
        """Return the final hidden state ``[B, T, d]``, in the dtype of the decoder's.

        Args:
            result: of the decoder's pass, with hidden states and calls.
            banks: one per batch row.
            cache: keys and values of the side layers so far.
        """
        states = [state.detach() for state in result.hidden_states]
        if self.normed_last:
            states[-1] = result.need_hidden().detach()
        hidden = states[0]
        for number, layer in enumerate(self.layers):
            before, behind = self.plan.cuts[number : number + 2]
            copied = cast("CopiedLayer", layer)
            reading = (
                _Reading(self, copied, banks)
                if number == self.plan.reader and any(bank.readable for bank in banks)
                else None
            )
            made = copied(hidden, result.calls[copied.index], cache=cache, attending=reading)
            hidden = made + states[behind] - states[before]
        normed: Tensor = self.final_norm(hidden)
        return normed.to(states[0])


@define(frozen=True, eq=False)
class _Reading:
    """The attention of the reading layer: to the text, and to what each query finds in its bank, under the gate."""

    network: SideNetwork
    layer: CopiedLayer
    banks: Sequence[Bank]

    def __call__(self, hidden: Tensor) -> Attend:
        def attend(request: AttentionRequest, compute: Compute) -> AttentionResult:
            text = compute(request)
            queries = self.layer.unrotated(request.queries, hidden)
            reads: list[ChunkRead | None] = [
                self.network.search(own, bank, request.scale) if bank.readable else None
                for own, bank in zip(queries, self.banks, strict=True)
            ]
            return AttentionResult(gated(text.output, reads, self.network.memory_bias), text.weights)

        return attend
