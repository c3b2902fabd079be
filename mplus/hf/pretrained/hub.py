"""Uploads to the Hugging Face Hub, and downloads from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplus.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

COMMIT = ("commit_message", "commit_description", "create_pr", "revision")
"""Arguments that ``upload`` passes on to the commit."""
LOOKUP = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments that say where and how to find a repository."""


def upload(
    folder: Path,
    repo_id: str,
    *,
    patterns: Sequence[str] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload ``folder`` (or its files that match ``patterns``), creating the repository and branch where missing.

    Other arguments are as in transformers.

    Returns:
        The commit, as ``HfApi.upload_folder`` describes it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):  # pull requests are no branches
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=None if patterns is None else list(patterns),
        commit_message=commit_message or "Upload model with its memory",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def find_folder(path: str | os.PathLike[str], lookup: Mapping[str, Any]) -> Path:
    """Return the local folder of ``path``, downloaded where it names a repository.

    Raises:
        CheckpointError: neither a folder nor a repository that can be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        options = {name: lookup[name] for name in LOOKUP if name != "subfolder" and lookup.get(name) is not None}
        try:
            folder = Path(snapshot_download(str(path), **options))
        except (HFValidationError, OSError) as error:
            raise CheckpointError(f"{path} must be a folder, or a repository on the Hub: {error}") from error
    return folder / (lookup.get("subfolder") or "")
