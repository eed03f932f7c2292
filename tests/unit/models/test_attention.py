"""Which kernel computes attention on packed rows, and what the kernels receive."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, make_model
from packed_attention import random_sides, reference_attention, visible_keys
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import flex_attention

from pocl_ds.errors import ModelError
from pocl_ds.models import attention, attention_kernels, packed_samples
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.attention_choice import (
    FLASH_ATTN,
    FLEX,
    ONE_BY_ONE,
    PADDED,
    TORCH_VARLEN,
    AttentionCall,
    attention_call,
    choose_kernel,
    log_kernel,
    missing_kernels,
)
from pocl_ds.models.attention_kernels import PACKED_KERNELS, ScoreSettings
from pocl_ds.models.heads import hidden_states
from pocl_ds.models.packed_samples import PackedSamples, first_visible_keys, visible_blocks

CPU, BF16 = torch.device("cpu"), torch.bfloat16
NO_FLASH_ATTN = {FLASH_ATTN: "2.6 or newer is not installed"}
LENGTHS = (5, 130, 1, 204)


@pytest.mark.parametrize(
    ("call", "missing", "kernel", "reason"),
    [
        (AttentionCall("cpu", BF16, 64), {}, ONE_BY_ONE, "the fastest on CPUs"),
        (AttentionCall("mps", BF16, 64), {}, PADDED, "the device is mps"),
        (AttentionCall("cuda", BF16, 64), {}, FLASH_ATTN, "it is installed"),
        (
            AttentionCall("cuda", BF16, 128),
            NO_FLASH_ATTN,
            TORCH_VARLEN,
            "flash-attn 2.6 or newer is not installed",
        ),
        (
            AttentionCall("cuda", BF16, 256, soft_cap=50.0),
            NO_FLASH_ATTN,
            FLEX,
            "flash-attn 2.6 or newer is not installed; torch's variable-length kernel has no soft "
            "cap",
        ),
        (
            AttentionCall("cuda", torch.float32, 128),
            {},
            FLEX,
            "flash-attn has no float32; torch's variable-length kernel has no float32",
        ),
        (
            AttentionCall("cuda", BF16, 64, dropout=0.1),
            NO_FLASH_ATTN,
            PADDED,
            "torch's variable-length kernel has no dropout; FlexAttention has no dropout",
        ),
        (AttentionCall("cuda", BF16, 64, dropout=0.1), {}, FLASH_ATTN, "it is installed"),
        (
            AttentionCall("cuda", BF16, 64, soft_cap=9.0, dropout=0.1),
            {},
            PADDED,
            "flash-attn has no dropout with a soft cap",
        ),
        (AttentionCall("cuda", BF16, 20), {}, FLEX, "flash-attn has no heads of width 20"),
        (AttentionCall("cuda", BF16, 512), {}, PADDED, "FlexAttention has no heads of width 512"),
        (
            AttentionCall("cuda", torch.float32, 80),
            {},
            PADDED,
            "FlexAttention has no heads of width 80 in float32",
        ),
    ],
)
def test_the_choice_of_a_kernel(
    call: AttentionCall, missing: dict[str, str], kernel: str, reason: str
) -> None:
    choice = choose_kernel(call, missing)
    assert choice.name == kernel
    assert reason in choice.reason


def test_kernels_without_cuda_are_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert dict(missing_kernels()) == dict.fromkeys(PACKED_KERNELS, "needs CUDA")


@pytest.mark.parametrize(
    ("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("training", [True, False])
def test_the_logged_choice_is_that_of_the_forward(
    family: str,
    extra: dict[str, Any],
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Head width, soft cap, dropout and dtype come from the configuration for the log, and from
    tensors in the forward.
    """
    dropout = {"attn_pdrop": 0.2} if family == "gpt2" else {"attention_dropout": 0.2}
    if family == "gemma2":
        extra = {"attn_logit_softcapping": 1.5, **extra}
    model = make_model(family, {**extra, **dropout}).to(BF16).train(training)
    model.set_attn_implementation(PER_SAMPLE)
    calls = set()
    monkeypatch.setattr(attention, "kernel_for", lambda call: calls.add(call) or ONE_BY_ONE)
    with torch.no_grad():
        hidden_states(model, torch.ones(1, 5).long(), None, torch.zeros(1, 5).long(), (2, 3))
    assert calls == {attention_call(model, CPU)}
    assert next(iter(calls)).dropout == (0.2 if training else 0.0)
    caplog.set_level("INFO", "pocl_ds")
    log_kernel(model, CPU)
    assert caplog.messages[-1] == (
        f"attention of the {family} on packed rows: scaled_dot_product_attention for each sample "
        "(the fastest on CPUs)"
    )


@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
    window=st.none() | st.integers(1, 16),
)
def test_blocks_of_a_mask_are_those_of_the_dense_mask(
    lengths: tuple[int, ...], window: int | None
) -> None:
    block, original = 4, packed_samples.BLOCK
    packed_samples.BLOCK = block
    try:
        partial, full = visible_blocks(first_visible_keys(lengths, window))
    finally:
        packed_samples.BLOCK = original
    dense = visible_keys(lengths, window).numpy()
    starts = range(0, len(dense), block)
    tiles = [[dense[q : q + block, k : k + block] for k in starts] for q in starts]
    some = np.array([[tile.any() for tile in row] for row in tiles])
    every = np.array([[tile.all() for tile in row] for row in tiles])
    np.testing.assert_array_equal(partial | full, some)
    assert not (partial & full).any()
    # A complete block that contains the diagonal of one token may count as partial.
    off_diagonal = ~np.eye(len(tiles), dtype=bool)
    np.testing.assert_array_equal(full & off_diagonal, every & off_diagonal)


@pytest.mark.parametrize(
    "settings",
    [
        ScoreSettings(),
        ScoreSettings(soft_cap=0.7, window=50, scale=0.4),
        ScoreSettings(soft_cap=0.7, window=500),
    ],
    ids=str,
)
def test_flex_attention_separates_samples(
    settings: ScoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compilation, whose kernels for CPUs lack score functions of several lengths."""
    monkeypatch.setattr(attention_kernels, "_compiled_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    )
    sides = random_sides(sum(LENGTHS), 4, 2, 16)
    samples = PackedSamples(LENGTHS, CPU)
    output = PACKED_KERNELS[FLEX](*sides, samples, settings)
    expected = reference_attention(*sides, LENGTHS, settings)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_failed_compilation_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise torch._dynamo.exc.TorchDynamoException("no C compiler.\nmore")

    monkeypatch.setattr(attention_kernels, "_compiled_flex_attention", lambda: fail)
    sides = random_sides(sum(LENGTHS), 4, 2, 16)
    with pytest.raises(
        ModelError, match=r"FlexAttention cannot be compiled .*\(no C compiler\): set .*=eager$"
    ):
        PACKED_KERNELS[FLEX](*sides, PackedSamples(LENGTHS, CPU), ScoreSettings())


def variable_length_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    settings: ScoreSettings,
    window: tuple[int, int],
) -> Tensor:
    """What the documentation of the kernels says: [T, H, d] of such sides, the samples between the
    entries of cu_seqlens, and `window[0]` tokens before a token.
    """
    assert cu_seqlens.dtype == torch.int32
    pieces = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        sides = [side[start:stop].transpose(0, 1)[None] for side in (query, key, value)]
        before = None if window[0] < 0 else window[0] + 1
        own = ScoreSettings(settings.scale, settings.soft_cap, before)
        pieces.append(reference_attention(*sides, (stop - start,), own)[0])
    assert window[1] == 0
    return torch.cat(pieces)


@pytest.mark.parametrize("window", [None, 3, 100, 204])
@pytest.mark.parametrize("kernel", [TORCH_VARLEN, FLASH_ATTN])
def test_arguments_of_kernels_of_variable_length(
    kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves need a GPU; tests/gpu runs them."""

    def varlen_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert (cu_q is cu_k, max_q, max_k, enable_gqa) == (True, 204, 204, True)
        settings = ScoreSettings(scale)
        return variable_length_attention(q, k, v, cu_q, settings, window_size)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert (cu_q is cu_k, max_q, max_k, causal, dropout_p) == (True, 204, 204, True, 0.0)
        settings = ScoreSettings(softmax_scale, softcap or None)
        return variable_length_attention(q, k, v, cu_q, settings, window_size)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    attention_kernels._varlen_names_groups.cache_clear()
    cap = 0.7 if kernel == FLASH_ATTN else None
    sides, settings = random_sides(340, 4, 2, 8), ScoreSettings(0.3, cap, window)
    output = PACKED_KERNELS[kernel](*sides, PackedSamples(LENGTHS, CPU), settings)
    torch.testing.assert_close(output, reference_attention(*sides, LENGTHS, settings))
