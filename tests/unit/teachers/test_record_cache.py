"""The step `cache-teacher` with records: the same for every division into shards and batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.data.batches import collate
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.sampled_logits import SampledCodec
from pocl_ds.models.load import load_model
from pocl_ds.runtime.hashing import token_keys
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.teachers.cache_step import cache_teacher
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

TEMPERATURES, SEED, ROWS = (1.0, 2.0), 5, range(7)
MODES = ["cached_topk", "cached_sampled"]


def write_cache(
    folder: Path, model: Path, mode: Any, shard: int | None = None, **config: Any
) -> RunDirectory:
    """The step on 7 samples of different lengths."""
    run, source = RunDirectory(folder), np.random.default_rng(1)
    if not run.data.is_dir():
        run.data.mkdir(parents=True)
        sequences = [source.integers(5, 300, 9 + 4 * row).tolist() for row in ROWS]
        save_split(run.data, "train", [f"s{row}" for row in ROWS], sequences, [3] * len(ROWS))
        save_split(run.data, "validation", ["v"], sequences[:1], [3])
    cache_teacher(
        run,
        teacher=TeacherConfig(model=str(model), mode=mode),
        student=StudentConfig(model=str(model)),
        config=TeacherCacheConfig(top_k=6, num_samples=9, **config),
        usage=TeacherUsage(1.0, TEMPERATURES),
        seed=SEED,
        fingerprint="f",
        model_fingerprints={"teacher": "f"},
        shard=shard,
    )
    return run


def cached(run: RunDirectory) -> tuple[TeacherCache, RecordCodec, Tensor]:
    """The cache, its codec, and the records of all rows of the training split."""
    split = TokenizedSplit.open(run.data, "train")
    cache = open_cache(run.teacher_cache, "f", "teacher", [split])
    with CachedTeacher(cache).head() as head:
        assert isinstance(head, RecordCodec)
    return cache, head, cache.read("train", tuple(ROWS))


@pytest.mark.parametrize("mode", MODES)
def test_shards_and_batches_do_not_change_the_records(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    _, codec, records = cached(write_cache(tmp_path / "a", tiny_llama, mode))
    other = {"shards": 3, "max_batch_tokens": 40}
    # Shard 1 first, then all that are missing.
    write_cache(tmp_path / "b", tiny_llama, mode, shard=1, **other)
    assert read_manifest(RunDirectory(tmp_path / "b").teacher_cache) is None
    _, same_codec, same_records = cached(write_cache(tmp_path / "b", tiny_llama, mode, **other))
    assert codec == same_codec and codec.mode == mode
    # Other batches round the logits differently.
    (header, ids, distances), (same_header, same_ids, same_distances) = (
        codec.unpack(part) for part in (records, same_records)
    )
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(header, same_header, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distances, same_distances, rtol=0, atol=1e-3)


def test_the_draws_are_those_of_seed_sample_and_token(tiny_llama: Path, tmp_path: Path) -> None:
    run = write_cache(tmp_path, tiny_llama, "cached_sampled")
    _, codec, records = cached(run)
    assert isinstance(codec, SampledCodec)
    split, row = TokenizedSplit.open(run.data, "train"), 4
    batch = collate(split, [row])
    with torch.no_grad():
        logits = load_model(str(tiny_llama))(batch.input_ids).logits[0, batch.positions]
    start = int(split.loss_tokens[:row].sum())
    keys = token_keys(SEED, [b"s4"], [len(logits)])
    expected = codec.decode(codec.encode(logits[:, : codec.size], keys), 2.0)
    actual = codec.decode(records[start : start + len(logits)], 2.0)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "names", "sentence"),
    [
        ("cached_topk", {"mass", "kl"}, "the top 6 leave out a probability of"),
        ("cached_sampled", {"gradient_error", "unique_ids"}, "9 draws give"),
    ],
)
def test_the_manifest_and_the_log_have_what_records_lose(
    mode: str,
    names: set[str],
    sentence: str,
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="pocl_ds"):
        run = write_cache(tmp_path, tiny_llama, mode, shards=2)
    (path,) = run.teacher_cache.glob("*/manifest.json")
    manifest = read_manifest(path.parent)
    assert manifest and [row.pop("temperature") for row in manifest.info["error"]] == [1.0, 2.0]
    assert all(set(row) == names and min(row.values()) > 0 for row in manifest.info["error"])
    assert f"cache-teacher: at temperature 2.00 {sentence}" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_record_is_found(mode: str, tiny_llama: Path, tmp_path: Path) -> None:
    run = write_cache(tmp_path, tiny_llama, mode)
    (path,) = run.teacher_cache.glob("*/train-00000-of-00001.bin")
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    split = TokenizedSplit.open(run.data, "train")
    cache = open_cache(run.teacher_cache, "f", "teacher", [split])
    damage = cache.find_damage("train", np.array(ROWS))
    assert damage and f"{path} is damaged at row 6 of train" in damage
