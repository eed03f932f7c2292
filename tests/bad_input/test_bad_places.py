"""Run directories, environments and commands that are refused: one sentence each, and existing
files do not change.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from manifests import edit_manifest
from refusals import error_message, files_below

from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.resources import DS_CONFIGS, PROFILES
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.steps import fingerprints

ROOT = Path(__file__).resolve().parents[2]
NOBODY_UID = 65534


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: x\nteacher: {{model: t}}\nstudent: {{model: s}}\ndata: {{source: "
        f"{tmp_path / 'd.jsonl'}}}\n"
    )
    return path


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    """A run directory whose step `preprocess` is finished according to its manifest."""
    folder, parsed = tmp_path / "run", load_recipe(str(recipe))
    (folder / "data").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(parsed))
    (folder / "data" / "train.jsonl").write_text("{\n")
    write_manifest(
        folder / "data",
        "preprocess",
        fingerprints(parsed)["preprocess"],
        info={"splits": {"train": {"samples": 500}, "validation": {"samples": 20}}},
    )
    return folder


def overwrite_manifest(**fields: Any) -> Callable[[Path], Any]:
    """Overwrite fields of the manifest of `data`."""

    def write(run: Path) -> None:
        edit_manifest(run / "data" / "manifest.json", **fields)

    return write


def overwrite_file(name: str, text: str) -> Callable[[Path], Any]:
    """Overwrite a file of the run directory."""

    def write(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)

    return write


FOREIGN_MANIFEST = (
    "RUN/data/manifest.json is not a manifest of this program: choose another --run-dir"
)
# How the run directory is damaged, the command and its arguments, and the error message.
RUNS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "of another recipe": (
        lambda run: None,
        ("run", "data.test_fraction=0.2"),
        "run directory RUN holds the finished step 'preprocess' of another recipe (changed: "
        "data.test_fraction): choose another --run-dir, or undo the change",
    ),
    "half a manifest": (
        overwrite_file("data/manifest.json", "{"),
        ("run",),
        "RUN/data/manifest.json is damaged (Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)): remove it and run its step again",
    ),
    "a manifest that is nested without end": (
        overwrite_file("data/manifest.json", "[" * 100_000),
        ("run",),
        "RUN/data/manifest.json is damaged (maximum recursion depth exceeded while decoding a "
        "JSON array from a unicode string): "
        "remove it and run its step again",
    ),
    "a list as manifest": (overwrite_file("data/manifest.json", "[]"), ("run",), FOREIGN_MANIFEST),
    "files as a list": (overwrite_manifest(files=[]), ("run",), FOREIGN_MANIFEST),
    "files without sizes": (overwrite_manifest(files={"a": {}}), ("run",), FOREIGN_MANIFEST),
    "a manifest of the future": (
        overwrite_manifest(schema=9),
        ("run",),
        "RUN/data/manifest.json has schema 9 and this program writes 1: choose another --run-dir",
    ),
    "a recipe that is none": (
        overwrite_file("recipe.yaml", "a: ["),
        ("run",),
        "RUN/recipe.yaml line 1 is not valid YAML (expected the node content, but found '<stream "
        "end>'): fix it",
    ),
    "models that are none": (
        overwrite_file("models/models.json", "[]"),
        ("score",),
        "RUN/models/models.json is damaged (it names no student): remove its folder and run `pocl "
        "init-student` again",
    ),
    "no models": (
        lambda run: None,
        ("score",),
        "RUN/models/models.json is missing: run the step that writes it",
    ),
    "no order": (
        lambda run: None,
        ("plan",),
        "RUN/ranking/order.npy is missing: run `pocl rank` first",
    ),
    "no training": (
        lambda run: None,
        ("export",),
        "RUN/train/final is missing or unfinished: finish `pocl train` first",
    ),
    "a folder as lock": (
        lambda run: (run / ".lock").mkdir(),
        ("run",),
        "RUN/.lock cannot be written (Is a directory: RUN/.lock): choose another --run-dir or move "
        "the file that is in the way",
    ),
    "a file as logs": (
        overwrite_file("logs", ""),
        ("score",),
        "RUN/logs/score.log cannot be written (File exists: RUN/logs): choose another --run-dir "
        "or move the file that is in the way",
    ),
    "an unknown ds_config": (
        lambda run: None,
        ("run", "student.ds_config=none"),
        "ds_config 'none' is neither a file nor one of "
        "student_zero2, student_zero3, student_zero3_nodes, student_zero3_offload, "
        "student_zero3_overlap, teacher_zero3, teacher_zero3_offload, teacher_zero3_overlap: check "
        "the name",
    ),
    "half a ds_config": (
        overwrite_file("logs/ds.json", "{"),
        ("run", "student.ds_config=RUN/logs/ds.json"),
        "ds_config RUN/logs/ds.json is not "
        "valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char "
        "1)): fix the file",
    ),
    "a list as ds_config": (
        overwrite_file("logs/ds.json", "[]"),
        ("run", "teacher.ds_config=RUN/logs/ds.json"),
        f"ds_config RUN/logs/ds.json must be an object: start from one in {DS_CONFIGS}",
    ),
    "a number as a section": (
        overwrite_file("logs/ds.json", '{"optimizer": 3}'),
        ("run", "student.ds_config=RUN/logs/ds.json"),
        f"ds_config RUN/logs/ds.json: optimizer must be an object: start from one in {DS_CONFIGS}",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_run_directories(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, (command, *words), expected = RUNS[case]
    damage(run)
    contents = {name: (run / name).read_bytes() for name in files_below(run) - {"recipe.yaml"}}
    message = error_message(
        capsys, command, "--run-dir", run, *(word.replace("RUN", str(run)) for word in words)
    )
    assert message == expected.replace("RUN", str(run))
    written = {"recipe.yaml", "input_digests.json", ".lock", f"logs/{command}.log"}
    assert files_below(run) - written == set(contents)
    assert {name: (run / name).read_bytes() for name in contents} == contents


def test_paths_that_are_no_run_directory(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("x")
    other.mkdir()
    (other / "photo").write_text("x")
    remedy = "cannot be written ({}): choose another --run-dir or move the file that is in the way"
    for command in ("run", "preprocess"):
        message = error_message(capsys, command, recipe, "--run-dir", file)
        assert message == f"{file} {remedy.format(f'File exists: {file}')}"
        message = error_message(capsys, command, recipe, "--run-dir", file / "x")
        assert message == f"{file / 'x'} {remedy.format(f'Not a directory: {file / chr(120)}')}"
    message = error_message(capsys, "preprocess", recipe, "--run-dir", other)
    assert message == f"{other} is not empty and holds no recipe.yaml: choose another --run-dir"
    assert files_below(tmp_path) == {"d.jsonl", "r.yaml", "file", "other/photo"}
    long = tmp_path / ("a" * 300)
    for command in ("run", "preprocess"):
        assert "(File name too long" in error_message(capsys, command, recipe, "--run-dir", long)


def test_a_run_directory_in_use_by_another_process(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = error_message(capsys, "run", "--run-dir", run)
    assert message == f"{run} is in use by another pocl process: wait for it, or end it first"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users may enter, unlike the ones of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_without_permission(
    recipe: Path, open_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root has all permissions, so the commands run as the user `nobody`."""
    if os.geteuid():
        pytest.skip("only root can become nobody")
    closed, data, text = open_folder / "closed", open_folder / "d.jsonl", open_folder / "r.yaml"
    closed.mkdir(mode=0o755)
    data.write_text('{"instruction": "a", "output": "b"}\n')
    text.write_text(recipe.read_text())
    error_message(capsys, "run", text, "seed=x")  # import modules now: `nobody` may not read them
    os.seteuid(NOBODY_UID)
    try:
        denied = error_message(capsys, "run", text, "--run-dir", closed / "run")
        os.seteuid(0)
        data.chmod(0)
        os.seteuid(NOBODY_UID)
        unreadable = error_message(
            capsys, "preprocess", text, "--run-dir", open_folder / "run", f"data.source={data}"
        )
        os.seteuid(0)
        text.chmod(0)
        os.seteuid(NOBODY_UID)
        secret = error_message(capsys, "preprocess", text, "--run-dir", open_folder / "other")
    finally:
        os.seteuid(0)
    assert denied == (
        f"{closed}/run cannot be written (Permission denied): choose another --run-dir or change "
        f"its permissions"
    )
    assert (
        unreadable
        == f"{data} cannot be used (Permission denied): check its name, its permissions and its "
        f"disk"
    )
    assert secret == f"{text} cannot be read (Permission denied): check the file"
    assert not (closed / "run").exists() and not (open_folder / "other").exists()


# Environment variables that only a launcher sets, and the error message.
RANKS: dict[str, tuple[dict[str, str], str]] = {
    "a word as rank": (
        {"RANK": "one"},
        "RANK='one' is not a number: start ranks with launch/train.sh, or unset it",
    ),
    "no rank at all": (
        {"RANK": ""},
        "RANK='' is not a number: start ranks with launch/train.sh, or unset it",
    ),
    "a negative rank": (
        {"RANK": "-1"},
        "RANK='-1' is not a number: start ranks with launch/train.sh, or unset it",
    ),
    "a word as world": (
        {"WORLD_SIZE": "two"},
        "WORLD_SIZE='two' is not a number: start ranks with launch/train.sh, or unset it",
    ),
    "a rank beyond the world": (
        {"RANK": "2", "WORLD_SIZE": "2"},
        "RANK=2 is not less than WORLD_SIZE=2: start ranks with launch/train.sh, or unset both",
    ),
    "an empty world": (
        {"RANK": "0", "WORLD_SIZE": "0"},
        "RANK=0 is not less than WORLD_SIZE=0: start ranks with launch/train.sh, or unset both",
    ),
    "no master address": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "MASTER_ADDR is not set, and 2 ranks need it to connect: start ranks with launch/train.sh",
    ),
    "no master port": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        "MASTER_PORT is not set, and 2 ranks need it to connect: start ranks with launch/train.sh",
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks(
    case: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables, expected = RANKS[case]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert error_message(capsys, "preprocess", recipe, "--run-dir", tmp_path / "run") == expected
    assert not (tmp_path / "run").exists()


def test_another_python(tmp_path: Path) -> None:
    """launch/setup.sh in a copy of the tree, with a Python 3.9 and with a missing interpreter."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (old, tmp_path / "nowhere"):
        process = subprocess.run(
            ["bash", str(tmp_path / "launch" / "setup.sh")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(python), "POCL_STACK": "cpu"},
        )
        assert process.returncode == 2
        assert process.stderr == (
            f"launch/setup.sh: PYTHON={python} is not a Python 3.10, 3.11 or 3.12: name one, or "
            f"leave PYTHON unset\n"
        )
        assert not (tmp_path / ".venv").exists()


NO_RUN = "HERE is not a run directory: check the path"
NOT_SUBMITTED = "HERE was never submitted: run `pocl submit RECIPE --profile NAME --run-dir HERE`"
# Arguments, and the error messages for a missing folder and for an empty one.
COMMANDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "compare": (
        ("--run-dir", "HERE", "--models", "baseline", "student"),
        NO_RUN,
        "HERE has no finished evaluation: run `pocl evaluate --run-dir HERE` first",
    ),
    "inspect": (
        ("--run-dir", "HERE"),
        NO_RUN,
        "HERE/data holds no finished data: run `pocl preprocess` first",
    ),
    "push": (
        ("--run-dir", "HERE", "--repo", "a/b"),
        NO_RUN,
        "HERE/export holds no finished export: run `pocl export` first, or name its folder with "
        "--folder",
    ),
    "watch": (
        ("--run-dir", "HERE"),
        *["HERE holds no recipe.yaml: give the directory of a run"] * 2,
    ),
    "status": (("--run-dir", "HERE"), NO_RUN, NOT_SUBMITTED),
    "resume": (("--run-dir", "HERE"), NO_RUN, NOT_SUBMITTED),
    "logs": (
        ("--run-dir", "HERE"),
        NO_RUN,
        "there is no log HERE/logs/*-*.log yet: see `pocl status --run-dir HERE`",
    ),
    "report": (
        ("--run-dir", "HERE", "--run-dir", "elsewhere"),
        *["HERE is not a run directory: it has no recipe.yaml"] * 2,
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, *expected = COMMANDS[command]
    here = tmp_path / "here"
    for expected_message in expected:
        assert error_message(
            capsys, command, *(word.replace("HERE", str(here)) for word in words)
        ) == expected_message.replace("HERE", str(here))
        assert files_below(here) == set()
        here.mkdir(exist_ok=True)


# Content of a file, and the error message for it as a study and as a profile.
OTHER_FILES: dict[str, tuple[bytes, str, str]] = {
    "no YAML": (
        b"a: [",
        *[
            "FILE line 1 is not valid YAML (expected the node content, but found '<stream end>'): "
            "fix it"
        ]
        * 2,
    ),
    "no UTF-8": (b"\xff", *["FILE is not UTF-8 (invalid start byte in line 1): convert it"] * 2),
    "a list": (
        b"[]",
        "FILE has no fields: start from a shipped study in launch/studies/",
        f"profile FILE has no fields: start from one in {PROFILES}, or from `pocl profile detect`",
    ),
    "a key twice": (
        b"name: x\nname: y\n",
        *["FILE line 2 is not valid YAML (the key 'name' appears twice): fix it"] * 2,
    ),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_studies_and_profiles(
    case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, study, profile = OTHER_FILES[case]
    file, run = tmp_path / "f.yaml", tmp_path / "run"
    file.write_bytes(content)
    assert error_message(capsys, "study", file, "--run-dir", run) == study.replace(
        "FILE", str(file)
    )
    assert error_message(
        capsys, "submit", recipe, "--profile", file, "--run-dir", run
    ) == profile.replace("FILE", str(file))
    assert not run.exists()


def test_names_of_studies_profiles_and_benchmarks(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nope", "a" * 300):
        assert error_message(capsys, "study", name).startswith(
            f"study '{name}' is neither a file nor a shipped study ("
        )
        assert error_message(capsys, "submit", recipe, "--profile", name).startswith(
            f"profile '{name}' is neither a file nor a name ("
        )
        assert error_message(capsys, "bench", name).startswith(
            f"there is no benchmark '{name}': use one of rouge, "
        )
        assert error_message(capsys, "estimate", recipe, "--gpu", name).startswith(
            f"--gpu {name}: choose one of "
        )
