"""Cached hidden states of fewer bits: what readers get, its error, and restarts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from teacher_cache_runs import (
    LENGTHS,
    TEMPERATURES,
    cache_manifest,
    open_train_cache,
    train_split,
    write_cache,
)

from pocl_ds.data.batches import collate
from pocl_ds.errors import ArtifactError
from pocl_ds.teachers.quantized_states import FILE
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.workflow.run_dir import RunDirectory

ROWS = tuple(range(len(LENGTHS)))


def states(run: RunDirectory) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that training reads, with and without prefetching, and the head."""
    teacher, split = CachedTeacher(open_train_cache(run)), train_split(run)
    batch = collate(split, ROWS)
    outputs = teacher.outputs(batch)
    assert torch.equal(teacher.outputs(teacher.read(split, batch)), outputs)
    with teacher.head() as head:
        assert head.weight.dtype == outputs.dtype == torch.float32
        return outputs, head.weight.detach().clone()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, tiny_llama_untied: Path) -> RunDirectory:
    return write_cache(tmp_path_factory.mktemp("exact"), tiny_llama_untied)


@pytest.mark.parametrize(("hidden_dtype", "limit"), [("bfloat16", 4e-3), ("int8", 1.5e-2)])
def test_training_reads_nearly_the_exact_states(
    hidden_dtype: str,
    limit: float,
    exact: RunDirectory,
    tiny_llama_untied: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="pocl_ds"):
        run = write_cache(tmp_path, tiny_llama_untied, hidden_dtype=hidden_dtype, shards=2)
    (hidden, head), (expected, exact_head) = states(run), states(exact)
    assert torch.equal(head, exact_head)
    error = (hidden - expected).norm() / (expected - expected.mean(0)).norm()
    assert 0 < error < limit
    # Bytes, and the error that the log and the manifest name.
    info, width = cache_manifest(run).info, expected.shape[1]
    per_token = {"bfloat16": 2 * width, "int8": width + 4}[hidden_dtype]
    assert info["bytes"] == info["tokens"] * per_token
    logits, exact_logits = hidden @ head.T, expected @ head.T
    for entry, temperature in zip(info["error"], TEMPERATURES, strict=True):
        p, q = ((side / temperature).double().softmax(-1) for side in (exact_logits, logits))
        kl = float((p * (p / q).log()).sum(-1).mean())
        gradient = float((p - q).square().sum(-1).mean().sqrt())
        assert entry["temperature"] == temperature
        # Those of some tokens; these are those of all.
        assert kl / 3 < entry["kl"] < 3 * kl
        assert gradient / 2 < entry["gradient_error"] < 2 * gradient
    assert f"hidden states as {hidden_dtype}: at temperature 2.00" in caplog.text


def test_a_cache_that_was_interrupted_keeps_its_calibration(
    tiny_llama_untied: Path, tmp_path: Path
) -> None:
    """Also the tasks of a job array share it."""
    config = {"hidden_dtype": "int8", "shards": 3}
    run = write_cache(tmp_path / "a", tiny_llama_untied, shard=1, **config)
    (path,) = run.teacher_cache.glob(f"*/{FILE}")
    before = path.read_bytes()
    other = RunDirectory(shutil.copytree(run.path, tmp_path / "b"))
    for folder in (run, other):
        write_cache(folder.path, tiny_llama_untied, **config)
    assert path.read_bytes() == before
    assert torch.equal(states(run)[0], states(other)[0])


@pytest.mark.parametrize("damage", [b"", None])
def test_a_damaged_calibration_is_named(
    damage: bytes | None, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    run = write_cache(tmp_path, tiny_llama_untied, hidden_dtype="int8")
    (path,) = run.teacher_cache.glob(f"*/{FILE}")
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"channels\.npy is missing or damaged .* cache-teach"):
        open_train_cache(run)
