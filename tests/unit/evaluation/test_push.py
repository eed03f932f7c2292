"""Push: what would go is what was exported, and the token goes nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.evaluation.export import export
from pocl_ds.evaluation.push import push
from pocl_ds.workflow.run_dir import RunDirectory

TOKEN = "hf_tok_0123456789"


@pytest.fixture
def folder(run: RunDirectory, recipe: str) -> Path:
    return export(run, out=None, recipe_yaml=recipe, fingerprint="x")


class Hub:
    """Stands for HfApi."""

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


def test_nothing_private_goes_where_all_can_see_it(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub leaves a repository that was there as it is, whatever is asked for."""
    push(folder, "o/n", private=True, dry_run=False)
    assert [what for what, _ in hub.calls] == ["token", "create", "upload"]
    monkeypatch.setattr(hub, "private", False)
    with pytest.raises(RecipeError, match="--private, but o/n exists and is public"):
        push(folder, "o/n", private=True, dry_run=False)
    assert [what for what, _ in hub.calls] == ["token", "create"]


def test_a_dry_run_lists_files_and_asks_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub may not be asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", never)
    monkeypatch.setattr(huggingface_hub, "get_token", never)
    said = push(folder, "my-org/my-student", private=True, dry_run=True)
    assert "my-org/my-student" in said and "private" in said and "manifest.json" not in said
    for file in folder.iterdir():
        assert file.name == "manifest.json" or file.name in said
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB" in said


def test_the_upload_takes_the_sealed_files_only(folder: Path, hub: type[Hub]) -> None:
    (folder / "notes.txt").write_text("mine")
    assert push(folder, "o/n", private=False, dry_run=False).endswith("https://huggingface.co/o/n")
    (_, token), (_, (name, options)), (_, upload) = hub.calls
    assert token == TOKEN and name == "o/n" and options == {"private": False, "exist_ok": True}
    assert "README.md" in upload["allow_patterns"] and "notes.txt" not in upload["allow_patterns"]
    assert upload["folder_path"] == str(folder)


def test_without_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match=r"no token for the Hub: run `hf auth login`"):
        push(folder, "o/n", private=False, dry_run=False)


def test_a_refusal_is_one_sentence_without_the_token(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fault", OSError(f"403 for Bearer {TOKEN}\nat line 2"))
    with pytest.raises(ResourceError, match="refuses o/n") as caught:
        push(folder, "o/n", private=False, dry_run=False)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


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
def test_other_names(name: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match="ORG/NAME"):
        push(folder, name, private=False, dry_run=True)


def test_no_whole_export(folder: Path, run: RunDirectory, tmp_path: Path) -> None:
    for path in (run.path / "none", run.train, tmp_path):
        with pytest.raises(ArtifactError, match=r"pocl export"):
            push(path, "o/n", private=False, dry_run=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        push(folder, "o/n", private=False, dry_run=True)
