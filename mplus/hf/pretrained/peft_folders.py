"""Folders that hold a user's adapters, as PEFT saves them, and below them what mplus added."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mplus.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

MEMORY = "mplus"
"""Below PEFT's folder: the folder of what mplus added, the same as that of a decoder without adapters."""
DESCRIPTION = "adapters.json"
"""In that folder: the facts about adapters that PEFT does not save."""
WEIGHTS = "adapter_model.safetensors"
INJECTED = "adapters"
"""In that folder: a folder for each adapter that is in the decoder without a PeftModel around it."""
CARD = """
## Memory

This folder also holds what mplus added to the decoder, in `mplus/`. With adapters and memory:

```python
import mplus

model = mplus.from_pretrained("path/or/repository")
```
"""


def memory_folder(folder: Path) -> Path:
    """Return the folder of what mplus added: below a user's adapters, or ``folder`` itself."""
    return folder / MEMORY if (folder / MEMORY / "config.json").is_file() else folder


def adapter_folder(folder: Path, name: str) -> Path:
    """Return the folder in which PEFT saves the adapter ``name``."""
    return folder if name == "default" else folder / name


def describe_adapters(model: nn.Module, names: list[str], active: list[str], folder: Path) -> None:
    """Write the facts about adapters that PEFT does not save: their names, which act, and scales that were changed."""
    chosen = [name for name in active if name in names]
    described = {"adapters": names, "active": chosen, "scaling": _changed_scales(model, names)}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def save_injected(decoder: PreTrainedModel, folder: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Save the adapters that ``add_adapter`` of transformers put into a decoder, if any; the files to be uploaded."""
    from peft import get_peft_model_state_dict

    if not decoder._hf_peft_config_loaded:
        return []
    for name, config in decoder.peft_config.items():
        own = get_peft_model_state_dict(decoder, state_dict=dict(state), adapter_name=name)
        config.save_pretrained(folder / INJECTED / name)
        named = {f"base_model.model.{key}": tensor.detach().contiguous() for key, tensor in own.items()}
        save_file(named, folder / INJECTED / name / WEIGHTS, metadata={"format": "pt"})
    describe_adapters(decoder, list(decoder.peft_config), decoder.active_adapters(), folder)
    return [DESCRIPTION, f"{INJECTED}/*"]


def load_injected(decoder: PreTrainedModel | PeftModel, folder: Path, trainable: bool) -> None:
    """Put the adapters that ``save_injected`` left in ``folder``, if any, into a decoder.

    Raises:
        CheckpointError: as ``with_adapters``.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    if not (folder / INJECTED).is_dir() or not isinstance(decoder, PreTrainedModel) or hasattr(decoder, "peft_config"):
        return
    names, active, scaling = _read(folder / DESCRIPTION, folder / INJECTED, injected=True)
    for name in names:  # load_adapter of transformers draws the adapters anew that are there already
        decoder.add_adapter(PeftConfig.from_pretrained(str(folder / INJECTED / name)), name)
        tensors = load_file(folder / INJECTED / name / WEIGHTS)
        own = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        set_peft_model_state_dict(decoder, own, adapter_name=name)
    decoder.set_adapter(active)
    if not trainable:
        decoder.requires_grad_(False)
    _set_scales(decoder, scaling)


def add_to_card(folder: Path) -> None:
    """Say in PEFT's model card that there is a memory, once."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    if CARD.strip() not in text:
        card.write_text(text.rstrip("\n") + "\n" + CARD, encoding="utf-8")


def with_adapters(decoder: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """Put a PeftModel around ``decoder`` with the adapters in ``folder``, those active that were.

    Raises:
        CheckpointError: ``adapters.json`` cannot be read, or adapters that it names are missing.
    """
    from peft import PeftModel

    names, active, scaling = _read(folder / MEMORY / DESCRIPTION, folder)
    first, *others = names
    options: dict[str, Any] = {
        name: {"is_trainable": trainable, **_dtype(adapter_folder(folder, name))} for name in names
    }
    model = PeftModel.from_pretrained(decoder, adapter_folder(folder, first), adapter_name=first, **options[first])
    for name in others:
        model.load_adapter(adapter_folder(folder, name), name, **options[name])
    if not model.active_peft_config.is_prompt_learning:
        cast("BaseTuner", model.base_model).set_adapter(active, inference_mode=not trainable)
    if len(active) == 1:
        model.active_adapter = active[0]
    _set_scales(model, scaling)
    return model


def _set_scales(model: nn.Module, scaling: Mapping[str, Mapping[str, float]]) -> None:
    for path, scales in scaling.items():
        cast("LoraLayer", model.get_submodule(path)).scaling.update(scales)


def _read(
    where: Path, folder: Path, injected: bool = False
) -> tuple[list[str], list[str], dict[str, dict[str, float]]]:
    """Read from ``where`` the names of the adapters in ``folder``, those that act, and their changed scales."""
    try:
        described = json.loads(where.read_text(encoding="utf-8"))
        names, active, scaling = (described[key] for key in ("adapters", "active", "scaling"))
        folders = {name: folder / name if injected else adapter_folder(folder, name) for name in names}
        missing = [name for name in names if not (folders[name] / "adapter_config.json").is_file()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where} must name the adapters in {folder}: {type(error).__name__} {error}") from error
    if missing or not names or not set(active) <= set(names):
        raise CheckpointError(f"{folder} must hold the adapters {names}, of which {active} act; missing {missing}")
    return names, active, scaling


def _dtype(folder: Path) -> dict[str, bool]:
    """Return the argument of PEFT that brings an adapter back in its dtype.

    PEFT makes new adapters float32, also in a decoder of 16 bits.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        return {}
    with safe_open(weights, "pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return {"autocast_adapter_dtype": not dtypes <= {"BF16", "F16"}}


def _changed_scales(model: nn.Module, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the scales of LoRA that are not those of the configurations, by layer and adapter."""
    from peft.tuners.lora import LoraLayer

    changed: dict[str, dict[str, float]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for name in [name for name in names if name in layer.scaling]:
                rank = math.sqrt(layer.r[name]) if layer.use_rslora.get(name) else layer.r[name]
                if layer.scaling[name] != layer.lora_alpha[name] / rank:
                    changed.setdefault(path, {})[name] = float(layer.scaling[name])
    return changed
