"""Which kernel computes attention over the samples of a packed row.

The first kernel that takes a model's attention is chosen: flash-attn, torch's variable-length
kernel, FlexAttention. Otherwise the samples are padded in each layer. CPUs have none of these
kernels. Sliding windows and grouped keys and values do not matter: all kernels have both.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

log = logging.getLogger("pocl_ds")

FLASH_ATTN = "flash-attn"
TORCH_VARLEN = "torch's variable-length kernel"
FLEX = "FlexAttention"
PADDED = "scaled_dot_product_attention over padded samples"
ONE_BY_ONE = "scaled_dot_product_attention for each sample"

HALF_PRECISION = (torch.bfloat16, torch.float16)
FLASH_MAX_WIDTH, FLASH_WIDTH_MULTIPLE = 256, 8  # of a head
FLEX_MIN_WIDTH, FLEX_MAX_WIDTH = 16, 256
# torch has tile sizes for these widths in float32. Its general ones may need more shared memory
# than a GPU has.
FLEX_FLOAT32_WIDTHS = (64, 128, 256)
MIN_CAPABILITY = (8, 0)  # compute capability that flash kernels need


@dataclass(frozen=True)
class AttentionCall:
    """What a model asks of its attention."""

    device_type: str  # of a torch device
    dtype: torch.dtype
    head_width: int
    soft_cap: float | None = None  # of the scores
    dropout: float = 0.0  # probability


class KernelChoice(NamedTuple):
    """The chosen kernel, and why."""

    name: str
    reason: str


def choose_kernel(call: AttentionCall, missing: Mapping[str, str]) -> KernelChoice:
    """Choose the kernel for packed rows.

    missing: kernels that this machine lacks, with the reason (see `missing_kernels`).
    """
    if call.device_type == "cpu":
        return KernelChoice(ONE_BY_ONE, "the fastest on CPUs")
    if call.device_type != "cuda":
        return KernelChoice(PADDED, f"the device is {call.device_type}")
    obstacles: list[str] = []
    for name in (FLASH_ATTN, TORCH_VARLEN, FLEX):
        obstacle = missing.get(name) or _obstacle(name, call)
        if obstacle is None:
            return KernelChoice(name, "; ".join(obstacles) or "it is installed")
        obstacles.append(f"{name} {obstacle}")
    return KernelChoice(PADDED, "; ".join(obstacles))


def _obstacle(kernel: str, call: AttentionCall) -> str | None:
    """Why a kernel cannot compute an attention; None if it can."""
    width, dtype = call.head_width, str(call.dtype).removeprefix("torch.")
    if kernel == FLEX:
        if call.dropout:
            return "has no dropout"
        if not FLEX_MIN_WIDTH <= width <= FLEX_MAX_WIDTH:
            return f"has no heads of width {width}"
        if call.dtype not in HALF_PRECISION and width not in FLEX_FLOAT32_WIDTHS:
            return f"has no heads of width {width} in {dtype}"
        return None
    if call.dtype not in HALF_PRECISION:
        return f"has no {dtype}"
    if width > FLASH_MAX_WIDTH or width % FLASH_WIDTH_MULTIPLE:
        return f"has no heads of width {width}"
    if kernel == TORCH_VARLEN and call.soft_cap is not None:
        return "has no soft cap"
    if kernel == TORCH_VARLEN and call.dropout:
        return "has no dropout"
    if call.soft_cap is not None and call.dropout:
        return "has no dropout with a soft cap"
    return None


@functools.cache
def missing_kernels() -> Mapping[str, str]:
    """The kernels that this machine lacks, with the reason."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return dict.fromkeys((FLASH_ATTN, TORCH_VARLEN, FLEX), "needs CUDA")
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        version = ".".join(map(str, MIN_CAPABILITY))
        return dict.fromkeys(
            (FLASH_ATTN, TORCH_VARLEN, FLEX), f"needs compute capability {version}"
        )
    missing = {}
    if "softcap" not in parameters_of("flash_attn", "flash_attn_varlen_func"):
        missing[FLASH_ATTN] = "2.6 or newer is not installed"
    if "window_size" not in parameters_of("torch.nn.attention.varlen", "varlen_attn"):
        missing[TORCH_VARLEN] = "needs torch 2.11"
    if importlib.util.find_spec("triton") is None:
        missing[FLEX] = "needs triton"
    return missing


def parameters_of(module: str, function: str) -> frozenset[str]:
    """The parameters of a function in a module, none if one of them does not exist."""
    try:
        imported = importlib.import_module(module)
    except (ImportError, OSError):  # also a compiled package that was made for another torch
        return frozenset()
    target = getattr(imported, function, None)
    return frozenset(inspect.signature(target).parameters) if target else frozenset()


@functools.cache
def kernel_for(call: AttentionCall) -> str:
    """The kernel that `choose_kernel` chooses on this machine."""
    return choose_kernel(call, missing_kernels()).name


def attention_call(model: Any, device: torch.device) -> AttentionCall:
    """What a model in training or evaluation mode asks of its attention on a device."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None)
    return AttentionCall(
        device.type,
        model.dtype,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        getattr(config, "attn_logit_softcapping", None),
        float(dropout or 0.0) if model.training else 0.0,
    )


def log_kernel(model: Any, device: torch.device) -> None:
    """Log the kernel of a model's attention on packed rows, and why it was chosen."""
    kernel, reason = choose_kernel(attention_call(model, device), missing_kernels())
    log.info("attention of the %s on packed rows: %s (%s)", model.config.model_type, kernel, reason)
