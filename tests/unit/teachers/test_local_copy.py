"""Copies of a teacher cache on a node's disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_transfers import FINGERPRINT, SAMPLES, CacheRun, write_data
from command_line import ROOT, environment

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.teachers.local_copy import copy_cache
from pocl_ds.workflow.local_copy import expand_folder
from pocl_ds.workflow.run_dir import RunDirectory

ROWS = tuple(range(SAMPLES))


@pytest.fixture(scope="module")
def filled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with cached hidden states in 8 bits, which have all kinds of files."""
    run = write_data(tmp_path_factory.mktemp("filled"))
    CacheRun(run, tiny_llama, "cached_hidden_states", hidden_dtype="int8", shards=2).fill()
    return run


def cache_folder(run: RunDirectory) -> Path:
    (folder,) = (path for path in run.teacher_cache.iterdir() if path.is_dir())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without those that hold no data."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("[!.]*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_copy_reads_as_the_cache_and_is_used_again(filled: RunDirectory, tmp_path: Path) -> None:
    splits = [TokenizedSplit.open(filled.data, name) for name in ("train", "validation")]
    original = open_cache(filled.teacher_cache, FINGERPRINT, "teacher", splits)
    for _ in range(2):
        copy = open_cache(filled.teacher_cache, FINGERPRINT, "teacher", splits, str(tmp_path))
        assert copy.directory.parent == tmp_path
        assert torch.equal(copy.read("train", ROWS), original.read("train", ROWS))
    assert contents(copy.directory) == contents(original.directory)
    times = {path: path.stat().st_mtime_ns for path in copy.directory.glob("*.bin")}
    open_cache(filled.teacher_cache, FINGERPRINT, "teacher", splits, str(tmp_path))
    assert times == {path: path.stat().st_mtime_ns for path in times}

    # Damage during training names the copy's remedy, and the next start is it.
    path = next(path for path in times if path.name.startswith("train-00001"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damage = copy.find_damage("train", np.array(ROWS))
    assert damage and "copies it again" in damage and "pocl cache-teacher" not in damage
    copy = open_cache(filled.teacher_cache, FINGERPRINT, "teacher", splits, str(tmp_path))
    assert copy.find_damage("train", np.array(ROWS)) is None


@pytest.mark.parametrize("kind", ["truncated", "changed", "missing", "longer"])
def test_every_damaged_file_of_a_copy_is_replaced(
    kind: str, filled: RunDirectory, tmp_path: Path
) -> None:
    source, target = cache_folder(filled), tmp_path / "copy"
    copy_cache(source, target)
    expected = contents(source)
    assert contents(target) == expected
    for name, content in expected.items():
        path = target / name
        if not content and kind in ("truncated", "changed"):
            continue
        changed = content[:-1] + bytes([(content[-1:] or b"x")[0] ^ 1])
        path.unlink()
        if kind != "missing":
            path.write_bytes(
                {"truncated": content[:-1], "changed": changed, "longer": content + b"x"}[kind]
            )
    copy_cache(source, target)
    assert contents(target) == expected


def test_a_damaged_cache_is_not_copied(
    tiny_llama: Path, tmp_path: Path, filled: RunDirectory
) -> None:
    run = write_data(tmp_path / "run")
    CacheRun(run, tiny_llama, "cached_topk").fill()
    (path,) = run.teacher_cache.glob("*/train-*.bin")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{path} is damaged .its checksum differs"):
        copy_cache(path.parent, tmp_path / "copy")
    assert not (tmp_path / "copy" / path.name).exists()


def test_a_disk_that_is_too_small_is_one_sentence(
    filled: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=512))
    with pytest.raises(ResourceError, match=r"has 512 B free, and .* needs [\d.]+ [kM]B more"):
        copy_cache(cache_folder(filled), tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*"))[1:]  # only the lock


def test_variables_are_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert (
        expand_folder("$SCRATCH/x", "f")
        == expand_folder("${SCRATCH}/x", "f")
        == Path("/scratch/me/x")
    )
    assert expand_folder("~/x", "f") == Path.home() / "x"
    for name in ("$NO_SUCH/x", "/tmp/${NO_SUCH}"):
        with pytest.raises(RecipeError, match="NO_SUCH.* is not set on"):
            expand_folder(name, "f")
    with pytest.raises(RecipeError, match="scratch/x is not an absolute path"):
        expand_folder("scratch/x", "f")


def copy_in_process(source: Path, target: Path, prelude: str = "") -> subprocess.Popen[str]:
    """Call `copy_cache` in its own process, which prints what it copies."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from pocl_ds.teachers.local_copy import copy_cache\n"
        "from pocl_ds.workflow import local_copy\n"
        "copy, names = local_copy._copy_file, []\n"
        f"{prelude}\n"
        "def copied(source, *rest):\n"
        "    names.append(source.name); copy(source, *rest)\n"
        "local_copy._copy_file = copied\n"
        "copy_cache(Path(sys.argv[1]), Path(sys.argv[2])); print(len(names))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(target)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_of_two_processes_one_copies(filled: RunDirectory, tmp_path: Path) -> None:
    source, target = cache_folder(filled), tmp_path / "copy"
    processes = [copy_in_process(source, target) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    counts = sorted(int(output.split()[-1]) for output, _ in outputs)
    assert counts == [0, len(contents(source))] and contents(target) == contents(source)


def test_a_killed_copy_continues(filled: RunDirectory, tmp_path: Path) -> None:
    source, target = cache_folder(filled), tmp_path / "copy"
    # Killed while the third file is written under its temporary name.
    prelude = (
        "replace, calls = os.replace, []\n"
        "def killed(*names):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*names)\n"
        "os.replace = killed\n"
    )
    process = copy_in_process(source, target, prelude)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert len([name for name in contents(target) if not Path(name).name.startswith(".")]) == 2
    times = {path: path.stat().st_mtime_ns for path in target.glob("[!.]*") if path.is_file()}
    copy_cache(source, target)
    assert contents(target) == contents(source)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert os.listdir(target).count(".lock") == 1
