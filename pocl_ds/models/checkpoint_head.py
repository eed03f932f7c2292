"""A model's output head from its checkpoint, without the weights of the other layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from pocl_ds.compat.transformers_private import tied_parameters
from pocl_ds.errors import ModelError
from pocl_ds.models.heads import UNQUANTIZED_DTYPES, OutputHead, output_head
from pocl_ds.models.load import empty_model, load_model, load_model_config
from pocl_ds.models.quantization import quantization_method
from pocl_ds.workflow.files import read_json

log = logging.getLogger("pocl_ds")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_output_head(
    path: str,
    *,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> OutputHead:
    """The output head of the model in a folder or on the Hub, on a device.

    Its tensors are read alone from a safetensors checkpoint that stores them under the names of
    transformers. Of any other checkpoint the complete model is loaded. dtype: of the head. Raises
    ModelError for a family whose head is unknown, and for a quantized head.
    """
    config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
    model = empty_model(config, trust_remote_code=trust_remote_code)
    head = output_head(model)
    parameters = _read_parameters(path, revision, config, model)
    if parameters is None and (method := quantization_method(config)):
        raise ModelError(
            f"the output head of {path} is quantized too ({method}), or stored in a form that "
            "cannot be read alone: use a model with an unquantized head"
        )
    if parameters is None:
        log.info("loading all of %s on the CPU for its output head", path)
        complete = load_model(
            path, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision
        )
        head = output_head(complete)
        parameters = [None if p is None else p.detach() for p in (head.weight, head.bias)]
    weight, bias = (
        None if value is None else nn.Parameter(value.to(device, getattr(torch, dtype)), False)
        for value in parameters
    )
    return OutputHead(weight, bias, head.scale, head.soft_cap)


def _read_parameters(
    path: str, revision: str | None, config: Any, model: Any
) -> list[Tensor | None] | None:
    """Weight and bias of the head; None if the checkpoint does not have both under known names."""
    checkpoint = _Checkpoint(path, revision)
    tied = tied_parameters(config)
    module = model.get_output_embeddings()
    module_name = next(name for name, other in model.named_modules() if other is module)
    values: list[Tensor | None] = []
    for kind in ("weight", "bias"):
        name, expected = f"{module_name}.{kind}", getattr(module, kind)
        if expected is None:
            values.append(None)
            continue
        # A tied head is stored as the embedding. GPT-2's checkpoints leave the prefix out.
        names = [name]
        if name in tied:
            names += [tied[name], tied[name].removeprefix(f"{model.base_model_prefix}.")]
        value = checkpoint.read(list(dict.fromkeys(names)))
        if value is None or value.shape != expected.shape or value.dtype not in UNQUANTIZED_DTYPES:
            return None
        values.append(value)
    return values


class _Checkpoint:
    """The tensors of a safetensors checkpoint in a folder or on the Hub. Another kind of checkpoint
    has none.
    """

    def __init__(self, path: str, revision: str | None) -> None:
        self.path, self.revision = path, revision
        self.file_of_tensor: dict[str, str] = {}
        if weights := self._find(WEIGHTS):
            with safe_open(weights, "pt") as reader:
                self.file_of_tensor = dict.fromkeys(reader.keys(), WEIGHTS)
        elif index := self._find(INDEX):
            self.file_of_tensor = read_json(Path(index))["weight_map"]

    def read(self, names: Sequence[str]) -> Tensor | None:
        """The tensor that is stored under one of several names. None if none is, or if more are, as
        a tied head may be stored next to an embedding that differs from it.
        """
        stored = [name for name in names if name in self.file_of_tensor]
        file = self._find(self.file_of_tensor[stored[0]]) if len(stored) == 1 else None
        if file is None:
            return None
        with safe_open(file, "pt") as reader:
            value: Tensor = reader.get_tensor(stored[0])
            return value

    def _find(self, name: str) -> str | None:
        """A file, downloaded if need be; None if it does not exist."""
        if os.path.isdir(self.path):
            file = os.path.join(self.path, name)
            return file if os.path.isfile(file) else None
        try:
            return str(hf_hub_download(self.path, name, revision=self.revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
