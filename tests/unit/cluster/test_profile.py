"""Cluster profiles: what is accepted, and how errors read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.cluster.profile import check_profile, dump_profile, load_profile
from pocl_ds.errors import RecipeError
from pocl_ds.resources import PROFILES


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_read_back(path: Path) -> None:
    profile = load_profile(path.stem)
    assert check_profile(yaml.safe_load(dump_profile(profile)), "again") == profile


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partiton": "x"}, ("partiton does not exist", "did you mean partition")),
        ({"partition": "a b; touch x"}, ("partition", "letters, digits")),
        ({"time": "soon"}, ("time='soon'", "D-HH:MM:SS")),
        ({"options": ["-p x"]}, ("options", "letters, digits")),
        ({"options": ["mail"]}, ("--name=value",)),
        ({"gpus_per_node": 2, "ranks_per_node": 3}, ("ranks_per_node=3", "its own GPU")),
        ({"cpus_per_node": 1, "ranks_per_node": 2}, ("cpus_per_node=1", "needs a core")),
        ({"environment": {"A B": "x"}}, ("environment",)),
        ({"jobs": {"train": {"tme": "1"}}}, ("jobs.train.tme does not exist", "did you mean time")),
        ({"container": {"runtime": "docker", "image": "x"}}, ("container.runtime",)),
        (
            {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/data"]}},
            ("container.mounts", "as in /data:/data"),
        ),
        (
            {"container": {"runtime": "pyxis", "image": "x", "mounts": ["data:/data"]}},
            ("container.mounts", "absolute paths"),
        ),
        ({"network": "ib0"}, ("network='ib0'", "write")),
        ({"network": {"interfaces": "ib0"}}, ("interfaces does not exist", "network.interface")),
        ({"network": {"interface": "$(id)"}}, ("network.interface", "letters, digits")),
        ({"network": {"ib_hca": "mlx5_0 mlx5_1"}}, ("network.ib_hca", "mlx5_0,mlx5_1:1")),
        ({"network": {"extra": {"NCCL_IB_TC": 106}}}, ("network.extra.NCCL_IB_TC", "quotes")),
        ({"network": {"extra": {"1-X": "x"}}}, ("network.extra.1-X: the name of a variable",)),
        ({"network": {"extra": {"NCCL_IB_HCA": "x"}}}, ("write it as network.ib_hca",)),
        ({"network": {"extra": {"FI_AUTH_KEY": "1b2c3d"}}}, ("network.extra", "plain text")),
        (
            {"network": {"interface": "ib0"}, "environment": {"NCCL_SOCKET_IFNAME": "ib1"}},
            ("environment and network both set NCCL_SOCKET_IFNAME",),
        ),
        ({"gpu_vendor": "intel"}, ("gpu_vendor='intel'", "nvidia", "amd")),
    ],
)
def test_an_error_in_a_profile_is_one_sentence(
    fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError) as exc_info:
        load_profile(str(path))
    assert all(word in str(exc_info.value) for word in words) and "\n" not in str(exc_info.value), (
        exc_info.value
    )


def test_an_unknown_profile_lists_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "pocl" / "profiles").mkdir(parents=True)
    (tmp_path / "pocl" / "profiles" / "mine.yaml").write_text("partition: p\ncpus_per_node: 8\n")
    assert load_profile("mine").partition == "p"
    with pytest.raises(RecipeError, match="'nothing' is neither a file nor a name .*gpu, .*mine"):
        load_profile("nothing")


@pytest.mark.parametrize(
    "scratch", ["local", "/local/$(id)", "/local/`id`", '/local/"; id; "', "/local/$1", "/a b"]
)
def test_a_scratch_folder_is_a_path_and_variables(scratch: str) -> None:
    with pytest.raises(RecipeError, match=r"scratch.*write an absolute path"):
        check_profile({"name": "x", "scratch": scratch}, "here")
    check_profile({"name": "x", "scratch": "/local/${SLURM_JOB_ID}/$USER"}, "here")
