"""From what a recipe names (Hub name, folder, GGUF file) to a model, its configuration and its
tokenizer.

Whatever transformers throws on the way becomes one sentence that names the model and the remedy.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models import gguf
from pocl_ds.models.attention import PER_SAMPLE, check_attention, per_sample
from pocl_ds.models.quantization import quantization_arguments
from pocl_ds.models.quiet import quiet
from pocl_ds.runtime.distributed import device

# Every model is loaded through this module, so that transformers knows the attention by its name.
AttentionInterface.register(PER_SAMPLE, per_sample)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
LOAD_FAULTS = (
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
OWN_CODE = "contains custom code"  # what transformers says where a model brings some


def resolve_model(config: ModelSource) -> str:
    """The folder or Hub name that the `load_*` functions take.

    Hub names and model folders are returned as they are. A .gguf file, also one inside an installed
    package (`package://PACKAGE/FILE.gguf`), is dequantised once into a folder of the cache (see
    `gguf`). Raises ModelError.
    """
    source = config.model
    if source.startswith(gguf.PACKAGE_SCHEME):
        return str(gguf.dequantize_gguf(gguf.find_package_file(source)))
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        _check_folder(path)
        return str(path)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"model file {source} does not exist: check the path")
        return str(gguf.dequantize_gguf(path))
    if os.path.isfile(path):
        raise ModelError(
            f"model {source} is a file: give a Hugging Face folder, a Hub name or a .gguf file"
        )
    if not HUB_NAME.fullmatch(source):
        raise ModelError(
            f"model folder {source} does not exist: check the path, or give a Hub name such as "
            f"org/name"
        )
    return source


def resolve_commits(sources: Iterable[ModelSource]) -> dict[str, str]:
    """What each Hub name's revision is now: `name@revision` -> commit. Raises ModelError."""
    found = {}
    for source in sources:
        path = resolve_model(source)
        if not os.path.isdir(path):
            with _one_sentence(path, f"revision {source.revision or 'main'}"), quiet():
                file = hf_hub_download(path, "config.json", revision=source.revision or "main")
            found[_named(source)] = Path(file).parent.name
    return found


def pin_to_commit(source: Source, commits: Mapping[str, str]) -> Source:
    """The same model at the commit that `resolve_commits` found for it: a branch of the Hub may move
    while a run lasts.
    """
    return source.model_copy(update={"revision": commits.get(_named(source), source.revision)})


def _named(source: ModelSource) -> str:
    return f"{source.model}@{source.revision or 'main'}"


def resolve_pinned_model(config: ModelSource) -> str:
    """As `resolve_model`; of a Hub name the folder of its revision in the Hub's cache, named by the
    commit. Raises ModelError.

    Later stages know what this returns and nothing else: a name alone would give each of them what
    is the newest then.
    """
    path = resolve_model(config)
    if os.path.isdir(path):
        return path
    folder = path
    with _one_sentence(path, f"revision {config.revision or 'main'}"), quiet():
        for weights in ("*.safetensors", "*.bin"):
            folder = snapshot_download(
                path,
                revision=config.revision or "main",
                allow_patterns=[weights, *BESIDE_WEIGHTS],
                ignore_patterns=["*/*"],
            )
            if next(Path(folder).glob(weights), None):
                break
    return folder


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer of a model. Raises ModelError, also where it has no EOS.

    One without a padding token pads with EOS: masks are made from lengths, never from ids.
    """
    with _one_sentence(path, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision
        )
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {path} has no EOS token, so a response would never end: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that a configuration describes, on `meta`: names and shapes, no memory. The
    configuration stays as it is: transformers writes the attention of a model into its own, which
    may be another model's too.
    """
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )


def load_model_config(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The model's configuration (transformers PretrainedConfig), without its weights. Raises
    ModelError.
    """
    with _one_sentence(path, "configuration"), quiet():
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision
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
    """A causal language model with its weights, in evaluation mode.

    attention: None takes sdpa, or eager for a family without it, and for a model that caps its
    attention scores (Gemma 2), which sdpa would leave out. dropout sets every dropout of the
    model's configuration; None keeps them. Training passes `use_cache=False` to the forward itself
    (`heads.hidden_states` does). Under an active HfDeepSpeedConfig each rank gets its shard only.
    quantization: of teacher.quantization; a quantised model lies on this rank's device from the
    start. Raises ModelError, also where the folder lacks weights that the model needs: they would
    be random.
    """
    config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise ModelError(
            f"{path} caps its attention scores (attn_logit_softcapping), which attention=sdpa "
            f"leaves out: take "
            "attention=per_sample or eager"
        )
    check_attention(attention, config)
    if dropout is not None:
        set_dropout(config, dropout)
    with _one_sentence(path, "model"), quiet():
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention
            or ("eager" if capped else None),  # None: sdpa where the family has it
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
            **quantization_arguments(quantization, dtype, config, device()),
        )
    model, loaded = found
    faults = sorted(
        [*loaded["missing_keys"], *(str(fault[0]) for fault in loaded["mismatched_keys"])]
    )
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ModelError(
            f"the weights of {path} lack {faults[0]}{more}, or have it in another shape: the "
            f"folder is not "
            "a whole causal language model, get it again"
        )
    return cast(PreTrainedModel, model)


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout rate of a configuration (`attention_dropout`, `resid_pdrop`, ...), in
    place.
    """
    for name, value in config.to_dict().items():
        if (
            name.endswith(("dropout", "pdrop"))
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            setattr(config, name, dropout)


def max_positions(config: Any) -> int | None:
    """Longest sequence that a configuration allows, None where it sets no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(positions) if positions else None


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"folder {path} is no model folder, config.json is missing: give a Hugging Face model "
            f"folder"
        )
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ModelError(
            f"model folder {path} holds no weights (*.safetensors or *.bin): get the whole model"
        )


@contextlib.contextmanager
def _one_sentence(path: str, part: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except LOAD_FAULTS as error:
        reason = " ".join(str(error).split())
        reason = re.split(r"(?<=[a-z0-9\"')])\.\s", reason, maxsplit=1)[0].rstrip(".")[:300]
        if isinstance(error, KeyError):
            reason = f"unknown {reason}"
        missing = isinstance(error, ImportError)
        closed = (
            [file.name for file in Path(path).glob("*") if not os.access(file, os.R_OK)]
            if Path(path).is_dir()
            else []
        )
        if closed:
            reason, remedy = (
                f"{', '.join(closed)} may not be read",
                "change the permissions of that folder's files",
            )
        elif isinstance(error, pickle.UnpicklingError):
            found = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"its *.bin file holds more than data: {found[1] if found else 'a damaged pickle'}; nothing of it was run"
            remedy = "get the model as *.safetensors"
        elif OWN_CODE in reason:
            reason, remedy = (
                "it brings code of its own",
                "set trust_remote_code: true beside its name if you have read that code",
            )
        elif missing:
            remedy = "install what it names"
        elif Path(path).exists():
            remedy = "check the files in that folder"
        else:
            remedy = "check the name and the network, or give a local folder"
        raise ModelError(
            f"the {part} of {path} cannot be loaded ({reason or type(error).__name__}): {remedy}"
        ) from error
