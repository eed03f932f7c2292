"""The attention kernels of packed rows on a GPU, beside attention written out with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import FAMILIES, make_model
from packed_attention import random_sides, reference_attention

from pocl_ds.models import attention
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.attention_choice import (
    FLASH_ATTN,
    FLEX,
    PADDED,
    TORCH_VARLEN,
    AttentionCall,
    choose_kernel,
    missing_kernels,
)
from pocl_ds.models.attention_kernels import PACKED_KERNELS, ScoreSettings
from pocl_ds.models.heads import hidden_states
from pocl_ds.models.packed_samples import PackedSamples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"
    ),
]
BF16, FLOAT32 = torch.bfloat16, torch.float32
LENGTHS = (1, 700, 129, 64, 2)
# Largest error relative to the largest value, by dtype: a few units in the last place.
TOLERANCE = {BF16: 2e-2, FLOAT32: 2e-4}


def errors(
    kernel: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    lengths: tuple[int, ...],
    settings: ScoreSettings,
) -> dict[str, float]:
    """Errors of the output and of the gradients against float64, relative to the largest value."""
    sides = [
        side.to("cuda", dtype).detach().requires_grad_(True)
        for side in random_sides(sum(lengths), *heads)
    ]
    samples = PackedSamples(lengths, torch.device("cuda"))
    output = PACKED_KERNELS[kernel](*sides, samples, settings)
    exact_sides = [side.detach().double().requires_grad_(True) for side in sides]
    exact = reference_attention(*exact_sides, lengths, settings)
    assert output.shape == exact.shape
    weight = torch.randn(exact.shape, device="cuda", dtype=torch.float64).to(dtype)
    output.backward(weight)
    exact.backward(weight.double())
    pairs = {"output": (output, exact)} | {
        f"gradient of {name}": (side.grad, exact_side.grad)
        for name, side, exact_side in zip(
            ("queries", "keys", "values"), sides, exact_sides, strict=True
        )
    }
    return {
        name: float((value.double() - other).abs().max() / other.abs().max())
        for name, (value, other) in pairs.items()
    }


# Kernel, dtype, (heads, key and value heads, width), lengths, settings
CASES: list[tuple[str, torch.dtype, tuple[int, int, int], tuple[int, ...], ScoreSettings]] = [
    (TORCH_VARLEN, BF16, (8, 2, 64), LENGTHS, ScoreSettings()),
    (TORCH_VARLEN, BF16, (4, 4, 80), LENGTHS, ScoreSettings(window=50)),
    (TORCH_VARLEN, torch.float16, (8, 2, 128), LENGTHS, ScoreSettings(scale=0.2, window=128)),
    (TORCH_VARLEN, BF16, (4, 1, 256), LENGTHS, ScoreSettings()),
    (TORCH_VARLEN, BF16, (4, 2, 64), (1500,), ScoreSettings(window=4096)),
    (FLASH_ATTN, BF16, (8, 2, 64), LENGTHS, ScoreSettings(soft_cap=2.0)),
    (FLASH_ATTN, BF16, (4, 2, 256), LENGTHS, ScoreSettings(soft_cap=2.0, window=50)),
    (FLASH_ATTN, BF16, (4, 4, 80), LENGTHS, ScoreSettings()),
    (FLEX, BF16, (8, 2, 64), LENGTHS, ScoreSettings(soft_cap=2.0)),
    (FLEX, BF16, (4, 2, 256), LENGTHS, ScoreSettings(soft_cap=2.0, window=50)),
    (FLEX, BF16, (4, 4, 80), LENGTHS, ScoreSettings(soft_cap=2.0)),
    (FLEX, FLOAT32, (8, 2, 64), LENGTHS, ScoreSettings(window=128)),
    (FLEX, FLOAT32, (8, 2, 128), LENGTHS, ScoreSettings()),
    (FLEX, FLOAT32, (4, 2, 256), LENGTHS, ScoreSettings(soft_cap=2.0)),
]


@pytest.mark.parametrize(
    ("kernel", "dtype", "heads", "lengths", "settings"),
    CASES,
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_kernel_equals_attention_in_float64(
    kernel: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    lengths: tuple[int, ...],
    settings: ScoreSettings,
) -> None:
    if kernel in missing_kernels():
        pytest.skip(f"{kernel} {missing_kernels()[kernel]}")
    call = AttentionCall("cuda", dtype, heads[2], settings.soft_cap)
    others = dict.fromkeys(set(PACKED_KERNELS) - {kernel}, "is not tested here")
    assert choose_kernel(call, others).name == kernel
    differences = errors(kernel, dtype, heads, lengths, settings)
    limit = TOLERANCE.get(dtype, TOLERANCE[BF16])
    assert max(differences.values()) <= limit, differences


def test_flex_attention_does_not_compile_again_for_other_lengths() -> None:
    if FLEX in missing_kernels():
        pytest.skip(f"{FLEX} {missing_kernels()[FLEX]}")
    counters = torch._dynamo.utils.counters["stats"]
    settings, compiled = ScoreSettings(soft_cap=2.0), []
    for lengths in ((300, 200), (3, 700, 129), (500, 1, 400, 77, 300), (900,)):
        errors(FLEX, BF16, (8, 2, 64), lengths, settings)
        compiled.append(counters["unique_graphs"])
    assert compiled[1:] == compiled[1:2] * 3


@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
@pytest.mark.parametrize(
    ("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_families_equal_their_own_attention(
    family: str, extra: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of a packed row and their gradients: the chosen kernel, and samples padded in
    each layer, against eager attention with masks in float32.
    """
    width = {} if family == "gpt2" else {"hidden_size": 256, "head_dim": 64}
    width |= {"n_embd": 256} if family == "gpt2" else {}
    width |= {"word_embed_proj_dim": 256} if family == "opt" else {}
    extra = {**extra, **width, "initializer_range": 0.05}
    if family in ("mistral", "phi3", "gemma2", "cohere2"):
        extra["sliding_window"] = 4
    if family == "gemma2":
        extra["attn_logit_softcapping"] = 1.5
    model = make_model(family, extra).cuda()
    lengths = (9, 1, 16, 7)
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(1)).cuda()
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long().cuda()
    row = ids[mask.bool()][None]
    places = torch.cat([torch.arange(length) for length in lengths])[None].cuda()

    def run(*inputs: Any, select: Any) -> list[torch.Tensor]:
        model.zero_grad()
        states = hidden_states(model, *inputs)[select]
        states.float().square().mean().backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        return [states.detach().float(), torch.cat([g.flatten() for g in gradients])]

    model.set_attn_implementation("eager")
    expected = run(ids, mask, select=mask.bool())
    model.to(dtype).set_attn_implementation(PER_SAMPLE)
    chosen, used = attention.kernel_for, []
    for force in (None, PADDED):
        monkeypatch.setattr(
            attention,
            "kernel_for",
            lambda call, f=force: used.append(f or chosen(call)) or used[-1],
        )
        results = run(row, None, places, lengths, select=0)
        for value, reference in zip(results, expected, strict=True):
            error = float((value - reference).norm() / reference.norm())
            assert error < (0.1 if dtype == BF16 else 1e-3), (used[-1], error)
    if dtype == BF16 and not missing_kernels().keys() >= set(PACKED_KERNELS):
        assert used[0] in PACKED_KERNELS
