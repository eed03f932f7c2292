"""A micro-batch of distillation in bfloat16, from token ids to the gradient of every weight: packed
rows, this package's attention and fused loss against transformers' own attention and full logits.

The dry run of launch/gpu.sh runs these on a CPU (POCL_GPU_TESTS_ON_CPU).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

from pocl_ds.data.batches import collate
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.losses import divergence
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.teacher import OnlineTeacher
from pocl_ds.training.student import Student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and "POCL_GPU_TESTS_ON_CPU" not in os.environ,
        reason="needs a CUDA device, and none is visible",
    ),
]
LENGTHS = ((5, 40), (1, 3), (17, 90), (2, 64), (30, 31))  # prompt tokens and all tokens
TEMPERATURE, SFT_RATIO = 1.5, 0.3
# Rounding differs by the order of sums, so two correct forms differ by chance.
MARGIN = 1.25


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma2"])
@pytest.mark.parametrize("loss", ["fkl", "srkl"])
def test_gradients_are_as_near_to_float64_as_those_of_full_logits(
    family: str, loss: str, tmp_path: Path
) -> None:
    """The families differ: tied and untied heads, biases, windows, caps of scores and logits."""
    paths = [
        tiny_models.family(tmp_path / name, family, layers=2, seed=seed)
        for seed, name in enumerate(("student", "teacher"))
    ]
    source = np.random.default_rng(0)
    samples = [source.integers(2, 300, total).tolist() for _, total in LENGTHS]
    exact = full_logits(paths, samples, loss, torch.float64)
    plain = full_logits(paths, samples, loss, torch.bfloat16)
    fused = packed(paths, samples, loss, tmp_path)
    assert fused.keys() == plain.keys() == exact.keys()

    def error(gradients: dict[str, Tensor]) -> float:
        """Relative to the gradient of all weights together."""
        squares = sum((gradients[name] - exact[name]).square().sum() for name in exact)
        return float((squares / sum(value.square().sum() for value in exact.values())).sqrt())

    assert error(fused) <= MARGIN * error(plain)
    assert error(plain) < 0.1  # else the bound says nothing


def full_logits(
    paths: list[Path], samples: list[list[int]], loss: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradients of the loss sum by the definition, one sample at a time."""
    device, name = distributed.device(), str(dtype).removeprefix("torch.")
    student, teacher = (
        load_model(str(path), dtype=name, attention="eager", dropout=0.0).to(device)
        for path in paths
    )
    for (prompt, _), sample in zip(LENGTHS, samples, strict=True):
        ids = torch.tensor([sample], device=device)
        q = student(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
        with torch.no_grad():
            p = teacher(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
        ce = torch.nn.functional.cross_entropy(q, ids[0, prompt:], reduction="sum")
        kd = divergence(loss, q, p, temperature=TEMPERATURE, reduction="sum")
        (SFT_RATIO * ce + (1 - SFT_RATIO) * kd).backward()
    return gradients(student)


def packed(
    paths: list[Path], samples: list[list[int]], loss: str, folder: Path
) -> dict[str, Tensor]:
    """The same gradients as training computes them, in bfloat16."""
    device = distributed.device()
    names = [str(number) for number in range(len(samples))]
    save_split(folder, "train", names, samples, [prompt for prompt, _ in LENGTHS])
    split = TokenizedSplit.open(folder, "train")
    batch = collate(split, np.arange(len(samples)), packed=True).to(device)
    models: list[Any] = [
        load_model(str(path), dtype="bfloat16", attention="per_sample", dropout=0.0).to(device)
        for path in paths
    ]
    rows = models[0].config.vocab_size
    vocab = VocabMap(rows)
    student = Student(models[0], vocab.to(device), chunk_bytes=64 * 8 * rows).train()
    teacher = OnlineTeacher(models[1], None, vocab)
    terms = LossTerms(loss, TEMPERATURE, SFT_RATIO)
    with teacher.head() as head:
        total, *_ = student(batch, terms, teacher.outputs(batch), head)
    total.backward()
    return gradients(models[0])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.double() for name, weight in model.named_parameters()}
