"""A profile from the output of sinfo and scontrol."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.cluster import profile_detection
from pocl_ds.cluster.profile import check_profile
from pocl_ds.config.yaml_io import parse_yaml
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


MIXED = (
    "gpu|up|2-00:00:00|3|48|500000|gpu:a100:4\n"
    "gpu|up|2-00:00:00|2|96|1000000|gpu:h100:4\n"
    "mig|up|2-00:00:00|1|64|500000|gpu:a100_1g.5gb:28\n"
)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"scontrol": CONFIG, "--format=%P": "gpu*\n"}
    monkeypatch.setattr(
        "pocl_ds.cluster.scheduler.call",
        lambda *words: answers.get(words[0], answers.get(words[-1], MIXED)),
    )


def test_a_kind_of_nodes_is_chosen_by_its_gpus(mixed: None) -> None:
    """Whole GPUs come before slices, and of as many those with more nodes."""
    profile, remarks = profile_detection.detect_profile()
    assert (profile.gpu_type, profile.gpus_per_node, profile.cpus_per_node) == ("a100", 4, 48)
    assert "mig: 1 nodes of 64 cores and 28 x a100_1g.5gb" in remarks[1]
    assert any("its nodes differ" in remark for remark in remarks)
    profile, _ = profile_detection.detect_profile(gpu_type="H100")
    assert (profile.gpu_type, profile.cpus_per_node) == ("h100", 96)
    profile, remarks = profile_detection.detect_profile("mig")
    assert profile.gpus_per_node == 28 and any("NCCL" in remark for remark in remarks)
    with pytest.raises(ResourceError, match="'b200': choose one of a100, a100_1g.5gb, h100"):
        profile_detection.detect_profile(gpu_type="b200")


def test_a_detected_profile_says_what_its_fields_mean(mixed: None) -> None:
    profile, _ = profile_detection.detect_profile()
    text = profile_detection.commented_profile(profile)
    assert check_profile(parse_yaml(text), "x") == profile
    assert "gpus_per_node: 4                 # GPUs of a node\n" in text
    assert "# account: my-account" in text and "# Account that the job is charged to" in text
    # Every suggestion is a valid line.
    suggested = "\n".join(profile_detection.SUGGESTED_FIELDS.values())
    assert check_profile({"name": "x", **parse_yaml(suggested)}, "x").account == "my-account"


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ("gpu:8", (None, 8)),
        ("gpu:h100:8(S:0-1)", ("h100", 8)),
        ("gpu:2080ti:4", ("2080ti", 4)),
        ("gpu:3090:8(IDX:0-7)", ("3090", 8)),
        ("gpu:1g.10gb:7,nvme:1", ("1g.10gb", 7)),
        ("gpu:mi250x:8(S:0-7)", ("mi250x", 8)),
        ("(null)", (None, 0)),
    ],
)
def test_gpus_are_read_from_generic_resources(
    resources: str, expected: tuple[str | None, int]
) -> None:
    assert profile_detection._gpus(resources) == expected


@pytest.mark.parametrize(
    ("gpu_type", "vendor"),
    [("mi300x", "amd"), ("amd_mi250", "amd"), ("gfx90a", "amd"), ("h100", "nvidia")],
)
def test_gpus_of_amd_are_known_by_their_type(
    gpu_type: str, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = f"gpu|up|infinite|4|96|1000000|gpu:{gpu_type}:8(S:0-1)\n"
    config = CONFIG.replace("cons_tres", "linear")
    answers = {"scontrol": config, "--format=%P": "gpu*\n"}
    monkeypatch.setattr(
        "pocl_ds.cluster.scheduler.call",
        lambda *words: answers.get(words[0], answers.get(words[-1], rows)),
    )
    profile, remarks = profile_detection.detect_profile()
    assert (profile.gpu_vendor, profile.gpu_type, profile.gres) == (vendor, gpu_type, True)
    assert any("ROCm" in remark for remark in remarks) == (vendor == "amd")
