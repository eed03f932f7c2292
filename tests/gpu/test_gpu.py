"""Checks that need a GPU: accuracy in bfloat16, limits of time and memory, vLLM's sleep mode, and
conversion of checkpoints.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from command_line import ROOT, environment, pocl
from tiny_runs import records, write_recipe

from pocl_ds.bench import loss as bench_loss
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.generation.weight_buckets import WeightTransfer
from pocl_ds.losses import divergence
from pocl_ds.losses.divergences import DIVERGENCES
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"
    ),
]


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_the_fused_head_in_bfloat16_is_nearer_to_float64_than_the_plain_form(name: str) -> None:
    source = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = (
        torch.randn(300, 64, generator=source, dtype=torch.float64) for _ in range(2)
    )
    weight, teacher_weight = (
        torch.randn(5000, 64, generator=source, dtype=torch.float64) / 8 for _ in range(2)
    )
    labels = torch.randint(0, 5000, (300,), generator=source)
    gradients = {}
    for kind in (torch.float64, torch.bfloat16):
        leaf = torch.nn.Parameter(weight.to("cuda", kind))
        q, p = (
            hidden.to("cuda", kind) @ leaf.T,
            teacher_hidden.to("cuda", kind) @ teacher_weight.to("cuda", kind).T,
        )
        ce = torch.nn.functional.cross_entropy(q, labels.cuda(), reduction="sum")
        (0.3 * ce + 0.7 * divergence(name, q, p, temperature=1.5, reduction="sum")).backward()
        gradients[kind] = leaf.grad.double()
    leaf = torch.nn.Parameter(weight.to("cuda", torch.bfloat16))
    heads = (
        OutputHead(leaf, None, 1.0, None),
        OutputHead(torch.nn.Parameter(teacher_weight.to("cuda", torch.bfloat16)), None, 1.0, None),
    )
    total, *_ = loss_sums(
        hidden.to("cuda", torch.bfloat16),
        heads[0],
        labels.cuda(),
        LossTerms(name, 1.5, 0.3),
        vocab=VocabMap(5000),
        teacher_hidden=teacher_hidden.to("cuda", torch.bfloat16),
        teacher_head=heads[1],
        chunk_bytes=4 << 20,
    )
    total.backward()
    exact = gradients[torch.float64]
    assert (leaf.grad.double() - exact).norm() <= (gradients[torch.bfloat16] - exact).norm() * 1.02


def test_time_and_memory_of_the_fused_head() -> None:
    """8192 tokens x 128,256 ids x 4096 take at most 60 ms and 11 GB on an H100, the figures of
    Liger's chunked loss.
    """
    if "H100" not in torch.cuda.get_device_name() and "H200" not in torch.cuda.get_device_name():
        pytest.skip(f"the limits are those of an H100, this is {torch.cuda.get_device_name()}")
    (table,) = bench_loss.run([8192, 128_256, 4096], print, rounds=5)
    assert table[0].extra_mib < 11 * 1000
    assert statistics.median(table[0].seconds) < 0.060


@pytest.mark.parametrize("weight_transfer", ["file", "cuda_ipc"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_rollout_engine_frees_its_memory_between_rollouts(
    level: int, weight_transfer: WeightTransfer, tiny_llama: Path
) -> None:
    """It also generates with its earlier weights (level 1) or with new ones (both levels), which
    arrive through a file or by CUDA IPC handles.
    """
    pytest.importorskip("vllm")
    config = GenerationConfig(gpu_memory_utilization=0.3, max_num_seqs=8)
    generator = SubprocessGenerator(
        str(tiny_llama),
        config,
        max_length=128,
        threads=4,
        device="0",
        sleep_level=level,
        weight_transfer=weight_transfer,
    )
    try:
        assert generator.sleep_level == level
        weights = {
            name: value.detach().cuda()
            for name, value in load_model(str(tiny_llama)).named_parameters()
        }
        sequence, free_before = list(range(2, 60)), torch.cuda.mem_get_info()[0]
        generator.load_weights(weights.items())
        log_probs = generator.log_probs([sequence], [5])[0]
        responses = generator.generate_ids([[5, 6, 7]], SamplingParams(0.0, 1.0, 8, seed=0))
        generator.sleep()
        freed = torch.cuda.mem_get_info()[0] - free_before
        assert freed > 0.2 * torch.cuda.mem_get_info()[1]
        if level == 1:
            np.testing.assert_allclose(
                generator.log_probs([sequence], [5])[0], log_probs, atol=1e-3
            )
            generator.generate_ids([[5, 6, 7]], SamplingParams(0.0, 1.0, 8, seed=0))
            generator.sleep()
        generator.load_weights((name, value * 1.5) for name, value in weights.items())
        assert np.abs(generator.log_probs([sequence], [5])[0] - log_probs).max() > 1e-2
        generator.load_weights(weights.items())
        np.testing.assert_allclose(generator.log_probs([sequence], [5])[0], log_probs, atol=1e-3)
        assert generator.generate_ids([[5, 6, 7]], SamplingParams(0.0, 1.0, 8, seed=0)) == responses
    finally:
        generator.close()


@pytest.mark.parametrize("loss", ["fkl", "alm"])
def test_buffers_of_a_sharded_model_are_on_its_gpu(loss: str, tmp_path: Path) -> None:
    """The mask of ids without a token, and the spans of a batch with ALM: DeepSpeed does not move
    them.
    """
    teacher = tiny_models.llama(tmp_path / "teacher", tied=False, seed=1, rows=400)
    student = tiny_models.llama(tmp_path / "student", rows=384)
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=32,
        teacher={"dtype": "bfloat16"},
        student={"dtype": "bfloat16"},
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 1, "epochs_per_stage": 1},
        loss={"name": loss},
        launch={"ranks": 1},
    )
    run = tmp_path / "run"
    for step in ("preprocess", "init-student", "rank", "plan", "train"):
        log = pocl(step, str(recipe), "--run-dir", str(run)).stderr
    assert loss == "alm" or "without a token on both sides masked" in log
    losses = [record["loss"] for record in records(run)]
    assert len(losses) == 4 and all(np.isfinite(losses))


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        ([], ["by CUDA IPC handles", "sleeps between rollouts and drops its weights"]),
        (
            ["policy.sync_weights_every=2"],
            ["by CUDA IPC handles", "with its weights in host memory"],
        ),
        (["policy.staleness=1"], ["by CUDA IPC handles", "while the step before trains"]),
        (["policy.weight_transfer=file"], ["through a file in shared memory"]),
    ],
)
def test_a_training_on_the_students_responses(
    overrides: list[str], notes: list[str], tmp_path: Path
) -> None:
    """Its log-probabilities in vLLM equal the trainer's after each transfer, and after vLLM slept
    with its weights: otherwise the training stops.
    """
    pytest.importorskip("vllm")
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=32,
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 1, "epochs_per_stage": 1, "sft_ratio": [0, 0]},
        policy={"name": "gkd", "lmbda": 1.0, "max_new_tokens": 6},
        loss={"name": "jsd"},
        launch={"ranks": 1},
    )
    run = tmp_path / "run"
    for step in ("preprocess", "init-student", "rank", "plan", "train"):
        log = pocl(step, str(recipe), "--run-dir", str(run), *overrides).stderr
    assert all(note in log for note in notes), log
    steps = records(run)
    assert len(steps) == 4 and all(record["on_policy"] for record in steps)
    interval, staleness = (f"policy.{name}" in " ".join(overrides) for name in ("sync", "stale"))
    expected = [0, 1, 0, 1] if interval else [0, 1, 1, 1] if staleness else [0] * 4
    assert [record["staleness_steps"] for record in steps] == expected


def test_a_run_resumes_on_fewer_gpus(tmp_path: Path) -> None:
    """Fused Adam reads the converted step counters on the GPU. This needs a separate process,
    because DeepSpeed makes it a rank.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    command = [
        "bash",
        str(ROOT / "launch" / "train.sh"),
        "--ranks",
        "1",
        "--module",
        "reshard_worker",
        str(tmp_path),
    ]
    process = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=300,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(tmp_path / "logs"),
            "PYTHONPATH": paths,
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "the same step on cuda" in process.stdout
