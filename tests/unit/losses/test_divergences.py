"""Divergences against independent float64 forms, finite differences and the properties that define
them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds import losses
from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES, LOSSES
from pocl_ds.errors import RecipeError
from pocl_ds.losses.divergences import DIVERGENCES

NAMES = list(DIVERGENCES)


def divergence(name: str, z_p: torch.Tensor, z_q: torch.Tensor, **settings: Any) -> torch.Tensor:
    """One value per token, teacher first as in KL(p || q)."""
    return losses.divergence(name, z_q, z_p, reduction="none", **settings)


def softmax(z: np.ndarray, tau: float) -> np.ndarray:
    e = np.exp((z - z.max()) / tau)
    return e / e.sum()


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0))


def alpha_beta(p: np.ndarray, q: np.ndarray, a: float, b: float) -> float:
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return float(-terms.sum() / (a * b))


def by_hand(name: str, p: np.ndarray, q: np.ndarray) -> float:
    """The formulas of docs/method.md, eq. 11 to 18, id by id, with the default options."""
    if name == "fkl":
        return kl(p, q)
    if name == "rkl":
        return kl(q, p)
    if name == "jsd":
        m = 0.5 * p + 0.5 * q
        return 0.5 * kl(p, m) + 0.5 * kl(q, m)
    if name == "tvd":
        return 0.5 * float(np.abs(p - q).sum())
    if name == "skl":
        return kl(p, 0.1 * p + 0.9 * q)
    if name == "srkl":
        return kl(q, 0.9 * p + 0.1 * q)
    if name == "akl":
        head, total = set(), 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            total += p[i]
            if head and total > 0.5:
                break
            head.add(i)
        gap = np.abs(p - q)
        share = sum(gap[i] for i in head) / gap.sum()
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if name == "ab":
        return alpha_beta(p, q, 0.2, 0.7)
    raise AssertionError(f"{name} is not written out: add its formula here")


def test_every_loss_of_the_recipe_has_its_function() -> None:
    assert set(DIVERGENCES) == set(LOSSES) - {"sft", *CROSS_TOKENIZER_LOSSES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau", [0.6, 1.0, 1.7])
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(3, 40), spread=st.floats(0.1, 6))
@settings(max_examples=25, deadline=None)
def test_values_equal_the_formula(
    name: str, tau: float, seed: int, size: int, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    z_p, z_q = generator.normal(0, spread, size), generator.normal(0, spread, size)
    expected = by_hand(name, softmax(z_p, tau), softmax(z_q, tau)) * tau**2
    value = divergence(
        name, torch.from_numpy(z_p)[None], torch.from_numpy(z_q)[None], temperature=tau
    )
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "sft"])
def test_every_token_has_its_own_value(name: str) -> None:
    z_p, z_q = torch.randn(2, 6, 25, dtype=torch.float64)
    separate = [divergence(name, z_p[i : i + 1], z_q[i : i + 1], temperature=1.3) for i in range(6)]
    assert torch.allclose(
        divergence(name, z_p, z_q, temperature=1.3), torch.cat(separate), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (-0.3, 0.8), (1.5, -0.5), (0.5, 0.5)])
def test_alpha_and_beta_may_have_any_sign(a: float, b: float) -> None:
    z_p, z_q = np.random.default_rng(0).normal(0, 2, (2, 12))
    value = divergence(
        "ab", torch.from_numpy(z_p)[None], torch.from_numpy(z_q)[None], ab_alpha=a, ab_beta=b
    )
    assert value.item() == pytest.approx(
        alpha_beta(softmax(z_p, 1.0), softmax(z_q, 1.0), a, b), rel=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_temperature_is_one_by_default_and_its_square_can_be_turned_off(name: str) -> None:
    z_p, z_q = torch.randn(2, 6, 25, dtype=torch.float64)
    assert torch.equal(divergence(name, z_p, z_q), divergence(name, z_p, z_q, temperature=1.0))
    bare = divergence(name, z_p, z_q, temperature=1.7, scale_by_temperature_squared=False)
    assert torch.allclose(1.7**2 * bare, divergence(name, z_p, z_q, temperature=1.7))


@pytest.mark.parametrize(
    ("kind", "working"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_sft_does_not_use_the_teacher(kind: torch.dtype, working: torch.dtype) -> None:
    value = divergence("sft", torch.empty(5, 0), torch.randn(5, 20).to(kind))
    assert value.tolist() == [0.0] * 5 and value.dtype == working


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tvd", "akl")])
def test_gradients_equal_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    z_p, z_q = (
        torch.randn(4, 7, dtype=torch.float64),
        torch.randn(4, 7, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda z: divergence(name, z_p, z, temperature=1.3), (z_q,))


@pytest.mark.parametrize("name", NAMES)
def test_zero_for_equal_distributions_and_never_negative(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(64, 50)
    assert divergence(name, z, z).abs().max() < 1e-5
    assert divergence(name, z.double(), z.double()).abs().max() < 1e-13
    assert divergence(name, z, z + 0.001 * torch.randn_like(z)).min() >= 0


@pytest.mark.parametrize("name", NAMES)
def test_shift_of_logits_changes_nothing(name: str) -> None:
    z_p, z_q = torch.randn(2, 8, 30, dtype=torch.float64)
    shifted = divergence(name, z_p + 5, z_q - 3)
    assert torch.allclose(shifted, divergence(name, z_p, z_q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_huge_logits_and_a_large_vocabulary_stay_finite(name: str, kind: torch.dtype) -> None:
    z_p = torch.zeros(2, 152_064, dtype=kind)
    z_q = torch.zeros(2, 152_064, dtype=kind)
    z_p[:, 0], z_q[:, 1], z_p[0, 5] = 1e4, 1e4, -1e4
    z_q.requires_grad_()
    value = divergence(name, z_p, z_q, temperature=2.0)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert value.isfinite().all() and z_q.grad is not None and z_q.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_ids_masked_on_both_sides_add_exactly_nothing(name: str) -> None:
    z_p, z_q = torch.randn(5, 20), torch.randn(5, 20)
    wide_p, wide_q = (torch.cat([z, torch.full((5, 3), -math.inf)], 1) for z in (z_p, z_q))
    z_q.requires_grad_()
    wide_q.requires_grad_()
    narrow, wide = (
        divergence(name, z_p, z_q, temperature=1.5),
        divergence(name, wide_p, wide_q, temperature=1.5),
    )
    narrow.sum().backward()
    wide.sum().backward()
    assert torch.allclose(narrow, wide, rtol=1e-6, atol=1e-7)
    assert z_q.grad is not None and wide_q.grad is not None
    assert torch.allclose(z_q.grad, wide_q.grad[:, :20], rtol=1e-5, atol=1e-7)
    assert (wide_q.grad[:, 20:] == 0).all()


def test_limits_of_options_equal_other_divergences() -> None:
    z_p, z_q = torch.randn(2, 6, 25, dtype=torch.float64)
    value = lambda name, **options: divergence(name, z_p, z_q, **options)  # noqa: E731
    assert torch.equal(value("jsd", beta=0.0), value("fkl"))
    assert torch.equal(value("jsd", beta=1.0), value("rkl"))
    assert torch.allclose(value("jsd", beta=1e-7) / 1e-7, value("fkl"), rtol=1e-4)
    assert torch.equal(value("skl", skew=0.0), value("fkl"))
    assert torch.equal(value("srkl", skew=0.0), value("rkl"))
    assert (
        not value("skl", skew=1.0).any() and not value("srkl", skew=1.0).any()
    )  # either side against itself
    assert torch.allclose(value("ab", ab_alpha=1.0, ab_beta=0.0), value("fkl"), atol=1e-12)
    assert torch.allclose(value("ab", ab_alpha=0.0, ab_beta=1.0), value("rkl"), atol=1e-12)
    for corner, near in (
        ((0.5, 0.0), (0.5, 1e-6)),
        ((0.0, 0.5), (1e-6, 0.5)),
        ((0.0, 0.0), (1e-5, 1e-5)),
        ((0.4, -0.4), (0.4, -0.4 + 1e-6)),
        ((-0.4, 0.4), (-0.4, 0.4 + 1e-6)),
    ):
        exact = value("ab", ab_alpha=corner[0], ab_beta=corner[1])
        assert torch.allclose(exact, value("ab", ab_alpha=near[0], ab_beta=near[1]), rtol=1e-3)


def test_the_mixture_carries_gradient_unless_detached() -> None:
    z_p, z_q = torch.randn(2, 3, 9, dtype=torch.float64)
    gradients = []
    for detach in (False, True):
        leaf = z_q.clone().requires_grad_()
        divergence("srkl", z_p, leaf, detach_mixture=detach).sum().backward()
        gradients.append(leaf.grad)
    assert not torch.allclose(*gradients)


def test_unknown_names_and_values_are_named() -> None:
    z = torch.zeros(1, 3)
    with pytest.raises(RecipeError, match=r"fkx.*choose one of fkl"):
        divergence("fkx", z, z)
    with pytest.raises(RecipeError, match=r"skl has no option 'skw': it has skew"):
        divergence("skl", z, z, skw=1)
    for name in CROSS_TOKENIZER_LOSSES:
        with pytest.raises(RecipeError, match=f"{name} compares texts, not ids"):
            divergence(name, z, z)
    for name, option in (("jsd", "beta"), ("skl", "skew"), ("srkl", "skew"), ("akl", "mu")):
        for value in (-0.1, 1.5):
            with pytest.raises(
                RecipeError, match=f"{name}: {option}={value} must be between 0 and 1"
            ):
                divergence(name, z, z, **{option: value})
    with pytest.raises(RecipeError, match="greater than 0"):
        divergence("fkl", z, z, temperature=0)
