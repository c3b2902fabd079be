"""Build the mechanism that a config names, with its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mplus.config import JsonValue, MPlusConfig, options_of
from mplus.errors import ConfigError, MechanismError
from mplus.eviction import EVICTION
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import DecoderShape
from mplus.stores import STORES


def build_mechanism(config: MPlusConfig, shape: DecoderShape, pool: Tensor | None = None) -> MemoryMechanism:
    """Build the mechanism of ``config`` for a decoder, with new parameters in the decoder's dtype, on its device.

    Args:
        config: of the memory.
        shape: of the decoder.
        pool: ``[L, N, d]``, rows that every new memory starts from; None: there are none.

    Raises:
        UnknownNameError, PluginError, MissingDependencyError: the registry has no such implementation.
        ConfigError: an option of an implementation breaks its rule, the mechanism takes no ``pool`` or ``min_score``,
            or its memories are made of text.
        MechanismError: what the mechanism built is no module.
    """
    cls = memory_mechanism(config.mechanism.name)
    if config.min_score is not None and not cls.takes_min_score:
        raise ConfigError(
            f"min_score does not go with the mechanism {cls.name!r}, which has no threshold, got {config.min_score!r}: "
            "leave it out"
        )
    defaults: Mapping[str, JsonValue] = cls.Options.defaults(config.variant)
    options = options_of(cls, {**defaults, **config.mechanism.options})
    STORES.get(config.store.name)
    EVICTION.get(config.eviction.name)
    additions = cls.build(shape, config, options)
    if not isinstance(additions, nn.Module):
        raise MechanismError(
            f"the mechanism {cls.name!r}: build must return a torch.nn.Module, got {type(additions).__name__}"
        )
    mechanism = cls(config, additions.to(shape.begin), options)
    if pool is not None:
        mechanism.start_from(pool)
    return mechanism


def memory_mechanism(name: str) -> type[MemoryMechanism]:
    """Return the mechanism of memories of rows that has this name.

    Raises:
        ConfigError: it is one of memories of text.
        UnknownNameError, DuplicateNameError, PluginError, MissingDependencyError: as ``Registry.get``.
    """
    found = MECHANISMS.get(name)
    if not issubclass(found, MemoryMechanism):
        raise ConfigError(
            f"mechanism must be one whose memories are made of rows here, got {name!r}, whose memories are made of "
            "text: nothing of it is trained, and it is measured with memory.write and generate(..., memory=memory)"
        )
    return found
