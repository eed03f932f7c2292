"""Push: exactly the exported files are uploaded, and the token is never shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.evaluation.export import export
from pocl_ds.evaluation.push import push
from pocl_ds.workflow.files import MARK
from pocl_ds.workflow.run_dir import RunDirectory

TOKEN = "hf_tok_0123456789"


@pytest.fixture
def folder(run: RunDirectory, recipe: str) -> Path:
    return export(run, out=None, recipe_yaml=recipe, fingerprint="x")


class Hub:
    """A stand-in for HfApi that records calls."""

    calls: list[tuple[str, Any]] = []
    fault: Exception | None = None
    private = True

    def __init__(self, token: str) -> None:
        Hub.calls = [("token", token)]

    def create_repo(self, name: str, **options: Any) -> None:
        Hub.calls.append(("create", (name, options)))

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=Hub.private)

    def upload_folder(self, **options: Any) -> None:
        if Hub.fault:
            raise Hub.fault
        Hub.calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Hub, "fault", None)
    return Hub


def test_a_private_upload_to_a_public_repository_is_an_error(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing repository keeps its visibility."""
    push(folder, "o/n", private=True, dry_run=False)
    assert [name for name, _ in hub.calls] == ["token", "create", "upload"]
    monkeypatch.setattr(hub, "private", False)
    with pytest.raises(RecipeError, match="--private, but o/n exists and is public"):
        push(folder, "o/n", private=True, dry_run=False)
    assert [name for name, _ in hub.calls] == ["token", "create"]


def test_a_dry_run_lists_files_without_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was called")

    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    monkeypatch.setattr(huggingface_hub, "get_token", fail)
    output = push(folder, "my-org/my-student", private=True, dry_run=True)
    assert "my-org/my-student" in output and "private" in output and "manifest.json" not in output
    for file in folder.iterdir():
        assert file.name in ("manifest.json", MARK) or file.name in output
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB" in output


def test_only_files_of_the_manifest_are_uploaded(folder: Path, hub: type[Hub]) -> None:
    (folder / "notes.txt").write_text("mine")
    assert push(folder, "o/n", private=False, dry_run=False).endswith("https://huggingface.co/o/n")
    (_, token), (_, (name, options)), (_, upload) = hub.calls
    assert token == TOKEN and name == "o/n" and options == {"private": False, "exist_ok": True}
    assert "README.md" in upload["allow_patterns"] and "notes.txt" not in upload["allow_patterns"]
    assert upload["folder_path"] == str(folder)


def test_a_missing_token_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match=r"no token for the Hub: run `hf auth login`"):
        push(folder, "o/n", private=False, dry_run=False)


def test_an_error_of_the_hub_is_one_sentence_without_the_token(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fault", OSError(f"403 for Bearer {TOKEN}\nat line 2"))
    with pytest.raises(ResourceError, match="refuses o/n") as exc_info:
        push(folder, "o/n", private=False, dry_run=False)
    assert TOKEN not in str(exc_info.value) and "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    "name",
    [
        "student",
        "a/b/c",
        "a/",
        "/b",
        "a b/c",
        "-a/b",
        "a/b.",
        "a/../b",
        "https://hf.co/a/b",
        "a/b--c",
    ],
)
def test_invalid_repository_names_are_errors(name: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match="ORG/NAME"):
        push(folder, name, private=False, dry_run=True)


def test_an_incomplete_export_is_an_error(folder: Path, run: RunDirectory, tmp_path: Path) -> None:
    for path in (run.path / "none", run.train, tmp_path):
        with pytest.raises(ArtifactError, match=r"pocl export"):
            push(path, "o/n", private=False, dry_run=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        push(folder, "o/n", private=False, dry_run=True)
