"""How weights reach a generator in another process."""

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

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ResourceError
from pocl_ds.generation import subprocess_generator
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import FILE_OVERHEAD, SubprocessGenerator

Usage = namedtuple("Usage", "free")
WEIGHTS = {"a": torch.arange(1000.0), "b": torch.ones(3, 4).T}
SIZE = 4 * (1000 + 12) + FILE_OVERHEAD


class RecordingGenerator(SubprocessGenerator):
    """Has no process, and records the weights that it would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[Path, dict[str, torch.Tensor]]] = []
        self.weight_transfer = "file"

    def _call(self, method: str, *arguments: Any, **_: Any) -> None:
        assert method == "load_weights"
        self.sent.append((Path(arguments[0]), load_file(arguments[0])))


@pytest.fixture
def free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Free bytes of the folder in memory and of the one for temporary files, in this order."""
    free = {tmp_path / "memory": SIZE + 1, tmp_path / "disk": SIZE + 1}
    for folder in free:
        folder.mkdir()
    memory, disk = free
    monkeypatch.setattr(subprocess_generator, "SHARED_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free[folder]))
    return free


def test_weights_pass_through_shared_memory_if_it_has_room(free_bytes: dict[Path, int]) -> None:
    memory, disk = free_bytes
    for folder in (memory, disk):
        generator = RecordingGenerator()
        generator.load_weights(WEIGHTS.items())
        ((path, weights),) = generator.sent
        assert (
            path.parent == folder
            and weights.keys() == WEIGHTS.keys()
            and all(weights[name].equal(WEIGHTS[name]) for name in weights)
        )
        assert list(memory.iterdir()) == list(disk.iterdir()) == []
        free_bytes[memory] = SIZE


def test_no_room_for_weights_is_one_sentence(
    free_bytes: dict[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = free_bytes
    sentence = (
        rf"neither {memory} nor {disk} has [\d.]+ k?B free .* set TMPDIR to a larger directory, "
        "or set policy.rollout_backend=transformers"
    )

    def raise_disk_full(*_: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(subprocess_generator, "save_file", raise_disk_full)
        with pytest.raises(ResourceError, match=sentence):
            RecordingGenerator().load_weights(WEIGHTS.items())
    free_bytes.update(dict.fromkeys(free_bytes, SIZE))
    with pytest.raises(ResourceError, match=sentence):
        RecordingGenerator().load_weights(WEIGHTS.items())
    assert list(memory.iterdir()) == list(disk.iterdir()) == []


def test_progress_passes_from_the_child_to_the_parent(tiny_llama: Path) -> None:
    config = GenerationConfig(backend="transformers", max_num_seqs=2)
    generator = SubprocessGenerator(str(tiny_llama), config, max_length=64, threads=1, device=None)
    events: list[int] = []
    responses = generator.generate_ids(
        [[5, 6], [7, 8], [9]], SamplingParams(0.0, 1.0, 6, seed=0), events.append
    )
    generator.close()
    assert len(responses) == sum(events) == 3 and len(events) >= 6
    assert generator.processed_tokens == sum(map(len, responses))
