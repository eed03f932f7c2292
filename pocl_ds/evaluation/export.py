"""Export of the trained student as a Hugging Face folder, checked tensor by tensor against the
trainer's weights.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from pocl_ds.config import ExportConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluation.model_card import model_card
from pocl_ds.models.quiet import quiet
from pocl_ds.workflow.files import MARK, atomic_directory, remove_partial_directories, write_json
from pocl_ds.workflow.manifest import (
    MANIFEST,
    VERIFIED,
    Manifest,
    changed_files,
    read_manifest,
    write_manifest,
)
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

STEP_NAME = "export"
# Files of a model folder; logs, optimizer states and all other files are not exported.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
# Fields in which transformers records the local path that a model was loaded from.
LOCAL_FIELDS = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "special_tokens_map_file",
)


def export(
    run: RunDirectory,
    *,
    out: Path | None,
    recipe_yaml: str,
    fingerprint: str,
    config: ExportConfig | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write train/final with a model card to `out` (default: export/ of the run) and check it.

    The folder is written atomically.

    Returns:
        The exported folder.

    Raises:
        ArtifactError: training is unfinished or wrote no master weights for export.dtype=float32,
            a weight differs from the trainer's (the message names it), or `out` holds files that
            are not an export.
    """
    target = (out or run.export).expanduser().absolute()
    existing = _earlier_export(target)
    if existing and existing.fingerprint == fingerprint and not changed_files(target, existing):
        log.info("the export is up to date: %s", target)
        return target
    start = time.monotonic()
    source = run.train / "final"
    _check_source(run, source)
    if config is not None and config.dtype == "float32":
        _check_master_weights(run, source)
    remove_partial_directories(target)
    with atomic_directory(target) as folder:
        _copy(source, folder)
        check_weights(source, folder)
        parameters = check_loads(folder, trust_remote_code=trust_remote_code)
        (folder / "README.md").write_text(
            model_card(run, recipe_yaml, parameters), encoding="utf-8"
        )
        info = {"parameters": parameters, "seconds": time.monotonic() - start}
        write_manifest(folder, STEP_NAME, fingerprint, info=info)
    log.info("exported %.1f million parameters to %s", parameters / 1e6, target)
    return target


def check_weights(source: Path, folder: Path) -> None:
    """Check that both folders hold the same tensors: keys, shapes, dtypes and bytes.

    Raises:
        ArtifactError: a tensor differs; the message names the first key.
    """
    expected, exported = _keys(source), _keys(folder)
    for key in sorted(expected.keys() | exported.keys()):
        if key not in exported or key not in expected:
            raise ArtifactError(
                f"weight {key} is {'missing from' if key in expected else 'unknown in'} the "
                "exported model: export it again"
            )
        fault = _difference(_tensor(expected[key], key), _tensor(exported[key], key))
        if fault:
            raise ArtifactError(f"weight {key} of the exported model {fault}: export it again")


def check_loads(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Load the folder as a user would, compare the model with the files, and count its parameters.

    A tied head may be absent from the files.

    Raises:
        ArtifactError: a key is missing, unexpected or different; the message names it.
    """
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    model, loading_info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading_info[kind]:
            key = min(
                str(entry if isinstance(entry, str) else entry[0]) for entry in loading_info[kind]
            )
            raise ArtifactError(
                f"the exported model loads with {kind.replace('_', ' ')} ({key}): the trainer's "
                "weights and config.json do not match, train again"
            )
    state = model.state_dict()
    for key, file in _keys(folder).items():
        fault = _difference(_tensor(file, key), state[key]) if key in state else None
        if fault:
            raise ArtifactError(
                f"weight {key} of the exported model {fault} once loaded: check torch_dtype in "
                "config.json"
            )
    return sum(parameter.numel() for parameter in model.parameters())


def _earlier_export(target: Path) -> Manifest | None:
    """The manifest of an earlier export in `target`, if any.

    Raises:
        ArtifactError: `target` holds files that are not an export.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file: name a new folder with --out")
    present = {
        str(path.relative_to(target))
        for path in target.rglob("*")
        if not path.is_dir() and path.name != MARK and path.suffix != VERIFIED
    }
    if not present:
        return None
    message = f"{target} exists and is not an export of pocl_ds: name a new folder with --out"
    try:
        manifest = read_manifest(target)
    except ArtifactError:
        raise ArtifactError(message) from None
    if manifest is None or manifest.step != STEP_NAME:
        raise ArtifactError(message)
    added = present - manifest.files.keys() - {MANIFEST}
    if added:
        raise ArtifactError(
            f"{target} holds {min(added)}, which is not part of the export: move it, or name a new "
            "folder with --out"
        )
    return manifest


def _check_source(run: RunDirectory, source: Path) -> None:
    """Check that the trained weights are complete and match their checksums."""
    manifest = read_manifest(run.train)
    if manifest is None or not (source / "config.json").is_file():
        raise ArtifactError(f"{source} is missing or unfinished: finish `pocl train` first")
    faults = changed_files(run.train, manifest)
    if faults:
        raise ArtifactError(
            f"the trained model changed after it was saved ({faults[0]}): restore {run.train} or "
            "train again"
        )
    if not any(source.glob("*.safetensors")):
        raise ArtifactError(f"{source} holds no safetensors: train again")


def _check_master_weights(run: RunDirectory, source: Path) -> None:
    """Check that training wrote float32 weights."""
    for key, path in _keys(source).items():
        dtype = _tensor(path, key).dtype
        if dtype.is_floating_point and dtype != torch.float32:
            raise ArtifactError(
                f"export.dtype=float32 needs the master weights, and {source} holds "
                f"{str(dtype).removeprefix('torch.')}: remove {run.train / MANIFEST} and run "
                "`pocl train`, which writes them from its last checkpoint"
            )


def _copy(source: Path, folder: Path) -> None:
    for pattern in PATTERNS:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            tree = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {key: value for key, value in tree.items() if key not in LOCAL_FIELDS})
    if not (folder / "generation_config.json").is_file():
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ids = {
            key: tree[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if key in tree
        }
        GenerationConfig(**ids).save_pretrained(folder)


def _keys(folder: Path) -> dict[str, Path]:
    """Tensor key -> file that holds it. Raises ArtifactError for a damaged file."""
    keys: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                keys |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ArtifactError(f"{path} is damaged ({error}): train or export again") from None
    return keys


def _tensor(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """How the actual tensor differs, or None. Bytes are compared: NaN equals NaN, 0.0 not -0.0."""
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"is {actual.dtype} instead of {expected.dtype}"
    raw_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (expected, actual)]
    return None if torch.equal(*raw_bytes) else "has different values"
