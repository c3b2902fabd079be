"""Arithmetic of MEMO (arXiv 2407.12117, sections 3 and 4): bytes of a layer, share of tokens swapped, bytes held."""

from __future__ import annotations

import math
from typing import Literal

from attrs import define

from mplus.config import is_number, must_be, one_of, whole
from mplus.errors import ConfigError

MODES = ("keep", "recompute", "swap", "memo")
AUTO: Literal["auto"] = "auto"
KEPT_LAYERS = 2
"""Layers whose activations stay on the device: the last ones, which backward needs first."""

is_mode = one_of(*MODES)
"""Validator of ``activations``."""
is_share = must_be("a number from 0 to 1, or 'auto'", lambda value: value in {None, AUTO} or is_number(value, 0, 1))
"""Validator of ``swapped_share``; None: it was not given."""
is_host_bytes = whole(1, optional=True)
"""Validator of ``host_bytes``."""


def check_settings(activations: str, swapped_share: float | str | None, host_bytes: int | None) -> None:
    """Raise ConfigError where a setting is given that ``activations`` has no use for."""
    if swapped_share is not None and activations != "memo":
        raise ConfigError(
            f"swapped_share must be left out where activations are not 'memo', got {swapped_share!r} and "
            f"{activations!r}"
        )
    if host_bytes is not None and activations not in {"swap", "memo"}:
        raise ConfigError(
            f"host_bytes must be left out where activations are neither 'swap' nor 'memo', got {host_bytes} and "
            f"{activations!r}"
        )


@define(frozen=True)
class LayerBytes:
    """Bytes that backward needs of one layer.

    Attributes:
        input: of the layer's input, swapped whole.
        attention: of what is swapped whole besides: attention's output, and what attention itself saves.
        others: of what is swapped for a share of the tokens, and recomputed for the rest.
    """

    input: int
    attention: int
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.input + self.attention + self.others


def gpt_layer_bytes(batch: int, tokens: int, hidden: int, item: int) -> dict[str, int]:
    """Return bytes by name of the forward outputs that backward needs of a GPT layer: ``16 batch tokens hidden``.

    Args:
        batch, tokens: sizes of the text.
        hidden: width of hidden states.
        item: bytes of one number.
    """
    one = batch * tokens * hidden * item
    names = ("input", "input_norm", "q", "k", "v", "attention", "residual", "post_norm")
    return {**dict.fromkeys(names, one), "up": 4 * one, "gelu": 4 * one}


def llama_layer_bytes(
    batch: int, tokens: int, hidden: int, heads: int, kv_heads: int, ffn: int, item: int
) -> dict[str, int]:
    """Return bytes by name of the forward outputs that backward needs of a Llama layer, by MEMO's rule.

    Args:
        batch, tokens: sizes of the text.
        hidden: width of hidden states.
        heads, kv_heads: of queries, and of keys and values.
        ffn: width of the gated MLP.
        item: bytes of one number.
    """
    one = batch * tokens * item
    found = dict.fromkeys(("input", "input_norm", "q"), one * hidden)
    found |= dict.fromkeys(("k", "v"), one * hidden * kv_heads // heads)
    found |= dict.fromkeys(("attention", "residual", "post_norm"), one * hidden)
    return found | dict.fromkeys(("gate", "up", "silu", "product"), one * ffn)


def swapped_share(sizes: LayerBytes, *, transferable: float = math.inf, host: float = math.inf) -> float | None:
    """Return the largest share of tokens, 0 to 1, whose other activations go to the host; None: not even input does.

    ``max alpha`` with ``input + attention + alpha others`` at most both limits (equations 1 and 2).

    Args:
        sizes: of one layer, or sums over several.
        transferable: bytes that can be copied while as many layers compute.
        host: bytes that they may take of the host's memory.
    """
    left = min(transferable, host) - sizes.input - sizes.attention
    if left < 0:
        return None
    return min(1.0, left / sizes.others) if sizes.others else 1.0


def swapped_tokens(share: float, tokens: int) -> int:
    """Return the number of a text's tokens that a share is: ``floor(share tokens)``, rounding errors aside."""
    # A share that was computed as tokens over tokens may lie just below the whole number that it stands for.
    return min(tokens, int(share * tokens + 1e-9))


def held_bytes(sizes: LayerBytes, *, mode: str, layers: int, tokens: int, share: float = 0.0) -> tuple[int, int]:
    """Return the bytes held between forward and backward by ``layers`` equal layers: on the device, on the host.

    Args:
        sizes: of one layer.
        mode: "keep", "recompute", "swap" or "memo".
        layers: of the decoder; of two modes the last ``KEPT_LAYERS`` keep everything on the device.
        tokens: of the text.
        share: of them that "memo" swaps.
    """
    if mode == "keep":
        return layers * sizes.total, 0
    if mode == "recompute":
        return layers * sizes.input, 0
    kept = min(KEPT_LAYERS, layers)
    swapped = swapped_tokens(1.0 if mode == "swap" else share, tokens)
    each = sizes.input + sizes.attention + sizes.others * swapped // tokens
    return kept * sizes.total, (layers - kept) * each


def recomputed_tokens(*, mode: str, layers: int, batch: int, tokens: int, share: float = 0.0) -> int:
    """Return the tokens that backward puts through a layer again, summed over layers; arguments as ``held_bytes``."""
    if mode == "recompute":
        return layers * batch * tokens
    if mode != "memo":
        return 0
    return max(layers - KEPT_LAYERS, 0) * batch * (tokens - swapped_tokens(share, tokens))
