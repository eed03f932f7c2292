"""GGUF files, dequantized once into a Hugging Face folder.

The folder's name holds the sha256 of the file, so a moved file is not converted twice, and a
changed file is converted again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.models.converted_models import convert_once
from pocl_ds.models.quiet import quiet
from pocl_ds.workflow.files import file_digest


def dequantize_gguf(file: Path) -> Path:
    """The Hugging Face folder (float32, with tokenizer) of a GGUF file, made on the first call.

    Concurrent processes wait for the one that converts. Raises ModelError, ResourceError.
    """
    return convert_once(
        f"{file.stem}-{file_digest(file)['sha256'][:16]}",
        lambda folder: _dequantize(file, folder),
        action=f"dequantizing {file.name}",
    )


def _dequantize(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**location)
    except ImportError as error:
        raise ResourceError(
            f"reading {file} needs the packages gguf and accelerate: pip install gguf accelerate"
        ) from error
    except Exception as error:  # two libraries raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{file} cannot be read as a GGUF language model ({reason}): give another model"
        ) from error
    with quiet():
        _copy_without_quantization(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _copy_without_quantization(model: Any) -> Any:
    """The same weights in a new model, since `save_pretrained` refuses a model loaded from GGUF."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(model.state_dict(), strict=True, assign=True)
    copy.tie_weights()
    copy.generation_config.eos_token_id = config.eos_token_id
    return copy
