"""What `wrap` proves of a decoder is proved once for equal decoders: that takes longer than all else of wrapping."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_passed: dict[Any, list[Any]] = {}


def proved_once(prove: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """``self_check`` that knows decoders again which have passed: equal weights, classes, settings and technique.

    What failed is proved again, and what is drawn at random meanwhile is not drawn from the generator of the tests.
    """

    def self_check(decoder: Any, *arguments: Any, **options: Any) -> list[Any]:
        key = _key(decoder, [*arguments, *options.values()])
        if key not in _passed:
            with torch.random.fork_rng(devices=[]):
                checks = prove(decoder, *arguments, **options)
            if not all(one.passed for one in checks):
                return checks
            _passed[key] = checks
        return list(_passed[key])

    return self_check


def patch(monkeypatch: Any) -> None:
    """Let `wrap` use it, if it has been imported."""
    wrapping = sys.modules.get("mplus.hf.model.wrapping")
    if wrapping is not None:
        monkeypatch.setattr(wrapping, "self_check", proved_once(wrapping.self_check))


def _key(decoder: Any, given: list[Any]) -> Any:
    engine = decoder.mplus_engine
    return (
        repr(engine.config),
        engine.retrofit.technique,
        repr(engine.retrofit.positions),
        tuple(_facts(decoder)),
        tuple(_bytes(one) if isinstance(one, torch.Tensor) else repr(one) for one in given),
        # What `wrap` has added is new, and drawn at random.
        tuple(_bytes(weight) for name, weight in decoder.named_parameters() if not _is_new(name)),
    )


def _is_new(name: str) -> bool:
    return name.startswith("mplus.") or ".lora_" in name


def _facts(decoder: Any) -> Iterator[Any]:
    """Names and classes of modules, how many hooks they have, and what kind of tensors."""
    for name, module in decoder.named_modules():
        yield name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield key, tensor.dtype, tuple(tensor.shape), tensor.device, tensor.requires_grad


def _bytes(tensor: torch.Tensor) -> Any:
    plain = tensor.detach()
    if plain.device.type != "cpu":
        return id(tensor)
    return hash(plain.contiguous().flatten().view(torch.uint8).numpy().tobytes())
