"""Loads a model, its configuration and its tokenizer from a Hub name, a folder or a GGUF file.

Errors of transformers become one sentence that names the model and the remedy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from pocl_ds.config import ModelSource, TeacherConfig
from pocl_ds.errors import ModelError
from pocl_ds.models.attention import PER_SAMPLE, check_attention, per_sample
from pocl_ds.models.dropout import set_dropout
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.gguf import dequantize_gguf
from pocl_ds.models.merged_adapters import merge_adapter
from pocl_ds.models.model_paths import base_of_adapter, is_adapter, local_path
from pocl_ds.models.quantization import quantization_arguments
from pocl_ds.models.quiet import quiet
from pocl_ds.runtime.distributed import device

log = logging.getLogger("pocl_ds")

# Every model is loaded through this module, so that transformers knows the attention by its name.
AttentionInterface.register(PER_SAMPLE, per_sample)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
Source = TypeVar("Source", bound=ModelSource)
CUSTOM_CODE_MESSAGE = "contains custom code"  # in the error of transformers


def resolve_model(config: ModelSource) -> str:
    """The folder or Hub name of a model, as the `load_*` functions take it.

    A .gguf file is dequantized once into a folder of the cache (see `gguf`), and an adapter is
    merged once with its base model (see `merged_adapters`). Both may be in an installed package
    (`package://PACKAGE/NAME`). Raises ModelError if there is no such model.
    """
    source = config.model
    path = local_path(source)
    if os.path.isdir(path):
        if is_adapter(path):
            return _resolve_adapter(path, config)
        _check_folder(path, weights=not _is_served(config))
        return str(path)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"model file {source} does not exist: check the path")
        return str(dequantize_gguf(path))
    if os.path.isfile(path):
        raise ModelError(
            f"model {source} is a file: give a Hugging Face folder, a Hub name or a .gguf file"
        )
    if not HUB_NAME.fullmatch(source):
        raise ModelError(
            f"model folder {source} does not exist: check the path, or give a Hub name such as "
            "org/name"
        )
    return source


def _resolve_adapter(folder: Path, config: ModelSource) -> str:
    """The base model with the adapter merged; of a served model only the base's other files are
    read.
    """
    name, revision = base_of_adapter(folder)
    base = config.model_copy(update={"model": name, "revision": revision})
    try:
        base_path = resolve_pinned_model(base)
    except ModelError as error:
        raise ModelError(f"the base model of the adapter {folder}: {error}") from error
    if _is_served(config):
        return base_path
    return str(merge_adapter(folder, base_path, trust_remote_code=config.trust_remote_code))


def resolve_commits(sources: Iterable[ModelSource]) -> dict[str, str]:
    """The current commit of each model on the Hub, by `name@revision`. Raises ModelError."""
    commits = {}
    for source in sources:
        path = resolve_model(source)
        if not os.path.isdir(path):
            with _explain_load_errors(path, f"revision {source.revision or 'main'}"), quiet():
                file = hf_hub_download(path, "config.json", revision=source.revision or "main")
            commits[_name_at_revision(source)] = Path(file).parent.name
    return commits


def pin_to_commit(source: Source, commits: Mapping[str, str]) -> Source:
    """The model at the commit from `resolve_commits`, since a branch may move during a run."""
    revision = commits.get(_name_at_revision(source), source.revision)
    return source.model_copy(update={"revision": revision})


def _name_at_revision(source: ModelSource) -> str:
    return f"{source.model}@{source.revision or 'main'}"


def resolve_pinned_model(config: ModelSource) -> str:
    """Like `resolve_model`, but a Hub name becomes the folder of its revision in the Hub's cache.

    Later steps use this folder, whose name is the commit. Raises ModelError.
    """
    path = resolve_model(config)
    if os.path.isdir(path):
        return path
    folder = path
    with _explain_load_errors(path, f"revision {config.revision or 'main'}"), quiet():
        for weights in ([],) if _is_served(config) else (["*.safetensors"], ["*.bin"]):
            folder = snapshot_download(
                path,
                revision=config.revision or "main",
                allow_patterns=[*weights, *OTHER_FILES],
                ignore_patterns=["*/*"],
            )
            if not weights or next(Path(folder).glob(weights[0]), None):
                break
    return folder


def model_files(folder: Path) -> list[Path]:
    """The files of a model that loading may read; .bin files only if no others have its weights."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    patterns = (*OTHER_FILES, "additional_chat_templates/*.jinja")
    extra_files = {path for pattern in patterns for path in folder.glob(pattern)}
    return [path for path in (*weights, *sorted(extra_files)) if path.is_file()]


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Load the tokenizer of a model. Raises ModelError, also if the tokenizer has no EOS."""
    with _explain_load_errors(path, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision
        )
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {path} has no EOS token, so a response would never end: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_teacher_tokenizer(
    path: str, teacher: ModelSource, student_tokenizer: Any, template: Literal["student", "own"]
) -> Any:
    """Load a teacher's tokenizer, with the student's chat template if `template` is `student`.
    Raises ModelError.
    """
    tokenizer = load_tokenizer(
        path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision
    )
    if template == "student":
        tokenizer.chat_template = student_tokenizer.chat_template
    return tokenizer


def load_generation_config(path: str, revision: str | None = None) -> Any:
    """A model's generation settings (transformers GenerationConfig), or None if it has none."""
    try:
        with quiet():
            return GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:
        return None


def empty_model(
    config: Any, *, trust_remote_code: bool = False, attention: str | None = None
) -> Any:
    """The model of a configuration on the meta device: names and shapes, without memory.

    Uses a copy of the configuration, since transformers writes its attention into it. attention:
    implementation; None for the default of transformers.
    """
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
        )


def load_model_config(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Load a model's configuration (transformers PretrainedConfig). Raises ModelError."""
    with _explain_load_errors(path, "configuration"), quiet():
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision
        )
    _drop_padding_beyond_rows(path, config)
    return config


def _drop_padding_beyond_rows(path: str, config: Any) -> None:
    """Unset a padding id that the embedding has no row for: transformers cannot build such a model,
    and padding is masked, so it needs no separate id.
    """
    text_config = config.get_text_config(decoder=True)
    padding, rows = text_config.pad_token_id, getattr(text_config, "vocab_size", None)
    if padding is None or rows is None or padding < rows:
        return
    _warn_of_padding(path, padding, rows)
    text_config.pad_token_id = config.pad_token_id = None


@functools.cache
def _warn_of_padding(path: str, padding: int, rows: int) -> None:
    """Warn once per process: a configuration is read many times."""
    log.warning(
        "%s: pad_token_id=%d in config.json is beyond the %d rows of the embedding, and is ignored",
        path,
        padding,
        rows,
    )


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    dropout: float | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: str = "none",
) -> PreTrainedModel:
    """Load a causal language model with its weights, in evaluation mode.

    Under an active HfDeepSpeedConfig each rank gets its shard only.

    Args:
        dtype: name of a torch dtype, or `auto` (see `resolve_dtype`).
        attention: implementation; None is sdpa, or eager for a family without sdpa and for a model
            that caps its attention scores (Gemma 2), which sdpa would ignore.
        dropout: set every dropout rate of the configuration, and skip no layers in training; None
            keeps the configuration.
        quantization: the recipe's teacher.quantization; a quantized model is loaded directly
            onto this rank's device.

    Raises:
        ModelError: the model cannot be loaded, or the folder lacks weights, which
            transformers would initialize at random.
    """
    # Decide dtype, attention and dropout.
    config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
    dtype = resolve_dtype(dtype)
    caps_scores = getattr(config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and caps_scores:
        raise ModelError(
            f"{path} caps its attention scores (attn_logit_softcapping), which "
            "attn_implementation=sdpa ignores: use per_sample or eager"
        )
    check_attention(attention, config)
    if dropout is not None:
        set_dropout(config, dropout)
    # Load the weights, and reject a model that lacks some.
    with _explain_load_errors(path, "model"), quiet():
        model_and_info: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention or ("eager" if caps_scores else None),
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
            **quantization_arguments(quantization, dtype, config, device()),
        )
    model, info = model_and_info
    mismatched = (str(entry[0]) for entry in info["mismatched_keys"])
    problems = sorted([*info["missing_keys"], *mismatched])
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ModelError(
            f"the weights of {path} lack {problems[0]}{more}, or have it in another shape: the "
            "folder is not a complete causal language model, download it again"
        )
    return cast(PreTrainedModel, model)


def embedding_rows(config: Any) -> int:
    """Rows of a model's embedding, also of a language model inside a multimodal one: every id that
    the model reads is below it.
    """
    return int(config.get_text_config(decoder=True).vocab_size)


def max_positions(config: Any) -> int | None:
    """The longest sequence that a configuration allows, None if it sets no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(positions) if positions else None


def _is_served(config: ModelSource) -> bool:
    """Whether a server has the model's weights, so that only its other files are read here."""
    return isinstance(config, TeacherConfig) and config.endpoint is not None


def _check_folder(path: Path, *, weights: bool) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"folder {path} is not a model folder, config.json is missing: give a Hugging Face "
            "model folder"
        )
    if weights and not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ModelError(
            f"model folder {path} holds no weights (*.safetensors or *.bin): get the complete model"
        )


@contextlib.contextmanager
def _explain_load_errors(path: str, part: str) -> Iterator[None]:
    """Turn errors of transformers into a ModelError. part: `model`, `tokenizer` or the like."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        reason, remedy = _reason_and_remedy(path, error)
        raise ModelError(
            f"the {part} of {path} cannot be loaded ({reason or type(error).__name__}): {remedy}"
        ) from error


def _reason_and_remedy(path: str, error: Exception) -> tuple[str, str]:
    """Why loading failed, in at most 300 characters, and what to do."""
    unreadable = (
        [file.name for file in Path(path).glob("*") if not os.access(file, os.R_OK)]
        if Path(path).is_dir()
        else []
    )
    if unreadable:
        return (
            f"{', '.join(unreadable)} cannot be read",
            "change the permissions of that folder's files",
        )
    if isinstance(error, pickle.UnpicklingError):
        reference = re.search(r"GLOBAL (\S+)", str(error))
        content = reference[1] if reference else "a damaged pickle"
        return (
            f"its *.bin file holds more than data: {content}; its code was not run",
            "get the model as *.safetensors",
        )

    # The first sentence of the message.
    reason = " ".join(str(error).split())
    reason = re.split(r"(?<=[a-z0-9\"')])\.\s", reason, maxsplit=1)[0].rstrip(".")[:300]
    if isinstance(error, KeyError):
        reason = f"unknown {reason}"
    if CUSTOM_CODE_MESSAGE in reason:
        return (
            "it contains custom code",
            "set trust_remote_code: true next to its name if you have read that code",
        )
    if isinstance(error, ImportError):
        return reason, "install what it names"
    if Path(path).exists():
        return reason, "check the files in that folder"
    return reason, "check the name and the network, or give a local folder"
