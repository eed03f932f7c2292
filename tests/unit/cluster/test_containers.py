"""Containers: what is mounted, images that are imported once, and the image definition."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import ROOT

from pocl_ds.cluster.container_checks import check_container
from pocl_ds.cluster.containers import import_image
from pocl_ds.cluster.profile import check_profile
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError, ResourceError

DOCKERFILE = ROOT / "slurm" / "Dockerfile"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and an image, in folders of their own."""
    folder = tmp_path_factory.mktemp("files")
    tiny_models.llama(folder / "models" / "s", layers=1)
    for name in ("data/d.jsonl", "images/pocl.sqsh", "templates/t.jinja"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return folder


def check(files: Path, mounts: list[str], runtime: str = "pyxis", **changes: Any) -> None:
    """Check a recipe that reads all of these files, in a container with these mounts."""
    image = changes.pop("image", str(files / "images" / "pocl.sqsh"))
    container = {"runtime": runtime, "image": image, "mounts": mounts}
    environment = changes.pop("environment", {})
    profile = {"name": "x", "container": container, **changes.pop("profile", {})}
    recipe = {
        "name": "x",
        "student": {"model": str(files / "models" / "s")},
        "teacher": {"model": str(files / "models" / "s")},
        "data": {"source": str(files / "data" / "d.jsonl")},
        **changes,
    }
    check_container(
        check_profile(profile, "x"), check_recipe(recipe), (Path("/shared/run"),), environment
    )


def mount(*folders: object) -> list[str]:
    return [f"{folder}:{folder}" for folder in folders]


def test_all_that_jobs_read_must_be_mounted(files: Path) -> None:
    mounts = mount(files / "models", files / "data")
    check(files, mounts)
    with pytest.raises(RecipeError, match=r"data.source: .*/data/d.jsonl is not mounted .* add "):
        check(files, mounts[:1])
    with pytest.raises(RecipeError, match=r"the model .*/models/s is not mounted"):
        check(files, mounts[1:])
    # Under another name the recipe's path does not exist inside.
    with pytest.raises(RecipeError, match=rf"add {files}/data:{files}/data to the profile's"):
        check(files, [mounts[0], f"{files}/data:/data"])
    template = {"template": str(files / "templates" / "t.jinja")}
    with pytest.raises(RecipeError, match=r"prompt.template: .* is not mounted"):
        check(files, mounts, prompt=template)
    check(files, mount(files), prompt=template)
    with pytest.raises(RecipeError, match=r"the profile's scratch: /local is not mounted"):
        check(files, mounts, profile={"scratch": "/local/$USER"})
    check(files, [*mounts, "/local:/local"], profile={"scratch": "/local/$USER"})


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("adapter", "the model .*/adapter: .*/adapter is not mounted"),
        ("base", "the base of the model .*/adapter: .*/base is not mounted"),
        ("cache", "the model .*/adapter, converted: .*/cache is not mounted"),
        ("hub", "HF_HOME: /shared/hf is not mounted"),
    ],
)
def test_an_adapter_and_its_base_must_be_mounted(
    missing: str, problem: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    folders = {name: tmp_path / name for name in ("adapter", "base", "cache")}
    for folder in folders.values():
        folder.mkdir()
    base = "org/base" if missing == "hub" else str(folders["base"])
    (folders["adapter"] / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base})
    )
    student = {"student": {"model": str(folders["adapter"])}}
    hub = {"HF_HOME": "/shared/hf"}
    mounts = mount(files, *folders.values())
    check(files, [*mounts, "/shared:/shared"], environment=hub, **student)
    folders.pop(missing, None)
    with pytest.raises(RecipeError, match=problem):
        check(files, mount(files, *folders.values()), environment=hub, **student)


def test_the_cache_of_the_hub_must_be_mounted_if_it_is_read(files: Path) -> None:
    hub: dict[str, Any] = {"student": {"model": "org/student"}}
    mounts = mount(files)
    with pytest.raises(RecipeError, match="HF_HOME: /shared/hf is not mounted"):
        check(files, mounts, environment={"HF_HOME": "/shared/hf"}, **hub)
    check(files, [*mounts, "/shared:/shared"], environment={"HF_HOME": "/shared/hf"}, **hub)
    # apptainer and singularity mount the home folder by default, and pyxis does not.
    check(files, mounts, "apptainer", **hub)
    with pytest.raises(RecipeError, match=r"HF_HOME: .*/.cache/huggingface is not mounted"):
        check(files, mounts, **hub)


def test_an_image_file_must_exist(files: Path) -> None:
    with pytest.raises(RecipeError, match="container.image: /nowhere/x.sif does not exist here"):
        check(files, mount(files), image="/nowhere/x.sif")
    check(files, mount(files), image="docker://pocl:latest")


def write_runtime(folder: Path, body: str) -> None:
    (folder / "apptainer").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "apptainer").chmod(0o755)


def test_an_image_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    container = {"runtime": "apptainer", "image": "docker://pocl:1"}
    images = tmp_path / "images"
    write_runtime(tmp_path, "echo 'manifest unknown' >&2; echo half > \"$3\"; exit 255")
    with pytest.raises(ResourceError, match=r"cannot import docker://pocl:1 \(manifest unknown\)"):
        import_image(container, images)
    write_runtime(tmp_path, f'echo "$*" >> {tmp_path}/calls; echo image > "$3"')
    first = import_image(container, images)
    assert import_image(container, images) == first and Path(first).read_text() == "image\n"
    assert (tmp_path / "calls").read_text().count("pull --force") == 1
    assert import_image({**container, "image": "docker://pocl:2"}, images) != first
    # Files are used as they are, and pyxis imports names itself.
    assert import_image({**container, "image": "/a.sif"}, images) == "/a.sif"
    pyxis = {"runtime": "pyxis", "image": "docker://pocl:1"}
    assert import_image(pyxis, images) == "docker://pocl:1"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ResourceError, match="apptainer cannot be started"):
        import_image({**container, "image": "docker://pocl:3"}, images)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments, with continued lines joined."""
    lines = re.sub(r"\\\n", "", text).splitlines()
    found = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(name, arguments) for name, arguments in found]


def test_the_image_has_what_the_set_up_and_the_package_need(tmp_path: Path) -> None:
    """Its copied files alone are a checkout that setup.sh accepts and whose wheel can be built."""
    parsed = instructions(DOCKERFILE.read_text())
    names = [name for name, _ in parsed]
    assert names[0] == "FROM" and set(names) <= {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY"}
    for name, arguments in parsed:
        if name != "COPY":
            continue
        *sources, target = arguments.split()
        for source in sources:
            path, copy = ROOT / source, tmp_path / (source if target == "./" else target)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    script = tmp_path / "launch" / "setup.sh"
    process = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "Create .venv" in process.stdout
    process = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "build", "--wheel", "--offline", "--no-build-isolation"),
            *("--out-dir", str(tmp_path / "wheel"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / "wheel").glob("pocl_ds-*.whl"))) == 1


def test_shellcheck_accepts_the_image_definition(tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (launch/setup.sh --dev installs it)")
    script = tmp_path / "run.sh"
    commands = [body for name, body in instructions(DOCKERFILE.read_text()) if name == "RUN"]
    assert len(commands) == 2
    script.write_text("\n".join(["#!/bin/sh", "STACK=cuda", *commands]) + "\n")
    process = subprocess.run([checker, str(script)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
