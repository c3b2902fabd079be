"""TrainedDecoder: a wrapped decoder as objectives see it, and the streams it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import attrs
from torch import Tensor

from mplus.config import MPlusConfig
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.installed import WrappedModel
from mplus.hf.retrofit.projection import Projection
from mplus.mechanisms.separate_streams import SeparateStreams
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.mechanisms.streams import Read, TrainingStreams


class TrainedDecoder:
    """A wrapped decoder, seen from streams.

    Attributes:
        model: the wrapped decoder.
        engine: its engine.
    """

    def __init__(self, model: WrappedModel) -> None:
        self.model = model
        self.engine: DecoderEngine = model.mplus_engine

    def read(self, streams: TrainingStreams, texts: Tensor, **options: Any) -> Read:
        """Read texts ``[B, R, T]`` of each stream; ``options`` are those of ``streams.read``."""
        return streams.read(texts, **options)

    def plain(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits ``[B, S, V]`` of the decoder alone, without memory and adapters.

        Args:
            ids: ``[B, S]`` int64.
            mask: ``[B, S]`` bool, False at padding, which may be on either side; None: there is none.
        """
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if mask is not None and not bool(mask.all()):
            inputs.update(attention_mask=mask.long(), **self.engine.padded_positions(mask))
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


def set_sizes(engine: DecoderEngine, config: MPlusConfig, sizes: Mapping[str, int]) -> None:
    """Give the memories that a decoder makes from now on the sizes of ``config``, with those of ``sizes`` instead.

    Args:
        engine: of the decoder, which was wrapped with all else that is in ``config``.
        config: its own configuration.
        sizes: fields that no parameter depends on (``mplus.training.recipe.recipe.SIZES``), with their values.
    """
    changed: MPlusConfig = attrs.evolve(config, **cast("dict[str, Any]", dict(sizes)))
    engine.config = engine.mechanism.config = changed


def make_streams(
    engine: DecoderEngine, numbers: Sequence[int], *, seed: int, long_term: bool = True
) -> TrainingStreams:
    """Return memories of many streams under the rules of the decoder's mechanism.

    Rows are kept as hidden states where the mechanism can do that, so that reads project them with gradients.

    Args:
        engine: of the wrapped decoder.
        numbers: global number of each stream; seeds its draws.
        seed: of all draws.
        long_term: whether rows that leave short-term memory are kept, where a mechanism has one.
    """
    mechanism, projection = engine.mechanism, engine.projection
    layout = engine.layout_of("hidden" if "hidden" in mechanism.keeps else engine.memory_rows)
    found = mechanism.streams(engine.decoder, layout, numbers, seed=seed, long_term=long_term)
    if found is not None:
        return found
    kept = projection if isinstance(projection, Projection) and layout.projected_size else None
    whole = long_term or not isinstance(mechanism, RowMechanism)
    capacity = engine.config.long_term_tokens if whole else 0
    return SeparateStreams(mechanism, engine.decoder, layout, numbers, seed=seed, capacity=capacity, projection=kept)


def make_batched_streams(
    engine: DecoderEngine, numbers: Sequence[int], *, seed: int, long_term_tokens: int
) -> BatchedStreams:
    """Return streams of M+ or MemoryLLM as one tensor per layer, with room for so many long-term rows.

    Raises:
        ConfigError: another mechanism, or a setting that these streams do not follow.
    """
    return BatchedStreams(
        engine.config,
        cast("RowMechanism", engine.mechanism).additions,
        engine.decoder,
        engine.layout_of("hidden"),
        numbers,
        seed=seed,
        long_term_tokens=long_term_tokens,
    )
