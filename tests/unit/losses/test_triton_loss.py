"""The loss kernel: its values in Triton's interpreter, its compilation, and when it is chosen."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pocl_ds.bench import kernels
from pocl_ds.config.registry import LOSSES
from pocl_ds.errors import RecipeError
from pocl_ds.losses import triton_loss
from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.fused_inputs import chunk_sizes
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.losses.triton_loss import kernel_form, kernel_obstacle, padded_size
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap

TESTS = Path(__file__).with_name("interpreted_kernel.py")


def test_the_kernel_in_the_interpreter() -> None:
    """In its own process, because Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "--tb=short", str(TESTS)]
    process = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"],
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]


def test_it_compiles_without_a_gpu() -> None:
    """A loss that reads its logits three times, without and with values for each token, and the
    signals of token rules, for an H100, without registers in memory.
    """
    pytest.importorskip("triton")
    lines: list[str] = []
    rows = kernels.run(["90"], lines.append, names=["jsd"])
    expected = [(name, 90, 0) for name in ("jsd", "jsd by token", "signals")]
    assert [(row.name, row.target, row.spill_bytes) for row in rows] == expected
    assert all(32 <= row.registers <= 128 and row.is_vectorized for row in rows)
    assert rows[0].rounds_to_nearest and rows[1].rounds_to_nearest
    assert any(line.split()[:2] == ["jsd", "sm_90"] for line in lines)
    with pytest.raises(RecipeError, match="not a number of"):
        kernels.run(["sm_90"], lines.append)


def test_every_closed_form_has_a_kernel() -> None:
    with_kernel = {name for name, options in LOSSES.items() if kernel_form(name, options)}
    assert with_kernel == {*CLOSED_FORMS, "sft", "alm"}
    assert kernel_form("jsd", {"beta": 1.0}) == kernel_form("rkl", {})


@pytest.mark.parametrize(
    ("name", "dtype", "teacher_head", "reason"),
    [
        ("fkl", torch.bfloat16, "plain", None),
        ("sft", torch.float32, None, None),
        ("akl", torch.bfloat16, "plain", "akl has no kernel"),
        ("fkl", torch.float64, "plain", "float64"),
        ("fkl", torch.bfloat16, "ensemble", "HeadMixture"),
        ("fkl", torch.bfloat16, "records", "TopKCodec"),
    ],
)
def test_what_runs_in_the_kernel_on_a_gpu(
    name: str,
    dtype: torch.dtype,
    teacher_head: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_loss, "launch_obstacle", lambda device: None)
    head = OutputHead(nn.Parameter(torch.zeros(4, 2)), None, 1.0, None)
    heads: dict[str | None, Any] = {
        "plain": head,
        "ensemble": HeadMixture((head, head), (0.5, 0.5)),
        "records": TopKCodec(2, 4, (1.0,)),
    }
    hidden = OnGPU(dtype)
    obstacle = kernel_obstacle(name, LOSSES[name], hidden, heads.get(teacher_head))  # type: ignore[arg-type]
    assert obstacle is None if reason is None else reason in str(obstacle)


class OnGPU:
    """What the choice reads of hidden states on a GPU, which is not there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", 0)


def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    triton_loss.log_implementation.cache_clear()
    head = OutputHead(nn.Parameter(torch.zeros(9, 2)), None, 1.0, None)
    with caplog.at_level(logging.INFO, "pocl_ds"):
        for _ in range(2):
            loss_sums(
                torch.zeros(3, 2),
                head,
                torch.zeros(3, dtype=torch.int64),
                LossTerms("sft"),
                vocab=VocabMap(9),
            )
    assert caplog.messages == ["The loss sft runs in eager PyTorch: the device is cpu."]


@pytest.mark.parametrize("size", [1000, 50_257])
def test_a_chunk_for_the_kernel_fills_the_budget_with_logits(size: int) -> None:
    budget, row = 64 << 20, 2 * 2 * padded_size(size)
    arguments = ("fkl", size, budget, torch.bfloat16, torch.device("cuda"), 1)
    sizes = chunk_sizes(*arguments, True)
    assert sizes.chunk == sizes.block and budget - row < sizes.chunk * row <= budget
    assert sizes.chunk > chunk_sizes(*arguments, False).chunk
    with pytest.raises(RecipeError, match="do not hold one token"):
        chunk_sizes("fkl", size, row - 1, torch.bfloat16, torch.device("cuda"), 1, True)


def test_a_machine_whose_triton_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no device is there to launch on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_loss.launch_obstacle.cache_clear()
    obstacle = triton_loss.launch_obstacle(torch.device("cuda", 0))
    triton_loss.launch_obstacle.cache_clear()
    assert obstacle is not None and obstacle.startswith("Triton does not run here (")
