"""What ``wrap`` puts on a decoder: its record (``Installed``), and the type of a decoder that has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeGuard

from attrs import define, field
from torch import nn
from torch.utils.hooks import RemovableHandle

from mplus.config import MPlusConfig
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.self_check import Check

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationMixin, PreTrainedModel

    class Decoder(PreTrainedModel, GenerationMixin):
        """A causal language model of transformers."""

else:
    Decoder = object  # the class of the wrapped decoder brings its own


@define(eq=False)
class Installed:
    """The record of one ``wrap``, which ``unwrap`` needs; kept as ``model.mplus_installed``.

    Attributes:
        base_attention: the attention implementation the decoder had.
        base_digest: digest of its own weights.
        hooks: handles of the attention hooks.
        checks: what the self-check found for the technique in use.
        rejected: reasons against the techniques tried before it.
        asked: the config that ``wrap`` was given, with sizes left open.
    """

    base_attention: str
    base_digest: str
    hooks: list[RemovableHandle]
    checks: list[Check]
    rejected: list[str]
    asked: MPlusConfig = field(factory=MPlusConfig)


class WrappedModel(Decoder):
    """A decoder of transformers with the attributes that ``wrap`` puts on it.

    Attributes:
        mplus: the mechanism's own parameters: of M+ begin rows, mark, retriever and pool.
        mplus_engine: what memories and reads work with.
        mplus_installed: the record of the ``wrap``.
    """

    __mplus_base__: ClassVar[type[Decoder]]
    """The class it had before."""

    mplus: nn.Module
    mplus_engine: DecoderEngine
    mplus_installed: Installed

    @property
    def mplus_config(self) -> MPlusConfig:
        """The memory configuration this decoder was wrapped with."""
        return self.mplus_engine.config


def is_peft_model(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether ``model`` is a ``PeftModel``, without importing peft."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def decoder_inside(model: nn.Module) -> nn.Module:
    """Return the decoder that a ``PeftModel`` is around; any other model is its own."""
    return model.get_base_model() if is_peft_model(model) else model
