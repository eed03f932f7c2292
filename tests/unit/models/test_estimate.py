"""The estimate of a run: memory, FLOPs, times, and the command `pocl estimate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_recipe

from pocl_ds.cli.main import main
from pocl_ds.config.ds_config import load_ds_config
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.models import estimate, memory
from pocl_ds.models.cost import ModelShape
from pocl_ds.models.estimate import GPUS, ClusterLayout, TrainingWork
from pocl_ds.models.memory import TrainingSetup

SMALL = ModelShape(
    "llama",
    1_300_000_000,
    50_000_000,
    1_200_000_000,
    100_000_000,
    100_000_000,
    24,
    50_000,
    *[2048] * 3,
    True,
)
LARGE = ModelShape(
    "llama",
    6_700_000_000,
    200_000_000,
    6_400_000_000,
    200_000_000,
    200_000_000,
    32,
    50_000,
    *[4096] * 3,
    True,
)
WORK = TrainingWork(10_000, 120, 40, 512, 1024, 300)


def total(setup: TrainingSetup, ranks: int, samples: int = 2) -> float:
    activations = lambda lengths, checkpointing: sum(lengths) * (1e4 if checkpointing else 1e6)  # noqa: E731
    estimated = memory.training_memory(
        SMALL, LARGE, setup, ranks, [512] * samples, 511 * samples, activations, 2e9
    )
    assert all(size >= 0 for size in estimated.values())
    return sum(estimated.values())


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.integers(2, 64),
    samples=st.integers(1, 8),
    checkpointing=st.booleans(),
    mode=st.sampled_from(["online", "cached_hidden_states"]),
)
def test_memory_falls_with_ranks_and_grows_with_samples(
    ranks: int, samples: int, checkpointing: bool, mode: str
) -> None:
    setup = TrainingSetup(samples, checkpointing=checkpointing, teacher_mode=mode)
    assert (
        total(setup, ranks + 1, samples)
        < total(setup, ranks, samples)
        < total(setup, ranks, samples + 1)
    )
    assert total(replace(setup, teacher_mode="cached_hidden_states"), ranks, samples) <= total(
        setup, ranks, samples
    )
    assert total(replace(setup, offload_student=True), ranks, samples) < total(
        setup, ranks, samples
    )


def test_memory_by_hand() -> None:
    """ZeRO-3 in bfloat16, divided by the ranks: for each parameter 2 bytes of weights, 12 of Adam
    (ZeRO, 2020), and 4 of gradients, which are summed in float32.
    """
    estimated = memory.training_memory(
        SMALL, LARGE, TrainingSetup(1), 8, [512], 511, lambda *_: 0.0, 0.0
    )
    states = (
        estimated["student: weights"]
        + estimated["student: gradients"]
        + estimated["student: optimizer"]
    )
    assert states == pytest.approx(18 * 1.3e9 / 8)
    assert estimated["teacher: weights"] == pytest.approx(2 * 6.7e9 / 8)
    assert estimated["student: gathered"] == pytest.approx(2 * (2 * 50e6 + 100e6))
    assert estimated["logits"] == pytest.approx(511 * 50_000 * 4)


def test_only_adapters_have_gradients_moments_and_checkpoints() -> None:
    """0.02 of 1.3 billion parameters are trained: 2 bytes of each weight, and 16 more of an
    adapter's.
    """
    adapted = replace(SMALL, adapters=20_000_000)
    estimated = memory.training_memory(
        adapted, LARGE, TrainingSetup(1), 8, [512], 511, lambda *_: 0.0, 0.0
    )
    states = (
        estimated["student: weights"]
        + estimated["student: gradients"]
        + estimated["student: optimizer"]
    )
    assert states == pytest.approx((2 * 1.32e9 + 16 * 20e6) / 8)
    assert not {"head's gradient", "embeddings' gradient"} & estimated.keys()
    assert memory.checkpoint_bytes(adapted) == 12 * 20e6
    assert (
        memory.host_memory(adapted, None, TrainingSetup(1, offload_student=True), 1.0)
        == 12 * 20e6 + 2 * 1.3e9
    )
    traffic = [
        estimate.micro_step_traffic(shape, None, TrainingSetup(1), 4) for shape in (adapted, SMALL)
    ]
    assert traffic[0] / traffic[1] == pytest.approx((2 * 1.3e9 + 20e6) / (3 * 1.3e9))
    setup, lengths = replace(TrainingSetup(1), teacher_mode="none"), [1000] * 10
    flops = estimate.step_flops(adapted, None, setup, lengths, 5000)
    attention = 3 * 24 * 10 * 2 * 1000 * 1001 * 2048  # both of its factors have gradients
    assert flops == pytest.approx(10_000 * (4 * 1.2e9 + 6 * 20e6) + 5000 * 4 * 1e8 + attention)
    assert flops < 0.75 * estimate.step_flops(SMALL, None, setup, lengths, 5000)


def test_quantized_teacher_is_complete_on_each_rank() -> None:
    setup = TrainingSetup(1, teacher_sharded=False, teacher_bytes_per_weight=0.5)
    estimated = memory.training_memory(SMALL, LARGE, setup, 8, [512], 511, lambda *_: 0.0, 0.0)
    assert estimated["teacher: weights"] == pytest.approx(0.5 * 6.4e9 + 2 * 0.3e9)


def test_step_flops_are_six_per_student_weight_and_two_per_teacher_weight() -> None:
    lengths, setup = [1000] * 10, TrainingSetup(1)
    dense = 10_000 * (6 * 1.2e9 + 2 * 6.4e9)
    assert estimate.step_flops(SMALL, LARGE, setup, lengths, 0) == pytest.approx(dense, rel=0.05)
    sft = estimate.step_flops(SMALL, None, replace(setup, teacher_mode="none"), lengths, 0)
    assert estimate.step_flops(SMALL, LARGE, replace(setup, checkpointing=True), lengths, 0) > dense
    assert sft == pytest.approx(10_000 * 6 * 1.2e9, rel=0.05)


def test_slow_network_bounds_a_step() -> None:
    device, setup = GPUS["h100-80g"], TrainingSetup(8)
    arguments: dict[str, Any] = {"utilization": 0.4, "max_new_tokens": 256, "sequences": 64}

    def times(speed: float, mode: str = "online") -> list[estimate.StepTime]:
        return estimate.step_times(
            SMALL,
            LARGE,
            replace(setup, teacher_mode=mode),
            WORK,
            ClusterLayout(4, 4, speed),
            device,
            **arguments,
        )

    slow, fast = times(1e8), times(1e13)
    assert slow[-1].bound_by == "the network" and fast[-1].bound_by == "arithmetic"
    assert slow[-1].seconds > 10 * fast[-1].seconds
    cached = times(1e13, "cached_hidden_states")
    assert [time.name for time in cached] == ["score", "cache-teacher", "train"]
    assert sum(time.seconds for time in cached) < 0.75 * sum(time.seconds for time in fast)


def test_rescoring_is_forward_passes_of_the_student_and_of_a_teacher_that_runs() -> None:
    """Per sample 160 tokens, of which 40 are loss tokens: 2 FLOPs for each weight."""
    body, head = 160 * 2 * 1.2e9, 40 * 2 * 1e8
    attention = 24 * 2 * 160 * 161 * 2048
    student = body + head + attention
    teacher = 160 * 2 * 6.4e9 + 40 * 2 * 2e8 + 32 * 2 * 160 * 161 * 4096
    arguments: dict[str, Any] = {"utilization": 0.4, "max_new_tokens": 256, "sequences": 64}

    def rescoring(mode: str, layout: ClusterLayout, **changes: Any) -> estimate.StepTime | None:
        work = replace(WORK, **changes)
        setup = TrainingSetup(8, teacher_mode=mode)
        device = GPUS["h100-80g"]
        times = estimate.step_times(SMALL, LARGE, setup, work, layout, device, **arguments)
        return {time.name: time for time in times}.get("rescoring")

    one = ClusterLayout(1, 1)
    assert rescoring("online", one) is None
    alone = rescoring("online", one, rescored_samples=5_000)
    both = rescoring("online", one, rescored_samples=5_000, rescoring_runs_teacher=True)
    cached = rescoring(
        "cached_hidden_states", one, rescored_samples=5_000, rescoring_runs_teacher=True
    )
    assert alone and both and cached
    assert alone.flops == pytest.approx(5_000 * student)
    assert both.flops == pytest.approx(5_000 * (student + teacher))
    assert cached.flops == pytest.approx(5_000 * (student + 40 * 2 * 2e8))
    assert both.seconds == pytest.approx(both.flops / (0.4 * GPUS["h100-80g"].flops))

    # Over a slow network the weights of both models come once for each of the 20 micro-batches.
    slow = ClusterLayout(8, 4, 1e8)
    bound = rescoring("online", slow, rescored_samples=5_000, rescoring_runs_teacher=True)
    assert bound and bound.bound_by == "the network"
    weights = 2 * (1.3e9 + 6.7e9) * 31 / 32
    assert bound.seconds == pytest.approx(20 * weights / (1e8 / 4))


def test_fitting_setup_changes_as_little_as_possible() -> None:
    rank_bytes = lambda setup: setup.micro_batch_size * (2.0 if setup.checkpointing else 10.0)  # noqa: E731
    setup = TrainingSetup(8)
    estimated = memory.find_fitting_setup(rank_bytes, setup, 45.0, 16, 64, 4)
    assert estimated == replace(setup, micro_batch_size=4)
    assert memory.find_fitting_setup(rank_bytes, setup, 5.0, 16, 64, 4) == replace(
        setup, micro_batch_size=2, checkpointing=True
    )
    assert memory.find_fitting_setup(rank_bytes, setup, 1.0, 16, 64, 4) is None


def test_estimate_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(tmp_path, teacher, student, max_train_samples=64)
    command = [
        "estimate",
        str(recipe),
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--gpu",
        "a100-40g",
        "--samples",
        "64",
    ]
    assert main([*command, "--write", str(tmp_path / "written.yaml")]) == 0
    page = capfd.readouterr().out
    for part in (
        "8 ranks",
        "student: gathered",
        "largest micro-batch that fits",
        "POCL in total",
        "plain SFT",
    ):
        assert part in page
    assert main([*command, "student.lora.r=4"]) == 0
    assert "0.0 million of adapters are trained" in capfd.readouterr().out
    written = load_recipe(str(tmp_path / "written.yaml"))
    assert (
        written.launch.ranks == 8 and written.train.micro_batch_size == 1
    )  # 8 samples over 8 ranks

    assert main([*command, "--gpu", "abacus"]) == 2
    assert "--gpu abacus: choose one of h200-141g" in capfd.readouterr().err
    assert main([*command, "--nodes", "0"]) == 2
    assert "--nodes 0: it must be greater than 0" in capfd.readouterr().err


def test_estimate_command_reports_what_does_not_fit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["a100-40g"], name="toy", memory=3e9, base=2.9e9))
    model = tiny_models.llama(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, model, max_train_samples=64)
    target = tmp_path / "written.yaml"
    assert (
        main(
            [
                "estimate",
                str(recipe),
                "--gpus-per-node",
                "1",
                "--gpu",
                "toy",
                "--samples",
                "64",
                "--write",
                str(target),
            ]
        )
        == 2
    )
    assert "IT DOES NOT FIT" in capfd.readouterr().out and not target.exists()


@pytest.mark.parametrize(
    "name", ["student_zero3", "student_zero3_offload", "teacher_zero3", "teacher_zero3_offload"]
)
def test_constants_match_the_shipped_ds_configs(name: str) -> None:
    zero = load_ds_config(name)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == memory.LIVE_PARAMETERS
    buckets = [value for field, value in zero.items() if field.endswith("bucket_size")]
    assert buckets and set(buckets) == {memory.BUCKET}


@pytest.mark.parametrize(
    ("hidden_dtype", "teacher_dtype", "bytes_of_a_number", "more"),
    [
        ("model", "float32", 4, 0),
        ("model", "bfloat16", 2, 0),
        ("bfloat16", "float32", 2, 0),
        ("int8", "bfloat16", 1, 4),
    ],
)
def test_cached_hidden_states_have_the_bytes_of_their_type(
    hidden_dtype: str, teacher_dtype: str, bytes_of_a_number: int, more: int
) -> None:
    setup = TrainingSetup(
        1,
        teacher_mode="cached_hidden_states",
        teacher_dtype=teacher_dtype,
        hidden_dtype=hidden_dtype,
    )
    expected = LARGE.width * bytes_of_a_number + more
    assert setup.cached_bytes_per_token(LARGE) == expected


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("nvidia_a100-sxm4-40gb", "a100-40g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24g"),
        ("NVIDIA RTX A6000", "a6000-48g"),
        ("h200", "h200-141g"),
        ("l40s", "l40s-48g"),
        ("a100", None),  # of 40 or 80 GB
        ("NVIDIA H100 PCIe", None),  # a lower peak
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("h100_1g.10gb", None),
        ("Tesla V100", None),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_the_name_of_its_driver_or_of_slurm(name: str, gpu: str | None) -> None:
    assert estimate.find_gpu(name) == (GPUS[gpu] if gpu else None)
