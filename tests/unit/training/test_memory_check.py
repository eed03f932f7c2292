"""The coarse check of memory before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest

from pocl_ds.config import LoraConfig, ModelSource
from pocl_ds.errors import ResourceError
from pocl_ds.runtime.job_roles import JobRoles
from pocl_ds.training import memory_check


def required_gigabytes(
    student: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ranks: int = 2,
    quantized: float | None = None,
    **changes: Any,
) -> float:
    """GB that a training needs, according to the error on a machine without free memory."""
    monkeypatch.setattr(memory_check, "available_bytes", lambda: 0)
    monkeypatch.setattr(memory_check, "RANK_BYTES", 0)
    monkeypatch.setattr(memory_check, "ROLLOUT_WORKER_BYTES", 0)
    monkeypatch.setattr(
        memory_check,
        "count_parameters",
        lambda model: 10**9 if model.model == str(student) else 5 * 10**9,
    )
    monkeypatch.setattr(memory_check, "count_linear_parameters", lambda model: 4 * 10**9)
    monkeypatch.setattr(
        memory_check, "count_adapter_parameters", lambda model, lora: lora.r * 10**6
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    options = {
        "teacher_dtype": "float32",
        "teacher_sharded": True,
        "student_sharded": True,
        "chunk_bytes": 0,
        "async_save": False,
        **changes,
    }
    demand = memory_check.MemoryDemand(
        ModelSource(model=str(student)), [(ModelSource(model=str(teacher)), quantized)], **options
    )
    with pytest.raises(ResourceError) as error:
        memory_check.check_memory(demand)
    match = re.search(r"need about ([\d.]+) GB", str(error.value))
    assert match and "launch.ranks" in str(error.value)
    return float(match.group(1))


def test_a_teacher_that_is_not_sharded_counts_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    assert required_gigabytes(student, teacher, monkeypatch) == 20 + 2 * 8 + 20
    assert (
        required_gigabytes(student, teacher, monkeypatch, teacher_sharded=False)
        == 20 + 2 * 8 + 2 * 20
    )
    assert (
        required_gigabytes(student, teacher, monkeypatch, async_save=True) == 20 + 12 + 2 * 8 + 20
    )
    assert (
        required_gigabytes(student, teacher, monkeypatch, rollout_worker=True)
        == 20 + 2 * (8 + 4) + 20
    )
    assert (
        required_gigabytes(
            student, teacher, monkeypatch, rollout_worker=True, saved_rollout_weights=True
        )
        == 20 + 2 * (8 + 4) + 4 + 20
    )
    assert (
        required_gigabytes(
            student, teacher, monkeypatch, student_sharded=False, teacher_sharded=False
        )
        == 2 * 20 + 2 * 20
    )


def test_a_teacher_on_ranks_of_its_own_counts_on_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of the student and three of the teacher, whose last one is on another node."""
    student, teacher = tmp_path / "s", tmp_path / "t"
    roles = JobRoles(cast(Any, None), 0, 2, 3, ranks_per_node=4)
    monkeypatch.setattr(memory_check, "job_roles", lambda: roles)
    sharded = required_gigabytes(student, teacher, monkeypatch)
    assert sharded == pytest.approx(20 + 2 * 8 + 20 * 2 / 3, abs=0.1)
    complete = required_gigabytes(student, teacher, monkeypatch, teacher_sharded=False)
    assert complete == 20 + 2 * 8 + 2 * 20


def test_only_adapters_have_gradients_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    lora = LoraConfig(r=100)  # 0.1 of 1 thousand million
    assert required_gigabytes(student, teacher, monkeypatch, lora=lora) == pytest.approx(
        4 + 2 + 4 + 2 * (4 + 0.8) + 20
    )
    with_worker = required_gigabytes(
        student, teacher, monkeypatch, lora=lora, async_save=True, rollout_worker=True
    )
    assert with_worker == pytest.approx(4 + 2 + 1.2 + 4 + 2 * (4 + 0.8 + 4) + 20)


def test_a_quantized_teacher_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    gigabytes = required_gigabytes(
        student, teacher, monkeypatch, teacher_sharded=False, quantized=0.5
    )
    assert gigabytes == 20 + 2 * 8 + 2 * (4 * 0.5 + 1 * 4)


def test_a_training_that_fits_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    model = ModelSource(model=str(tiny_llama))
    assert memory_check.count_parameters(model) > 0
    assert memory_check.count_linear_parameters(model) == 3 * (
        64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    )
    assert memory_check.count_adapter_parameters(
        model, LoraConfig(r=2, target_modules=("o_proj",))
    ) == 3 * 2 * (64 + 64)
    demand = memory_check.MemoryDemand(
        model,
        [],
        teacher_dtype="float32",
        teacher_sharded=False,
        student_sharded=False,
        chunk_bytes=0,
        async_save=False,
    )
    memory_check.check_memory(demand)


def test_of_the_teachers_of_stages_only_the_largest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"student": 10**9, "small": 2 * 10**9, "large": 5 * 10**9}
    monkeypatch.setattr(memory_check, "count_parameters", lambda model: sizes[model.model])

    def needed(*teachers: str, **options: bool) -> float:
        demand = memory_check.MemoryDemand(
            ModelSource(model="student"),
            [(ModelSource(model=name), None) for name in teachers],
            teacher_dtype="float32",
            teacher_sharded=True,
            student_sharded=True,
            chunk_bytes=0,
            async_save=False,
            **options,
        )
        return demand.bytes_on_node(1, 1)

    assert needed("small", "large", one_teacher_at_a_time=True) == needed("large")
    assert needed("small", "large") == needed("large") + 4 * sizes["small"]
