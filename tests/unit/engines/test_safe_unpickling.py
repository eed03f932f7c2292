"""Unpickling by a library inside `data_only`: data is loaded, code does not run."""

from __future__ import annotations

import collections
import os
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_ds.engines.safe_unpickling import FORCE_VARIABLE, data_only, pickle_by_value
from pocl_ds.errors import ArtifactError


class Known:
    """A class that the library pickles and `data_only` allows."""


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def careless(path: Path) -> Any:
    """Load a file as DeepSpeed does."""
    return torch.load(path, weights_only=False)


class Stage(Enum):
    """Members as Python 3.11.2 pickles them."""

    WEIGHTS = 3

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (Stage, self.name)


def test_a_member_of_an_enumeration_is_loaded_for_every_python_version(tmp_path: Path) -> None:
    torch.save(Stage.WEIGHTS, tmp_path / "file")
    with pytest.raises(ArtifactError, match="getattr"), data_only(tmp_path, Stage):
        careless(tmp_path / "file")
    pickle_by_value(Stage)
    torch.save(Stage.WEIGHTS, tmp_path / "file")
    with data_only(tmp_path, Stage):
        assert careless(tmp_path / "file") is Stage.WEIGHTS


def test_data_is_loaded(tmp_path: Path) -> None:
    torch.save(
        {"x": torch.ones(2), "n": 3, "known": Known(), "order": collections.OrderedDict(a=1)},
        tmp_path / "file",
    )
    with data_only(tmp_path, Known):
        loaded = careless(tmp_path / "file")
    assert (
        loaded["n"] == 3
        and isinstance(loaded["known"], Known)
        and torch.equal(loaded["x"], torch.ones(2))
    )
    assert FORCE_VARIABLE not in os.environ
    with (
        pytest.raises(
            ArtifactError, match=r"contains more than data \([\w.]+\.Known\); none of its code"
        ),
        data_only(tmp_path),
    ):
        careless(tmp_path / "file")


def test_a_damaged_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no pickle at all")
    with (
        pytest.raises(
            ArtifactError, match=r"contains more than data \(a damaged pickle\); none of its code"
        ),
        data_only(tmp_path),
    ):
        careless(tmp_path / "file")


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in a process of a pool"])
def test_code_does_not_run(tmp_path: Path, elsewhere: bool) -> None:
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "file")
    with pytest.raises(ArtifactError, match="contains more than data"), data_only(tmp_path):
        if elsewhere:
            with ProcessPoolExecutor(1) as pool:
                pool.submit(careless, tmp_path / "file").result()
        else:
            careless(tmp_path / "file")
    assert not (tmp_path / "sprung").exists() and FORCE_VARIABLE not in os.environ
    careless(tmp_path / "file")
    assert (tmp_path / "sprung").exists(), "the trap itself works"


def test_other_errors_are_raised_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "0")
    with pytest.raises(FileNotFoundError), data_only(tmp_path):
        careless(tmp_path / "missing")
    assert os.environ[FORCE_VARIABLE] == "0"
