"""The loss kernel on a GPU: equal to the eager form, the same bits twice, no extra memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocl_ds.losses import fused_head
from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.losses.triton_loss import launch_obstacle
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"
    ),
]
SIZE, TOKENS, WIDTH = 50_257, 300, 64


def losses_and_gradients(
    name: str,
    dtype: torch.dtype,
    chunk_bytes: int = 64 << 20,
    rule: TokenRule | None = None,
) -> list[Tensor]:
    """Sums and gradients of hidden states, weight and bias, with masked ids and a soft cap; with a
    token rule also weights of three samples.
    """
    source = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=source, device="cuda").to(dtype)  # noqa: E731
    hidden, teacher_hidden = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, WIDTH)
    weight, bias = nn.Parameter(draw(SIZE + 3, WIDTH) / 4), nn.Parameter(draw(SIZE + 3))
    teacher_weight = nn.Parameter(draw(SIZE + 3, WIDTH) / 4)
    masked = torch.arange(SIZE, device="cuda") % 11 == 5
    labels = torch.randint(0, SIZE // 11, (TOKENS,), generator=source, device="cuda") * 11
    sums = loss_sums(
        hidden,
        OutputHead(weight, bias, 0.7, 30.0),
        labels,
        LossTerms(name, 1.7, 0.3, token_rule=rule),
        vocab=VocabMap(SIZE, masked),
        sample_of_token=torch.arange(TOKENS, device="cuda") // 100,
        sample_weights=torch.tensor([0.5, 2.0, 0.0]) if rule else None,
        teacher_hidden=teacher_hidden,
        teacher_head=OutputHead(teacher_weight, None, 1.0, None),
        chunk_bytes=chunk_bytes,
    )
    return [*sums, *torch.autograd.grad(sums[0], [hidden, weight, bias])]


def test_triton_launches() -> None:
    assert launch_obstacle(torch.device("cuda", torch.cuda.current_device())) is None


@pytest.mark.parametrize("name", ["sft", *CLOSED_FORMS])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"]
)
def test_the_kernel_equals_the_eager_form(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual, again = (losses_and_gradients(name, dtype) for _ in range(2))
    monkeypatch.setattr(fused_head, "kernel_obstacle", lambda *_: "the test compares")
    expected = losses_and_gradients(name, dtype)
    for kernel, repeated, eager in zip(actual, again, expected, strict=True):
        assert torch.equal(kernel, repeated)
        assert (kernel - eager).double().norm() <= tolerance * eager.double().norm() + 1e-6


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(
    "rule", [("adakd", {"center": 0.4}), ("entropy_weight", {}), ("position_decay", {})]
)
def test_the_kernel_equals_the_eager_form_with_a_token_rule(
    name: str, rule: tuple[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_rule = TokenRule.of(*rule)
    actual, again = (losses_and_gradients(name, torch.float32, rule=token_rule) for _ in range(2))
    monkeypatch.setattr(fused_head, "kernel_obstacle", lambda *_: "the test compares")
    expected = losses_and_gradients(name, torch.float32, rule=token_rule)
    for kernel, repeated, eager in zip(actual, again, expected, strict=True):
        assert torch.equal(kernel, repeated)
        assert (kernel - eager).double().norm() <= 1e-4 * eager.double().norm() + 1e-6


def test_the_kernel_allocates_nothing_beside_chunk_and_gradients() -> None:
    def peak(chunk_bytes: int) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept: Any = losses_and_gradients("jsd", torch.bfloat16, chunk_bytes)
        del kept
        return torch.cuda.max_memory_allocated() - before

    losses_and_gradients("jsd", torch.bfloat16)
    small, large = (peak(budget) for budget in (8 << 20, 40 << 20))
    assert large - small <= (32 << 20) * 1.1
