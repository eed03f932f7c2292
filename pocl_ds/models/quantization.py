"""Quantized teachers: by bitsandbytes while they load, or as stored (GPTQ, AWQ and other formats
that transformers reads).

They only run forward, complete on each rank: ZeRO cannot partition weights with separate scales.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pocl_ds.config import StudentConfig, TeacherConfig
from pocl_ds.errors import ModelError, RecipeError, ResourceError

BYTES_PER_WEIGHT = {"bnb_8bit": 1.0, "bnb_4bit": 0.5 + 4 / 64}  # NF4: a float32 scale for each 64


def quantization_method(config: Any) -> str | None:
    """How a model's stored weights are quantized (`gptq`, `awq`, ...), None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if isinstance(settings, dict):
        return str(settings.get("quant_method", "unknown"))
    return str(settings.quant_method)


def bytes_per_weight(config: Any, quantization: str) -> float | None:
    """Bytes of a weight of a quantized teacher's linear modules; None if not known."""
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and quantization == "none":
        if isinstance(bits := settings.get("bits"), int):
            return bits / 8
        sizes = (f"bnb_{size}" for size in ("8bit", "4bit") if settings.get(f"load_in_{size}"))
        quantization = next(sizes, "none")
    return BYTES_PER_WEIGHT.get(quantization)


def check_quantized_teacher(teacher: TeacherConfig, config: Any) -> None:
    """Raise RecipeError or ResourceError if the recipe asks this teacher for a quantization or a
    ds_config that it cannot have.
    """
    method = quantization_method(config)
    if method and teacher.quantization != "none":
        raise RecipeError(
            f"teacher.quantization={teacher.quantization}, and {teacher.model} already has "
            f"quantized weights ({method}): set it to none"
        )
    if method and teacher.ds_config is not None:
        raise RecipeError(
            f"teacher.model={teacher.model} has quantized weights ({method}), which ZeRO cannot "
            "partition: set teacher.ds_config=null"
        )
    if teacher.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            f"teacher.quantization={teacher.quantization} needs the package bitsandbytes, which is "
            "not installed: pip install bitsandbytes"
        )


def check_student_is_not_quantized(student: StudentConfig, config: Any) -> None:
    """Raise ModelError for a student with quantized weights."""
    if method := quantization_method(config):
        raise ModelError(
            f"student.model={student.model} has quantized weights ({method}), which cannot be "
            "trained: give the model before quantization"
        )


def quantization_arguments(
    quantization: str, dtype: str, config: Any, device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantized model, which loads straight to its device.

    Empty for other models. The head is not quantized; a 4-bit weight is NF4, multiplied in `dtype`.
    quantization: the recipe's teacher.quantization.
    """
    if quantization == "none" and quantization_method(config) is None:
        return {}
    arguments: dict[str, Any] = {"device_map": {"": device}}
    if quantization == "none":
        return arguments
    # bitsandbytes logs at each product that it casts float32 to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization == "bnb_8bit":
        return {**arguments, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    return {**arguments, "quantization_config": nf4}
