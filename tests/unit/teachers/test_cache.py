"""The teacher cache on disk: reads return what was written, and damage is detected."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.teachers.cache import TeacherCache, write_rows
from pocl_ds.teachers.cache_shard import STEP, CacheShard
from pocl_ds.workflow.manifest import write_manifest

FINGERPRINT = "f" * 64


def write_split(folder: Path, sizes: list[tuple[int, int]]) -> TokenizedSplit:
    """Write a split of samples with these numbers of (prompt, response) tokens."""
    tokens = itertools.count()
    sequences = [list(itertools.islice(tokens, sum(size))) for size in sizes]
    names = [f"s{i}" for i in range(len(sizes))]
    save_split(folder, "train", names, sequences, [prompt for prompt, _ in sizes])
    return TokenizedSplit.open(folder, "train")


def write_cache(
    folder: Path,
    split: TokenizedSplit,
    shards: int,
    dtype: str,
    width: int = 5,
    cached: NDArray[np.int64] | None = None,
) -> list[torch.Tensor]:
    """Write random states of every row, or of those in `cached`, in descending order of rows, as
    ranks may do.
    """
    source = torch.Generator().manual_seed(3)
    states = [
        torch.randn(int(count), width, generator=source).to(getattr(torch, dtype))
        for count in split.loss_tokens
    ]
    cached = np.arange(len(split)) if cached is None else cached
    write_rows(folder, "train", cached)
    for number in range(shards):
        shard = CacheShard.for_split(folder, split, cached, number, shards, width, dtype)
        shard.allocate()
        stream = os.open(shard.path, os.O_WRONLY)
        checksums = {row: shard.write(stream, row, states[row]) for row in reversed(shard.rows)}
        os.close(stream)
        np.save(shard.checksum_path, np.array([checksums[row] for row in shard.rows], np.uint32))
        write_manifest(
            folder,
            STEP,
            FINGERPRINT,
            name=shard.manifest_name,
            files=[shard.path, shard.checksum_path],
        )
    write_manifest(
        folder, STEP, FINGERPRINT, info={"shards": shards, "width": width, "dtype": dtype}, files=[]
    )
    return states


SIZES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=9)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(
    sizes=SIZES,
    shards=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    data=st.data(),
)
def test_reads_return_what_was_written(
    sizes: list[tuple[int, int]],
    shards: int,
    dtype: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    split = write_split(folder, sizes)
    cached = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1)))), np.int64)
    states = write_cache(folder, split, shards, dtype, cached=cached)
    cache = TeacherCache(folder, [split], fingerprint=FINGERPRINT)
    rows = data.draw(st.lists(st.sampled_from(cached.tolist()), max_size=6)) if len(cached) else []
    outputs = cache.read("train", tuple(rows))
    expected = torch.cat([states[row] for row in rows]) if rows else outputs
    assert outputs.dtype == getattr(torch, dtype) and outputs.shape == (
        sum(len(states[row]) for row in rows),
        5,
    )
    assert torch.equal(outputs, expected)
    first = data.draw(st.integers(0, len(outputs)))
    tokens = slice(first, data.draw(st.integers(first, len(outputs))))
    assert torch.equal(cache.read("train", tuple(rows), tokens), outputs[tokens])
    assert cache.find_damage("train", np.array(rows, np.int64)) is None
    for row in sorted(set(range(len(sizes))) - set(cached.tolist())):
        message = cache.find_damage("train", np.array([*rows, row], np.int64))
        assert message and f"has no outputs of row {row} of train" in message


def test_a_changed_bit_is_reported_with_its_row(tmp_path: Path) -> None:
    split = write_split(tmp_path, [(2, 3), (1, 4), (3, 2), (2, 2)])
    write_cache(tmp_path, split, 2, "float32")
    path = tmp_path / "train-00001-of-00002.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    cache = TeacherCache(tmp_path, [split], fingerprint=FINGERPRINT)
    assert cache.find_damage("train", np.array([0, 1, 2])) is None
    message = cache.find_damage("train", np.array([0, 3]))
    assert message and "at row 3 of train" in message and "pocl cache-teacher" in message


def test_a_missing_cache_or_shard_is_reported(tmp_path: Path) -> None:
    split = write_split(tmp_path, [(2, 3), (1, 4)])
    with pytest.raises(ArtifactError, match="no complete cache.*pocl cache-teacher"):
        TeacherCache(tmp_path, [split], fingerprint=FINGERPRINT)
    write_cache(tmp_path, split, 2, "float32")
    with pytest.raises(ArtifactError, match="no complete cache of this teacher"):
        TeacherCache(tmp_path, [split], fingerprint="0" * 64)
    (tmp_path / "train-00000-of-00002.bin").unlink()
    with pytest.raises(ArtifactError, match="train-00000-of-00002.bin is missing"):
        TeacherCache(tmp_path, [split], fingerprint=FINGERPRINT)


def test_a_full_disk_shows_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_split(tmp_path, [(2, 3)])
    shard = CacheShard.for_split(tmp_path, split, np.arange(1), 0, 1, 5, "float32")

    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", raise_disk_full)
    with pytest.raises(ResourceError, match=r"disk is full"):
        shard.allocate()
    assert not shard.path.exists()
