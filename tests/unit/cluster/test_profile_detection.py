"""A profile from the output of sinfo and scontrol."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.cluster import profile_detection
from pocl_ds.errors import ResourceError

CONFIG = """ClusterName             = north
SelectType              = select/cons_tres
JobRequeue              = 0
AccountingStorageType   = accounting_storage/none
"""


@pytest.mark.parametrize(
    ("rows", "partition", "expected"),
    [
        (
            "cpu|up|1-00:00:00|20|64|256000|(null)\ngpu|up|infinite|4|96|1000000|gpu:h100:8(S:0-1)\n",
            None,
            {
                "partition": "gpu",
                "gpus_per_node": 8,
                "gpu_type": "h100",
                "cpus_per_node": 96,
                "time": "24:00:00",
                "gres": False,
            },
        ),
        (
            "cpu|up|1-00:00:00|20|64+|256000+|(null)\ngpu|up|infinite|4|96|1000000|gpu:8\n",
            "cpu",
            {"partition": "cpu", "gpus_per_node": 0, "cpus_per_node": 64, "time": "1-00:00:00"},
        ),
        (
            "old|down|1:00|9|8|1|gpu:9\ncpu|up|2:00:00|2|8|1|(null)\n",
            None,
            {"partition": "cpu", "cpus_per_node": 8},
        ),
    ],
)
def test_a_profile_is_detected(
    rows: str, partition: str | None, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> str:
        return (
            CONFIG
            if words[0] == "scontrol"
            else "cpu*\ngpu\n"
            if words[-1] == "--format=%P"
            else rows
        )

    monkeypatch.setattr("pocl_ds.cluster.scheduler.call", call)
    profile, remarks = profile_detection.detect_profile(partition)
    assert {
        name: getattr(profile, name) for name in expected
    } == expected and profile.name == "north"
    assert any("no accounting" in remark for remark in remarks) and any(
        "requeue" in remark for remark in remarks
    )
    with pytest.raises(ResourceError, match="no partition 'x'"):
        profile_detection.detect_profile("x")


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ("gpu:8", (None, 8)),
        ("gpu:h100:8(S:0-1)", ("h100", 8)),
        ("gpu:2080ti:4", ("2080ti", 4)),
        ("gpu:3090:8(IDX:0-7)", ("3090", 8)),
        ("gpu:1g.10gb:7,nvme:1", ("1g.10gb", 7)),
        ("(null)", (None, 0)),
    ],
)
def test_gpus_are_read_from_generic_resources(
    resources: str, expected: tuple[str | None, int]
) -> None:
    assert profile_detection._gpus(resources) == expected
