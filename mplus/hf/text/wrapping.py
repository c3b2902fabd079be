"""Give a decoder memories of text, in place, and take them off again; no layer of it is touched."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mplus.config import MPlusConfig, options_of
from mplus.errors import ConfigError
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.model.installed import Installed
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.model.rounding import token_errors
from mplus.hf.model.self_check import Check, check_ids
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.inputs import signature_of
from mplus.hf.retrofit.context import change_class
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.model_class import text_model_class
from mplus.mechanisms.text.mechanism import TextMechanism

PADDING = 3
"""Tokens of padding that show whether a decoder sees them."""
SEEN = 0.1
"""Error of a token, relative to the standard deviation of the logits, from which padding counts as seen: what rounding
to bfloat16 does is a tenth of it, what seen padding does is several times as much."""


def wrap_for_text(
    decoder: PreTrainedModel, config: MPlusConfig, cls: type[TextMechanism], check: bool, pool: Tensor | None
) -> None:
    """Let a decoder make and read memories of text.

    Args:
        decoder: any that generates.
        config: names the mechanism.
        cls: its class.
        check: find out whether the decoder sees padding; else it is taken on trust that it does not.
        pool: refused.

    Raises:
        ConfigError: a field of the config, an option, or ``pool`` means nothing to the mechanism.
    """
    if pool is not None:
        raise ConfigError(f"pool means nothing to the mechanism {cls.name!r}, whose memories begin empty: leave it out")
    positions = known_positions(decoder.config.get_text_config(decoder=True))
    settled = cls.settle(config, None if positions is None else max(positions // 2, 2))
    options = options_of(cls, {**cls.Options.defaults(config.variant), **config.mechanism.options})
    padding = [_check_padding(decoder)] if check else []
    engine = TextEngine(decoder, settled, cls(settled, options), sees_padding=not all(one.passed for one in padding))
    installed = Installed(
        decoder.config._attn_implementation or "eager", digest(decoder, "base"), [], padding, [], config
    )
    change_class(decoder, text_model_class(type(decoder)))
    decoder.__dict__["mplus_engine"] = engine
    decoder.__dict__["mplus_installed"] = installed


@torch.no_grad()
def _check_padding(decoder: PreTrainedModel) -> Check:
    """Compare a text with the same one behind padding that a mask hides; recurrent decoders may see it."""
    vocabulary = decoder.get_input_embeddings().weight
    ids = check_ids(len(cast("Tensor", vocabulary)), input_device(decoder))
    padded = torch.nn.functional.pad(ids, (PADDING, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (PADDING, 0), value=0)
    inputs: dict[str, Tensor] = {"input_ids": padded, "attention_mask": mask}
    if "position_ids" in signature_of(type(decoder).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with in_eval_mode(decoder):
        found, alone = decoder(**inputs).logits[:, PADDING:], decoder(input_ids=ids).logits
    error = float(token_errors([found], [alone]).max())
    return Check("left-padded row = row alone", error, error < SEEN)
