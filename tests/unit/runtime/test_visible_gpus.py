"""The GPUs that a process and its children see, by the variables of CUDA and of ROCm."""

from __future__ import annotations

import pytest

from pocl_ds.runtime.visible_gpus import gpu_variables, visible_gpus


@pytest.mark.parametrize(
    ("variables", "names", "child"),
    [
        ({}, ["0", "1"], {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "5,GPU-a"}, ["5", "GPU-a"], {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        # Numbers count among the GPUs that ROCR_VISIBLE_DEVICES leaves.
        ({"ROCR_VISIBLE_DEVICES": "6,7"}, ["0", "1"], {"CUDA_VISIBLE_DEVICES": "1"}),
        (
            {"HIP_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"},
            ["2", "3"],
            {"HIP_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "3"},
        ),
    ],
)
def test_a_child_gets_one_of_the_visible_gpus(
    variables: dict[str, str],
    names: list[str],
    child: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert visible_gpus(2) == names
    assert gpu_variables(names[1]) == child
