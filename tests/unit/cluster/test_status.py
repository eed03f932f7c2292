"""The progress of a job array in `pocl status`."""

from __future__ import annotations

from pathlib import Path

from pocl_ds.cluster.status import _progress
from pocl_ds.workflow.run_dir import RunDirectory


def test_a_shard_of_the_cache_is_finished_when_that_of_each_teacher_is(tmp_path: Path) -> None:
    run, spec = RunDirectory(tmp_path), {"array": [0, 1]}
    assert _progress(run, "cache-teacher", spec, {}) == "0/2 shards"
    first, second = (run.teacher_cache / name for name in ("a", "b"))
    for folder in (first, second):
        folder.mkdir(parents=True)
    (run.teacher_cache / "manifest.json").touch()
    for folder, number, expected in ((first, 0, 0), (first, 1, 0), (second, 1, 1), (second, 0, 2)):
        (folder / f"train-{number:05d}-of-00002.manifest.json").touch()
        assert _progress(run, "cache-teacher", spec, {}) == f"{expected}/2 shards"
