"""Which faults are a memory that ran out, by what the libraries really say."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import error_message

from pocl_ds.errors import DataError, compile_fault, memory_fault
from pocl_ds.workflow import pipeline
from pocl_ds.workflow.steps import STEP

# As torch 2.13 words it.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.12 GiB is free. "
    "Including non-PyTorch memory, this process has 77.98 GiB memory in use. Of the allocated "
    "memory 70.00 GiB is allocated by "
    "PyTorch."
)
FOUND = "2.50 GiB, GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is free"


def test_faults_of_memory_and_others() -> None:
    for make, expected in (
        (lambda: torch.empty(1 << 46), "281474976710656 bytes"),
        (lambda: bytearray(1 << 50), "the error has no details"),
        (lambda: np.empty(1 << 46), "Unable to allocate 512. TiB for an array with shape"),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            make()
        assert (memory_fault(found.value) or "").startswith(expected)
    assert memory_fault(torch.OutOfMemoryError(CUDA)) == FOUND
    assert memory_fault(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert memory_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_faults_of_torch_compile_and_others() -> None:
    error = torch._dynamo.exc.TorchDynamoException("\nno C++ compiler here.\nmore")
    assert compile_fault(error) == "no C++ compiler here"
    assert compile_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("step", "remedy"),
    [
        ("rank", "use a machine with more memory"),
        ("evaluate", "evaluate.held_out_loss=false skips it"),
    ],
)
def test_a_step_whose_memory_ran_out_names_what_it_follows_from(
    step: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setitem(STEP, step, dataclasses.replace(STEP[step], run=full))
    words = ["--model", "student"] if step == "evaluate" else []
    monkeypatch.setattr(pipeline, "check_sample_counts", lambda run, recipe: None)
    message = error_message(capsys, step, "quickstart", "--run-dir", tmp_path / "run", *words)
    assert (
        message.startswith(f"memory ran out ({FOUND})")
        and "finished work is saved" in message
        and message.endswith(remedy)
    )


def test_a_data_error_keeps_its_reason_across_processes() -> None:
    error = copy.copy(DataError("x.jsonl line 1: no", reason="empty text"))  # as pickle does
    assert (str(error), error.reason) == ("x.jsonl line 1: no", "empty text")
    assert DataError("x").reason == "other"
