"""The coarse look at memory before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import LoraConfig, ModelSource
from pocl_ds.errors import ResourceError
from pocl_ds.training import memory_check


def needed(
    student: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ranks: int = 2,
    quantised: float | None = None,
    **changes: Any,
) -> float:
    """GB that it asks for, on a machine that has nothing."""
    monkeypatch.setattr(memory_check, "available_bytes", lambda: 0)
    monkeypatch.setattr(memory_check, "BYTES_PER_RANK", 0)
    monkeypatch.setattr(memory_check, "BYTES_OF_WRITER", 0)
    monkeypatch.setattr(
        memory_check,
        "parameters",
        lambda model: 10**9 if model.model == str(student) else 5 * 10**9,
    )
    monkeypatch.setattr(memory_check, "linear_parameters", lambda model: 4 * 10**9)
    monkeypatch.setattr(memory_check, "adapters", lambda model, lora: lora.rank * 10**6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    options = {
        "teacher_bytes": 4,
        "teacher_sharded": True,
        "chunk_bytes": 0,
        "sharded": True,
        "copied": False,
        **changes,
    }
    with pytest.raises(ResourceError) as found:
        memory_check.check_memory(
            ModelSource(model=str(student)),
            [(ModelSource(model=str(teacher)), quantised)],
            **options,
        )
    match = re.search(r"need about ([\d.]+) GB", str(found.value))
    assert match and "launch.ranks" in str(found.value)
    return float(match.group(1))


def test_a_whole_teacher_counts_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    assert needed(student, teacher, monkeypatch) == 20 + 2 * 8 + 20
    assert needed(student, teacher, monkeypatch, teacher_sharded=False) == 20 + 2 * 8 + 2 * 20
    assert needed(student, teacher, monkeypatch, copied=True) == 20 + 12 + 2 * 8 + 20
    assert needed(student, teacher, monkeypatch, writer=True) == 20 + 2 * (8 + 4) + 20
    assert (
        needed(student, teacher, monkeypatch, writer=True, held=True) == 20 + 2 * (8 + 4) + 4 + 20
    )
    assert (
        needed(student, teacher, monkeypatch, sharded=False, teacher_sharded=False)
        == 2 * 20 + 2 * 20
    )


def test_only_adapters_have_gradients_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    lora = LoraConfig(r=100)  # 0.1 of 1 thousand million
    assert needed(student, teacher, monkeypatch, lora=lora) == pytest.approx(
        4 + 2 + 4 + 2 * (4 + 0.8) + 20
    )
    copied = needed(student, teacher, monkeypatch, lora=lora, copied=True, writer=True)
    assert copied == pytest.approx(4 + 2 + 1.2 + 4 + 2 * (4 + 0.8 + 4) + 20)


def test_a_quantised_teacher_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tmp_path / "s", tmp_path / "t"
    found = needed(student, teacher, monkeypatch, teacher_sharded=False, quantised=0.5)
    assert found == 20 + 2 * 8 + 2 * (4 * 0.5 + 1 * 4)


def test_what_fits_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    model = ModelSource(model=str(tiny_llama))
    assert memory_check.parameters(model) > 0
    assert memory_check.linear_parameters(model) == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert memory_check.adapters(model, LoraConfig(r=2, target_modules=("o_proj",))) == 3 * 2 * (
        64 + 64
    )
    memory_check.check_memory(
        model,
        [],
        teacher_bytes=4,
        teacher_sharded=False,
        chunk_bytes=0,
        sharded=False,
        copied=False,
    )
