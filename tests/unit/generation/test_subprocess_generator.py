"""The way of new weights to a writer in a process of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pocl_ds.errors import ResourceError
from pocl_ds.generation import subprocess_generator
from pocl_ds.generation.subprocess_generator import SPARE, ChildGenerator

Usage = namedtuple("Usage", "free")
WEIGHTS = {"a": torch.arange(1000.0), "b": torch.ones(3, 4).T}
SIZE = 4 * (1000 + 12) + SPARE


class Told(ChildGenerator):
    """Without a process: remembers what it would have been told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Path, dict[str, torch.Tensor]]] = []

    def _ask(self, what: str, *arguments: Any) -> None:
        assert what == "refresh"
        self.seen.append((Path(arguments[0]), load_file(arguments[0])))


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Free bytes of the folder in memory and of the one for temporary files, in this order."""
    free = {tmp_path / "memory": SIZE + 1, tmp_path / "disk": SIZE + 1}
    for folder in free:
        folder.mkdir()
    memory, disk = free
    monkeypatch.setattr(subprocess_generator, "MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free[folder]))
    return free


def test_weights_go_through_memory_where_it_holds_them(rooms: dict[Path, int]) -> None:
    memory, disk = rooms
    for room in (memory, disk):
        told = Told()
        told.refresh(WEIGHTS)
        ((path, found),) = told.seen
        assert (
            path.parent == room
            and found.keys() == WEIGHTS.keys()
            and all(found[name].equal(WEIGHTS[name]) for name in found)
        )
        assert list(memory.iterdir()) == list(disk.iterdir()) == []
        rooms[memory] = SIZE


def test_weights_that_have_no_room_are_one_sentence(
    rooms: dict[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = rooms
    sentence = f"neither {memory} nor {disk} has the 0.0 GB .* name a larger folder in TMPDIR, or set policy.rollout_backend=transformers"

    def full(*_: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(subprocess_generator, "save_file", full)
        with pytest.raises(ResourceError, match=sentence):
            Told().refresh(WEIGHTS)
    rooms.update(dict.fromkeys(rooms, SIZE))
    with pytest.raises(ResourceError, match=sentence):
        Told().refresh(WEIGHTS)
    assert list(memory.iterdir()) == list(disk.iterdir()) == []
