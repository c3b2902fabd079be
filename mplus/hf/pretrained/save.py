"""Save what mplus added to a decoder, and copy it back into a wrapped one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import save_file
from torch import Tensor, nn

from mplus.errors import CheckpointError, NotSupported
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.adapters.lora import is_addition, plain_name, refuse_conflicts
from mplus.hf.model.installed import WrappedModel, decoder_inside
from mplus.hf.model.modes import on_meta, present
from mplus.hf.pretrained.config import MPlusModelConfig
from mplus.hf.pretrained.hub import COMMIT, upload
from mplus.hf.pretrained.model_card import model_card
from mplus.hf.pretrained.peft_folders import save_injected
from mplus.hf.pretrained.unwrap_copy import plain_decoder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers.utils.hub import PushToHubMixin
else:
    PushToHubMixin = object  # the class that ``PushToHub`` is mixed into brings its own

WEIGHTS = "model.safetensors"
BASE = "base"
UNUSED = {"mplus.begin", "mplus.mark"}
"""What earlier versions saved for every mechanism, used or not."""
HOW_TO_LOAD = "mplus.from_pretrained(folder), or the Auto classes of transformers after `import mplus.hf`"
"""Said in config.json, since transformers knows the model type "mplus" only then."""


class Saving(Protocol):
    """A model whose ``save_pretrained`` can save the decoder along."""

    def save_pretrained(
        self, save_directory: str, *, save_base: bool, max_shard_size: int | str | None, tags: list[str] | None
    ) -> None:
        """Save into a folder."""


def save_pretrained(
    model: WrappedModel,
    directory: str | os.PathLike[str],
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
    push_to_hub: bool,
    save_base: bool,
    options: dict[str, Any],
) -> None:
    """Save the additions of ``model``, and with ``save_base`` the decoder; see ``MemoryModel.save_pretrained``.

    Args:
        options: keywords for saving the decoder and for the Hub; emptied of the latter.
    """
    if options.get("distributed_checkpoint"):
        raise NotSupported("distributed_checkpoint is not supported with memory: pass a gathered state_dict")
    refuse_conflicts(model)
    if save_base and state_dict is None and not hasattr(model, "hf_device_map") and on_meta(model):
        raise NotSupported(
            "transformers cannot save a decoder that accelerate has offloaded without a device map: bring it back with "
            "accelerate.hooks.remove_hook_from_submodules(model), or save without save_base"
        )
    hub = {name: options.pop(name) for name in ("repo_id", "private", *COMMIT) if name in options}
    tags = options.pop("tags", None)
    folder = Path(directory)
    if not save_base and (folder / BASE).is_dir():
        raise CheckpointError(
            f"{folder} must not hold a decoder of an earlier save, in {BASE}/, when saving without save_base: it would "
            "be loaded with these additions, so use save_base=True, remove it, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if save_base:
        decoder, tree = plain_decoder(model)
        plain = None if state_dict is None else tree.plain_state(state_dict)
        decoder.save_pretrained(folder / BASE, is_main_process=is_main_process, state_dict=plain, **options)
    elif not on_meta(model) and digest(model, "base") != model.mplus_installed.base_digest:
        warnings.warn(
            "the decoder's own weights have changed since mplus.wrap and are not saved with the additions: "
            "use save_pretrained(..., save_base=True)",
            stacklevel=3,
        )
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    additions = present(model, state, is_addition)
    additions = {plain_name(name): tensor.contiguous() for name, tensor in additions.items()}
    save_file(additions, folder / WEIGHTS, metadata={"format": "pt"})
    adapters = save_injected(model, folder, state)
    config = _model_config(model)
    config.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, config, save_base, tags), encoding="utf-8")
    if push_to_hub:
        patterns = [WEIGHTS, "config.json", "README.md", *adapters, *([f"{BASE}/*"] if save_base else [])]
        upload(folder, hub.pop("repo_id", folder.name), patterns=patterns, token=options.get("token"), **hub)


class PushToHub(PushToHubMixin):
    """Mixed into what has a ``save_pretrained`` with ``save_base``: its upload to the Hugging Face Hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_base: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Save as ``save_pretrained`` does and upload that, with its model card; arguments as in transformers.

        Example:
            ```python
            model.push_to_hub("user/decoder-with-memory", save_base=True, private=True)
            ```
        """
        saving: Saving = self
        with tempfile.TemporaryDirectory() as folder:
            saving.save_pretrained(folder, save_base=save_base, max_shard_size=max_shard_size, tags=tags)
            return upload(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                create_pr=create_pr,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
            )


def _model_config(model: WrappedModel) -> MPlusModelConfig:
    return MPlusModelConfig(
        mplus=model.mplus_config.to_dict(),
        base_model=model.config._name_or_path or None,
        base_config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        architectures=["MPlusForCausalLM"],
        how_to_load=HOW_TO_LOAD,
    )


def load_additions(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy saved additions into a wrapped decoder. Raises CheckpointError naming what does not fit."""
    decoder = decoder_inside(model)
    named = {plain_name(name): (name, tensor) for name, tensor in decoder.state_dict().items() if is_addition(name)}
    expected = {name: tensor for name, (_, tensor) in named.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name in expected or name not in UNUSED}
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing or foreign or wrong:
        raise CheckpointError(
            f"{where} does not fit the decoder: missing {missing[:4]}, superfluous {foreign[:4]}, "
            "of another shape "
            + str([f"{name} {list(tensors[name].shape)} for {list(expected[name].shape)}" for name in wrong[:4]])
        )
    decoder.load_state_dict({named[name][0]: tensor for name, tensor in tensors.items()}, strict=False)
