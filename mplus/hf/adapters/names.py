"""Names of what mplus adds to a decoder."""

from __future__ import annotations

ADAPTERS = ("write", "read")
"""The LoRA adapters."""


def plain_name(name: str) -> str:
    """The name that a tensor has where no adapter of the user's, put there by PEFT, is around its module."""
    return name.replace(".base_layer.", ".")


def is_addition(name: str) -> bool:
    """Whether mplus added the tensor of this name to a decoder."""
    return name.startswith("mplus.") or is_adapter(name)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to one of our LoRA adapters."""
    return any(f".lora_{part}.{adapter}." in name for part in "AB" for adapter in ADAPTERS)
