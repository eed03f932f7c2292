"""Upload of the exported student to the Hub: exactly the files that `pocl export` wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.evaluation.export import STEP_NAME
from pocl_ds.runtime.formatting import format_size
from pocl_ds.workflow.manifest import MANIFEST, Manifest, damaged_files, read_manifest

# The Hub's rule for names: letters, digits, `-`, `_` and `.`; neither `-` nor `.` at an edge, no
# `--` or `..`, at most 96 characters in all.
NAME_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{NAME_PART}/{NAME_PART}")
MAX_NAME_LENGTH = 96


def push(folder: Path, repository: str, *, private: bool, dry_run: bool) -> str:
    """Upload an export to the repository ORG/NAME, which is created if it does not exist.

    The token is huggingface_hub's own (`hf auth login` or HF_TOKEN); it is never shown.

    Returns:
        The text to print: the address, or with `dry_run` the list of files.

    Raises:
        RecipeError: the name is invalid, or a private upload would go to a public repository.
        ArtifactError: the export is incomplete.
        ResourceError: the Hub refuses the upload, or there is no token.
    """
    if (
        not REPOSITORY.fullmatch(repository)
        or len(repository) > MAX_NAME_LENGTH
        or re.search(r"--|\.\.|\.git$", repository)
    ):
        raise RecipeError(
            f"--repo {repository} is not of the form ORG/NAME: write it as in my-org/my-student"
        )
    manifest = _read_export(folder)
    names = sorted(manifest.files)
    sizes = {name: int(manifest.files[name]["bytes"]) for name in names}
    if dry_run:
        width = max(map(len, names))
        lines = [f"{name:<{width}}  {format_size(sizes[name]):>10}" for name in names]
        kind = "private" if private else "public"
        return "\n".join(
            [
                f"would upload to {repository} on the Hub ({kind} if it is new), from {folder}:",
                *lines,
                f"{len(names)} files, {format_size(sum(sizes.values()))}",
            ]
        )
    return f"student  {_upload(folder, repository, names, private=private)}"


def _read_export(folder: Path) -> Manifest:
    """The manifest of a complete export."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.step != STEP_NAME:
        raise ArtifactError(
            f"{folder} holds no finished export: run `pocl export` first, or name its folder with "
            "--folder"
        )
    if faults := damaged_files(folder, manifest):
        raise ArtifactError(
            f"the export {folder} changed after it was written ({faults[0]}): run "
            "`pocl export` again"
        )
    return manifest


def _upload(folder: Path, repository: str, names: list[str], *, private: bool) -> str:
    """Upload the files and return the address of the repository."""
    import huggingface_hub

    token = huggingface_hub.get_token()
    if not token:
        raise ResourceError(
            "there is no token for the Hub: run `hf auth login`, or put one into HF_TOKEN"
        )
    api: Any = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        # A repository that already exists keeps its visibility.
        if private and not api.repo_info(repository).private:
            raise RecipeError(
                f"--private, but {repository} exists and is public: choose another, or make it "
                "private first"
            )
        # Upload the files that the manifest lists, without the manifest itself.
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=names,
            ignore_patterns=[MANIFEST],
            commit_message="Upload a student distilled with pocl_ds",
        )
    except RecipeError:
        raise
    except Exception as error:  # network, offline mode, rights: a dozen unrelated types
        reason = " ".join(str(error).split())[:200].replace(token, "***")
        raise ResourceError(
            f"the Hub refuses {repository} ({type(error).__name__}: {reason}): check the network, "
            "and whether the token may write there"
        ) from None
    return f"https://huggingface.co/{repository}"
