"""Quantised teachers: by bitsandbytes while they load, or as their folders come (GPTQ, AWQ and what
else transformers reads).

They only run forward, whole on each rank: ZeRO cannot share out weights whose scales lie elsewhere.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pocl_ds.config import StudentConfig, TeacherConfig
from pocl_ds.errors import ModelError, RecipeError, ResourceError

BYTES = {
    "bnb_8bit": 1.0,
    "bnb_4bit": 0.5 + 4 / 64,
}  # of a weight; NF4 has a float32 scale for each 64


def quantization_method(config: Any) -> str | None:
    """How a model's own weights are quantised (`gptq`, `awq`, ...), by its configuration; None
    where they are not.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(
        found.get("quant_method", "unknown") if isinstance(found, dict) else found.quant_method
    )


def bytes_per_weight(config: Any, quantization: str) -> float | None:
    """Of a linear module's weights, where the teacher is quantised and it is known; None elsewhere."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and quantization == "none":
        if isinstance(bits := found.get("bits"), int):
            return bits / 8
        quantization = next(
            (f"bnb_{size}" for size in ("8bit", "4bit") if found.get(f"load_in_{size}")), "none"
        )
    return BYTES.get(quantization)


def check_quantized_teacher(teacher: TeacherConfig, config: Any) -> None:
    """Raise RecipeError or ResourceError where a teacher of this configuration cannot be quantised
    or sharded as it is asked.
    """
    method = quantization_method(config)
    if method and teacher.quantization != "none":
        raise RecipeError(
            f"teacher.quantization={teacher.quantization}, and {teacher.model} has quantised "
            f"weights already "
            f"({method}): set it to none"
        )
    if method and teacher.ds_config is not None:
        raise RecipeError(
            f"teacher.model={teacher.model} has quantised weights ({method}), which ZeRO cannot "
            f"shard: set "
            "teacher.ds_config=null"
        )
    if teacher.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            f"teacher.quantization={teacher.quantization} needs the package bitsandbytes, which "
            f"is not "
            "installed: pip install bitsandbytes"
        )


def check_student_is_not_quantized(student: StudentConfig, config: Any) -> None:
    """Raise ModelError for a student whose weights are quantised."""
    if method := quantization_method(config):
        raise ModelError(
            f"student.model={student.model} has quantised weights ({method}), which cannot be "
            f"trained: give the "
            "model that they were made of"
        )


def quantization_arguments(quantization: str, dtype: str, config: Any, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` must be told of a quantised model: nothing of others. Its weights are
    made where they stay.

    quantization: of teacher.quantization. The head stays as it is; a 4-bit weight is NF4,
    multiplied in `dtype`.
    """
    if quantization == "none" and quantization_method(config) is None:
        return {}
    settings: dict[str, Any] = {"device_map": {"": device}}
    if quantization == "none":
        return settings
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it says at each product that float32 becomes float16
    if quantization == "bnb_8bit":
        return {**settings, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    return {**settings, "quantization_config": nf4}
