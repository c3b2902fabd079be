"""How memory gets into a decoder's attention: projection of rows by the layer's own modules, and the attention hook."""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch
from attrs import define, evolve
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from mplus.backends.base import Segment
from mplus.backends.choose import BackendChooser
from mplus.errors import InputError, NotSupported
from mplus.hf.retrofit.attention import CAPTURE, AttendedMemory, CaptureCache, Captured, ModuleCall
from mplus.hf.retrofit.cache_view import MemoryCacheView, mask_with_memory
from mplus.hf.retrofit.context import Collection, Pass, current_pass
from mplus.hf.retrofit.discovery import Anatomy, AttentionSpec, Embeddings
from mplus.hf.retrofit.memory_cache import memory_in_cache
from mplus.hf.retrofit.observed import current_observer
from mplus.hf.retrofit.positions import MemoryPositions, rotary_at
from mplus.hf.types import Argument, Output
from mplus.mechanisms.decoder import Attended, Rows

Technique = Literal["attention", "cache_view"]
Change = AttendedMemory | MemoryCacheView | Tensor | None
"""A keyword argument of an attention module that is about memory."""


class _WithAlibi(Protocol):
    config: PreTrainedConfig

    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor: ...


@define(eq=False)
class Retrofit:
    """The choices made for one wrapped decoder.

    Attributes:
        anatomy: what the probe found.
        technique: "attention": a registered attention function sees memory as a segment; "cache_view": the cache
            shows it.
        positions: where memory rows sit.
        chooser: picks the attention backend (technique "attention" only).
    """

    anatomy: Anatomy
    technique: Technique
    positions: MemoryPositions
    chooser: BackendChooser

    def project(self, spec: AttentionSpec, prefix: Rows, text_offset: int | Tensor, call: ModuleCall) -> Segment:
        """Project memory rows to keys and values, by the layer's own norm and attention module up to where it attends.

        ``call`` is that of the attention that the memory is for.
        """
        hidden = prefix.hidden if spec.norm is None else spec.norm(prefix.hidden)
        # Each stream counts its own rows, so that its newest one is next to the text whatever filler lies behind.
        rows = hidden.shape[1] if prefix.lengths is None else prefix.lengths[:, None]
        place = prefix.before + torch.arange(hidden.shape[1], device=hidden.device)
        positions = prefix.positions
        if positions is None:
            positions = self.positions.of_rows(place, prefix.before + rows + prefix.behind, text_offset)
        rotary = self._rotary(spec, hidden, positions, text_offset, call)
        captured = self.capture(spec, hidden, positions, rotary, call)
        return Segment(captured.keys, captured.values, prefix.lengths)

    def capture(
        self,
        spec: AttentionSpec,
        hidden: Tensor,
        positions: Tensor,
        rotary: Embeddings | None,
        call: ModuleCall,
        *,
        at_cache: bool = False,
    ) -> Captured:
        """Run the attention module on ``hidden`` ``[B, P, d]`` up to where it attends, or only to its cache.

        ``positions`` are ``[B or 1, P]``, ``rotary`` the position embeddings for them; the rest is as in ``call``.
        """
        args, kwargs = call.args, {**call.kwargs, "attention_mask": None}
        if spec.rotary_keyword is not None:
            kwargs[spec.rotary_keyword] = rotary
        # Attention that rotates by itself goes by the positions it is given, not by embeddings.
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = positions
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = hidden
        else:
            args = (hidden, *args[1:])
        if self.technique == "attention" and not at_cache:
            kwargs[spec.cache_keyword], kwargs["mplus_memory"] = None, CAPTURE
        else:
            kwargs[spec.cache_keyword] = CaptureCache()
            if kwargs.get("alibi") is not None:
                kwargs["alibi"] = cast("Tensor", kwargs["alibi"])[..., :1]
        try:
            spec.attention.forward(*args, **kwargs)  # not __call__: the hook below is for text
        except Captured as captured:
            return captured.with_traceback(None)  # it would keep every tensor of these frames alive, in a cycle
        raise NotSupported(f"{type(spec.attention).__name__} did not reach its attention function")

    def _rotary(
        self, spec: AttentionSpec, hidden: Tensor, positions: Tensor, text_offset: int | Tensor, call: ModuleCall
    ) -> Embeddings | None:
        if not self.positions.offset or spec.rotary is None:
            return rotary_at(spec, hidden, positions)
        # Frequencies may depend on the largest position: ask for the text's last one too, and cut it off.
        last = positions.new_full((positions.shape[0], 1), call.hidden.shape[1] - 1) + text_offset
        whole = rotary_at(spec, hidden, torch.cat([positions, last], 1))
        return whole[:, :-1] if isinstance(whole, Tensor) else tuple(part[:, :-1] for part in whole or ())

    def alibi_with_memory(self, alibi: Tensor, memory: Segment) -> Tensor:
        """Extend ``[B*H, 1, S]`` ALiBi biases over ``[memory | text]``; slope times position, per head."""
        decoder = cast("_WithAlibi", self.anatomy.decoder)
        heads = decoder.config.num_attention_heads
        # Slopes are no attribute of the decoder: they are the difference of the biases of two neighbours.
        two = decoder.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64, device=alibi.device), heads, alibi.dtype)
        slopes = two[..., 1:2] - two[..., 0:1]  # [H, 1, 1]
        rows = memory.keys.shape[2]
        total = rows if memory.lengths is None else memory.lengths[:, None]
        place = self.positions.of_rows(torch.arange(rows, device=alibi.device), total).to(alibi.dtype)
        bias = slopes[None] * place[:, None, None, :]  # [B or 1, H, 1, P]
        front = bias.expand(alibi.shape[0] // heads, -1, -1, -1).flatten(0, 1)
        return torch.cat([front, alibi], -1)


class AttentionHook:
    """Forward pre-hook of one attention module: gives it the memory of the current pass, if there is one."""

    def __init__(self, retrofit: Retrofit, spec: AttentionSpec) -> None:
        self.retrofit = retrofit
        self.spec = spec

    def __call__(
        self, module: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> tuple[tuple[Argument, ...], dict[str, Argument | Change]] | None:
        active = current_pass()
        changed = None if active is None else self._observed(active, ModuleCall(args, kwargs))
        return None if changed is None else (args, {**kwargs, **changed})

    def _observed(self, active: Pass, call: ModuleCall) -> dict[str, Change] | None:
        # Where no attention function of ours is reached, no observer could stand in for attention either.
        observer = current_observer() if self.retrofit.technique == "attention" else None
        if observer is None:
            return self._with_memory(active, call)
        return observer.prefix(lambda: self._with_memory(active, call))

    @torch.compiler.disable  # projecting ends in an exception, which it cannot follow
    def _with_memory(self, active: Pass, call: ModuleCall) -> dict[str, Change] | None:
        """Return the keyword arguments that attention gets besides its own, or in their place; None: none."""
        spec, retrofit, kwargs = self.spec, self.retrofit, call.kwargs
        hidden = call.hidden
        placement = active.placement

        def project(rows: Rows) -> Segment:
            if rows.hidden.dim() != 3 or rows.hidden.shape[2] != hidden.shape[2] or not rows.hidden.shape[1]:
                raise InputError(
                    f"rows to be projected must be [B or 1, P, {hidden.shape[2]}], P at least 1, as the layer receives "
                    f"them, got {list(rows.hidden.shape)}"
                )
            if placement is not None and rows.positions is None:
                places = slice(rows.before, rows.before + rows.hidden.shape[1])
                positions = placement.insertion.positions[:, places]
                rows = evolve(rows, positions=positions.to(rows.hidden.device))
            return retrofit.project(spec, rows, active.text_offset, call)

        found = active.source.prefix(spec, hidden, project)
        attend = found.attend if isinstance(found, Attended) else None
        segments = found.segments if isinstance(found, Attended) else found or ()
        if not segments and attend is None:
            return None
        cache = cast("Cache | None", kwargs.get(spec.cache_keyword))
        if retrofit.technique == "attention":
            in_cache = cache is not None and segments
            joined = memory_in_cache(cache, spec.layer_index, segments, hidden.shape[0]) if in_cache else None
            memory = AttendedMemory(segments, retrofit.chooser, joined, attend, placement)
            return {"mplus_memory": memory}
        if attend is not None:
            raise NotSupported(
                f"{type(spec.attention).__name__} computes attention by itself, so a memory cannot compute it in its "
                "own way: use another decoder"
            )
        if placement is not None:
            raise NotSupported(
                f"{type(spec.attention).__name__} computes attention by itself, so memory can only stand in front of "
                "all of a text: use another decoder"
            )
        (segment,) = segments  # only projections of one piece are made for this technique
        queries = hidden.shape[1]
        keys = queries if cache is None else cache.get_mask_sizes(queries, spec.layer_index)[0]
        changed: dict[str, Change] = {
            spec.cache_keyword: MemoryCacheView(cache, segment),
            "attention_mask": mask_with_memory(
                cast("Tensor | None", kwargs.get("attention_mask")), segment, queries, keys, hidden
            ),
        }
        if kwargs.get("alibi") is not None:
            changed["alibi"] = retrofit.alibi_with_memory(cast("Tensor", kwargs["alibi"]), segment)
        return changed


def finish_pass(module: nn.Module, args: tuple[Tensor, ...], output: Output) -> Output | None:
    """Exchange the final hidden state ``[B, T, d]`` for that of the current pass: a hook of the layers' module."""
    active = current_pass()
    if active is None or active.finish is None:
        return None
    collection = Collection(frozenset()) if active.collection is None else active.collection
    hidden = active.finish(collection.result(output[0]))
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output
