"""Names and shapes of the tensors in a published checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import define

from mplus.interop.published_config import PublishedConfig

ADAPTERS = {"default": "write", "decoder_adapter": "read"}
"""Published name of a LoRA adapter -> ours."""
LTM = ("ltm", "ltm_keys", "ltm_ages", "ltm_recall_frequencies")
UNUSED = (".self_attn.encoder_query_proj.", ".rotary_emb.inv_freq")
"""Parts of names of tensors that take no part in writing or reading: a training head, and frequencies that the
configuration gives as well."""

Shape = tuple[int | None, ...]
"""None: any size."""


@define(frozen=True)
class Place:
    """Where a published tensor belongs.

    Attributes:
        shape: what it must measure.
        ours: name in the decoder (``base``) or in the wrapped decoder; "" for what belongs to the memory.
        base: whether it is a weight of the decoder itself.
    """

    shape: Shape
    ours: str = ""
    base: bool = False


def places(config: PublishedConfig, decoder: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return every tensor a checkpoint of this configuration must have, by published name.

    Args:
        config: the checkpoint's configuration.
        decoder: name -> shape of the decoder's own weights.
    """
    found: dict[str, Place] = {}
    for name, shape in decoder.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or module.rpartition(".")[2] not in (config.adapters.target_modules or ()):
            found[name] = Place(shape, name, base=True)
            continue
        found[f"{module}.base_layer.weight"] = Place(shape, name, base=True)
        for theirs, ours in ADAPTERS.items():
            if ours == "write" or not config.adapters.shared:
                rank = config.adapters.rank
                found[f"{module}.lora_A.{theirs}.weight"] = Place((rank, shape[1]), f"{module}.lora_A.{ours}.weight")
                found[f"{module}.lora_B.{theirs}.weight"] = Place((shape[0], rank), f"{module}.lora_B.{ours}.weight")
    d = config.hidden_size
    found["bos_embedding"] = Place((config.layers, 1, d), "mplus.begin")
    found["new_memory_positional_emb"] = Place((1, 1, d), "mplus.mark")
    found["memory"] = Place((config.layers, config.pool, d))
    if config.kind == "memoryllm":
        return {**found, "initialized": Place(())}
    return {**found, **_retriever(config), **_long_term(config)}


def unused(names: Iterable[str], decoder: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names that a loader may leave out: see ``UNUSED``, and an output matrix tied to the embedding."""
    return [
        name
        for name in names
        if any(part in name for part in UNUSED) or (name == "lm_head.weight" and name not in decoder)
    ]


def _retriever(config: PublishedConfig) -> dict[str, Place]:
    d, r = config.hidden_size, config.selector_width
    weights: dict[str, Shape] = (
        {"weight": (r, d)} if config.selector_layers == 1 else {"0.weight": (2 * r, d), "2.weight": (r, 2 * r)}
    )
    return {
        f"model.layers.{layer}.self_attn.{projector}.{weight}": Place(
            shape, f"mplus.retriever.{projector}.{layer}.{weight}"
        )
        for layer in range(config.layers)
        for projector in ("query_proj", "key_proj")
        for weight, shape in weights.items()
    }


def _long_term(config: PublishedConfig) -> dict[str, Place]:
    rows = config.ltm_initial_size
    widths: dict[str, Shape] = {
        "ltm": (config.hidden_size,),
        "ltm_keys": (config.selector_width,),
        "ltm_ages": (),
        "ltm_recall_frequencies": (),
    }
    return {f"{name}.{layer}": Place((rows, *widths[name])) for layer in range(config.layers) for name in LTM}
