"""Give a decoder memories of text, in place, and take them off again; no layer of it is touched."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mplus.config import MPlusConfig, options_of
from mplus.errors import ConfigError
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.model.installed import Installed, WrappedModel
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading import generation_config
from mplus.hf.retrofit.context import change_class
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.model_class import text_model_class
from mplus.mechanisms.text.mechanism import TextMechanism


def wrap_for_text(decoder: PreTrainedModel, config: MPlusConfig, cls: type[TextMechanism], pool: Tensor | None) -> None:
    """Let a decoder make and read memories of text.

    Args:
        decoder: any that generates.
        config: names the mechanism.
        cls: its class.
        pool: refused.

    Raises:
        ConfigError: a field of the config, an option, or ``pool`` means nothing to the mechanism.
    """
    if pool is not None:
        raise ConfigError(f"pool means nothing to the mechanism {cls.name!r}, whose memories begin empty: leave it out")
    positions = known_positions(decoder.config.get_text_config(decoder=True))
    settled = cls.settle(config, None if positions is None else max(positions // 2, 2))
    options = options_of(cls, {**cls.Options.defaults(config.variant), **config.mechanism.options})
    engine = TextEngine(decoder, settled, cls(settled, options))
    attention: Any = decoder.config._attn_implementation
    installed = Installed(attention or "eager", digest(decoder, "base"), [], [], [], config)
    change_class(decoder, text_model_class(type(decoder)))
    decoder.__dict__["mplus_engine"] = engine
    decoder.__dict__["mplus_installed"] = installed


def unwrap_for_text(decoder: WrappedModel) -> None:
    """Undo ``wrap_for_text``."""
    generation_config.drop_memory(decoder)
    for name in ("mplus_engine", "mplus_installed"):
        del decoder.__dict__[name]
    change_class(decoder, type(decoder).__mplus_base__)
