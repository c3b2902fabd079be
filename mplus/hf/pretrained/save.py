"""Save what mplus added to a decoder, with a config and a model card; copy it back into a wrapped decoder."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mplus
from mplus.errors import CheckpointError, NotSupported
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.adapters.lora import is_addition, plain_name, refuse_conflicts
from mplus.hf.model.installed import WrappedModel, decoder_inside
from mplus.hf.model.offloading import on_meta, value_of
from mplus.hf.pretrained.config import MPlusModelConfig
from mplus.hf.pretrained.hub import COMMIT, upload
from mplus.hf.pretrained.peft_folders import save_injected
from mplus.hf.pretrained.unwrap_copy import plain_decoder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers.utils.hub import PushToHubMixin
else:
    PushToHubMixin = object  # the class that ``PushToHub`` is mixed into brings its own

WEIGHTS = "model.safetensors"
CALIBRATIONS = "calibrations.safetensors"
"""Holds what a mechanism found out about the decoder, by digest; left out where there is nothing."""
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
            >>> commit = model.push_to_hub("decoder-with-memory", save_base=True, private=True)
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


class SavesAdditions(PushToHub, WrappedModel):  # type: ignore[misc]
    """The part of a wrapped decoder's class that saves what mplus added to it."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        save_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save what mplus added (its adapters, begin rows, mark, retriever, pool) with a config and a model card.

        Args:
            save_directory: folder; made where missing.
            is_main_process, state_dict, push_to_hub: as in transformers. Adapters that ``add_adapter`` put into
                the decoder are saved in ``adapters/``; those of a ``PeftModel`` are not: one that was given to
                ``mplus.wrap`` saves them with its own ``save_pretrained``.
            save_base: save the decoder too, in ``base/``, where transformers can load it without mplus.
            kwargs: for saving the decoder (``max_shard_size`` and so on) and for the Hub (``repo_id`` and so on).

        Raises:
            CheckpointError: the folder holds a decoder of an earlier ``save_base``, which would be loaded with what is
                saved now.
            NotSupported: ``distributed_checkpoint`` was asked for; ``save_base`` of a decoder that accelerate has
                offloaded without a device map, which transformers does not save either; or adapters of the user are
                merged, or have a name of ours.
        """
        folder = Path(save_directory)
        if kwargs.get("distributed_checkpoint"):
            raise NotSupported("distributed_checkpoint is not supported with memory: pass a gathered state_dict")
        refuse_conflicts(self)
        if save_base:
            _check_can_save_base(self, state_dict)
        elif (folder / BASE).is_dir():
            raise CheckpointError(
                f"{folder} must not hold a decoder of an earlier save, in {BASE}/, when saving without save_base: it "
                "would be loaded with these additions, so use save_base=True, remove it, or choose another folder"
            )
        hub = {name: kwargs.pop(name) for name in ("repo_id", "private", *COMMIT) if name in kwargs}
        tags = kwargs.pop("tags", None)
        folder.mkdir(parents=True, exist_ok=True)
        if save_base:
            decoder, tree = plain_decoder(self)
            plain = None if state_dict is None else tree.plain_state(state_dict)
            decoder.save_pretrained(folder / BASE, is_main_process=is_main_process, state_dict=plain, **kwargs)
        elif not on_meta(self) and digest(self, "base") != self.mplus_installed.base_digest:
            warnings.warn(
                "the decoder's own weights have changed since mplus.wrap and are not saved with the additions: "
                "use save_pretrained(..., save_base=True)",
                stacklevel=2,
            )
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        added = {name: tensor for name, tensor in state.items() if is_addition(name)}
        additions = {  # offloaded ones are brought back for a moment
            plain_name(name): (value_of(self, name) if tensor.is_meta else tensor.detach()).contiguous()
            for name, tensor in added.items()
        }
        save_file(additions, folder / WEIGHTS, metadata={"format": "pt"})
        known = self.mplus_engine.mechanism.calibrations_known()
        if known:
            save_file(known, folder / CALIBRATIONS)
        else:
            (folder / CALIBRATIONS).unlink(missing_ok=True)  # of an earlier save
        adapters = save_injected(self, folder, state)
        files = self.mplus_engine.mechanism.save_retriever(folder)
        config = _model_config(self, files)
        config.save_pretrained(folder)
        (folder / "README.md").write_text(_model_card(self, config, save_base, tags), encoding="utf-8")
        if push_to_hub:
            patterns = [
                WEIGHTS,
                CALIBRATIONS,
                *files.values(),
                "config.json",
                "README.md",
                *adapters,
                *([f"{BASE}/*"] if save_base else []),
            ]
            upload(folder, hub.pop("repo_id", folder.name), patterns=patterns, token=kwargs.get("token"), **hub)


def load_calibrations(model: nn.Module, folder: Path) -> None:
    """Let the mechanism of a wrapped decoder know what was found out when it was saved.

    Raises CheckpointError where the file cannot be read.
    """
    if not (folder / CALIBRATIONS).is_file():
        return
    try:
        known = load_file(folder / CALIBRATIONS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / CALIBRATIONS} must be a whole safetensors file: {error}") from error
    cast("WrappedModel", decoder_inside(model)).mplus_engine.mechanism.take_calibrations(known)


def _check_can_save_base(model: WrappedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    """Raise NotSupported where the decoder's own weights are offloaded and nothing says where they are."""
    if state_dict is None and not hasattr(model, "hf_device_map") and on_meta(model):
        raise NotSupported(
            "transformers cannot save a decoder that accelerate has offloaded without a device map: bring it back with "
            "accelerate.hooks.remove_hook_from_submodules(model), or save without save_base"
        )


def _model_config(model: WrappedModel, files: Mapping[str, str]) -> MPlusModelConfig:
    """Return the configuration; ``files``: options of the retriever that name files, and their names in the folder."""
    plain, retriever = model.mplus_config.to_dict(), model.mplus_config.retriever
    saved = {"retriever": {"name": retriever.name, **retriever.options, **files}} if files else {}
    return MPlusModelConfig(
        mplus={**plain, **saved},
        base_model=model.config._name_or_path or None,
        base_config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        architectures=["MPlusForCausalLM"],
        how_to_load=HOW_TO_LOAD,
    )


def _model_card(
    model: WrappedModel, config: MPlusModelConfig, with_base: bool, tags: Sequence[str] | None = None
) -> str:
    """Return a model card with Hub metadata, sizes and three lines of use."""
    name, base = type(model).__name__, config.base_model
    added = sum(parameter.numel() for key, parameter in model.named_parameters() if is_addition(key))
    labels = json.dumps(["mplus", "long-term-memory", *(tags or ())])  # JSON is YAML
    metadata = ["---", "library_name: mplus", "pipeline_tag: text-generation", f"tags: {labels}"]
    if base and not Path(base).exists():  # the Hub wants a repository here
        metadata.append(f"base_model: {base}")
    where = "with the decoder itself in `base/`" if with_base else "the decoder is loaded from where it came from"
    use = '"path/or/repository"' if with_base or base else '"path/or/repository", base="the decoder"'
    elsewhere = "" if with_base else " Where it has been moved since, pass `base=` with its place."
    return "\n".join(
        [
            *metadata,
            "---",
            "",
            f"# {name} with a memory of the mechanism `{model.mplus_config.mechanism.name}`",
            "",
            f"Memory additions for {base or 'a ' + name}: {added:,} parameters; {where}.{elsewhere}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {value} |" for label, value in _sizes(model).items()),
            "",
            "```python",
            "import mplus",
            "",
            f"model = mplus.from_pretrained({use})",
            "memory = model.new_memory(tokenizer=tokenizer)",
            'memory.write("text to remember")',
            "model.generate(**inputs, memory=memory)",
            "```",
            "",
            "`AutoModelForCausalLM` and `pipeline` load it too, after `import mplus.hf`: that registers the model type",
            "`mplus`, which transformers does not know by itself.",
            "",
            f"Made with mplus {mplus.__version__}. M+: arXiv 2502.00592.",
            "",
        ]
    )


def _sizes(model: WrappedModel) -> dict[str, str]:
    """Return the sizes that the model card says, those that mean something to the mechanism."""
    config = model.mplus_config
    if model.mplus_engine.writes_text:
        return {"mechanism": config.mechanism.name, "passages": f"at most {config.chunk_tokens:,} text tokens"}
    sizes = {
        "mechanism": f"{config.mechanism.name}, variant {config.variant}",
        "read per write": f"{config.chunk_tokens:,} text tokens",
        "written per layer": f"{config.memory_tokens_per_chunk:,} rows",
    }
    mechanism = model.mplus_engine.mechanism
    if "short_term_tokens" in mechanism.sizes:
        sizes["short-term rows per layer"] = f"{config.short_term_tokens:,}"
    if mechanism.long_term:
        limit, how = config.long_term_tokens, f" with `{config.retriever.name}`" if mechanism.uses_retriever else ""
        held = "no limit" if limit is None else f"{limit:,}, those of {mechanism.capacity(limit):,} text tokens"
        sizes["long-term rows per layer"] = held
        sizes["retrieved rows per layer"] = f"{config.retrieved_tokens:,}{how}"
    return sizes


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
