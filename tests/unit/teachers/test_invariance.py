"""A teacher that depends on the batch is not cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_dependence import make_batch_dependent

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.data.batches import collate
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ModelError
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.load import load_model
from pocl_ds.models.log_probs import response_log_probs
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.teachers.cache_step import cache_teacher
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

LENGTHS, PROMPT = (90, 20, 64, 65, 40, 30), 5


def sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[int(token) for token in draw.integers(2, 300, length)] for length in LENGTHS]


def write_cache(folder: Path, model: Path, attention: Any, mode: Any) -> RunDirectory:
    run = RunDirectory(folder)
    run.data.mkdir(parents=True)
    names = [f"s{row}" for row in range(len(LENGTHS))]
    save_split(run.data, "train", names, sequences(), [PROMPT] * len(LENGTHS))
    save_split(run.data, "validation", names[:1], sequences()[:1], [PROMPT])
    cache_teacher(
        run,
        teacher=TeacherConfig(model=str(model), mode=mode, attn_implementation=attention),
        student=StudentConfig(model=str(model)),
        config=TeacherCacheConfig(),
        usage=TeacherUsage(visits_per_sample=2.0),
        seed=0,
        fingerprint="f",
        model_fingerprints={"teacher": "f"},
    )
    return run


@pytest.mark.parametrize("attention", ["sdpa", PER_SAMPLE])
@pytest.mark.parametrize("mode", ["cached_hidden_states", "auto"])
def test_a_teacher_that_depends_on_its_batch_is_not_cached(
    attention: str, mode: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch_dependent(monkeypatch)
    with pytest.raises(
        ModelError,
        match=r"^cache-teacher: the teacher \S+: the cross-entropy of sample s\d \(\d+ response "
        r"tokens\) is [\d.]+ nats alone and [\d.]+ in a batch of 4, [\d.]+ nats a token apart, "
        r"where rounding in float32 explains 0.0010: set teacher.attn_implementation=eager, or "
        r"choose another teacher$",
    ):
        write_cache(tmp_path, tiny_llama, attention, mode)
    assert not list(RunDirectory(tmp_path).teacher_cache.glob("**/*.json"))


@pytest.mark.parametrize("attention", ["sdpa", PER_SAMPLE])
def test_a_longrope_teacher_gives_each_sample_what_it_gives_it_alone(
    attention: str, tiny_longrope: Path, tmp_path: Path
) -> None:
    run = write_cache(tmp_path, tiny_longrope, attention, "cached_hidden_states")
    (path,) = run.teacher_cache.glob("*/manifest.json")
    manifest = read_manifest(path.parent)
    assert manifest and manifest.info["batch_invariance"]["samples"] == 4
    assert manifest.info["batch_invariance"]["largest_difference"] < 1e-5

    # The cached states give the log-probabilities of each sample alone.
    split, model = TokenizedSplit.open(run.data, "train"), load_model(str(tiny_longrope))
    teacher = CachedTeacher(open_cache(run.teacher_cache, "f", "teacher", [split]))
    for row, sequence in enumerate(sequences()):
        batch = collate(split, [row])
        with teacher.head() as head:
            assert isinstance(head, OutputHead)
            log_p = head.logits(teacher.outputs(batch)).log_softmax(-1)
        found = log_p.gather(1, batch.labels[:, None])[:, 0].detach().numpy()
        (expected,) = response_log_probs(model, [sequence], [PROMPT], [np.arange(1)])
        np.testing.assert_allclose(found, expected, atol=2e-5)
