"""The exported student to the Hub: exactly the files that `pocl export` wrote and sealed, and its
model card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.evaluation.export import STAGE
from pocl_ds.workflow.manifest import MANIFEST, Manifest, damaged_files, read_manifest

# As the Hub has it: letters, digits, `-`, `_`, `.`; neither `-` nor `.` at an edge, no `--` or
# `..`, at most 96 in all.
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{PART}/{PART}")
ENOUGH_LETTERS = 96


def push(folder: Path, repository: str, *, private: bool, dry_run: bool) -> str:
    """Upload an export to ORG/NAME, making the repository where it is not there; returns what to
    print.

    The token is huggingface_hub's own (`hf auth login`, HF_TOKEN); it is handed to nobody else, and
    never shown. Raises RecipeError for another name, ArtifactError where the export is not whole,
    ResourceError where the Hub refuses.
    """
    if (
        not REPOSITORY.fullmatch(repository)
        or len(repository) > ENOUGH_LETTERS
        or re.search(r"--|\.\.|\.git$", repository)
    ):
        raise RecipeError(
            f"--repo {repository} is not of the form ORG/NAME: write it as in my-org/my-student"
        )
    sealed = _export_at(folder)
    names = sorted(sealed.files)
    sizes = {name: int(sealed.files[name]["bytes"]) for name in names}
    if dry_run:
        width = max(map(len, names))
        lines = [f"{name:<{width}}  {_size(sizes[name]):>10}" for name in names]
        kind = "private" if private else "public"
        return "\n".join(
            [
                f"would upload to {repository} on the Hub ({kind} where it is new), from {folder}:",
                *lines,
                f"{len(names)} files, {_size(sum(sizes.values()))}",
            ]
        )
    return f"student  {_upload(folder, repository, names, private=private)}"


def _export_at(folder: Path) -> Manifest:
    """The manifest of a whole export."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.step != STAGE:
        raise ArtifactError(
            f"{folder} holds no finished export: run `pocl export` first, or name its folder with "
            f"--folder"
        )
    if faults := damaged_files(folder, manifest):
        raise ArtifactError(
            f"the export {folder} is not as it was written ({faults[0]}): run `pocl export` again"
        )
    return manifest


def _upload(folder: Path, repository: str, names: list[str], *, private: bool) -> str:
    """The address of what was uploaded."""
    import huggingface_hub

    token = huggingface_hub.get_token()
    if not token:
        raise ResourceError(
            "there is no token for the Hub: run `hf auth login`, or put one into HF_TOKEN"
        )
    api: Any = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if (
            private and not api.repo_info(repository).private
        ):  # one that was there keeps who may see it
            raise RecipeError(
                f"--private, but {repository} exists and is public: choose another, or make it "
                f"private first"
            )
        # Our manifest stays behind; of everything else only what it names goes.
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
            f"the Hub does not take {repository} ({type(error).__name__}: {reason}): check the "
            f"network, and "
            "whether the token may write there"
        ) from None
    return f"https://huggingface.co/{repository}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
