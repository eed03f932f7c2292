"""`pocl fetch`: everything that a recipe reads. Functions stand in for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from pocl_ds.cluster.fetch import FetchedInput, fetch_inputs
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import DataError
from pocl_ds.models import load


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests to the Hub."""
    requests: list[Any] = []

    def snapshot_download(name: str, **fields: Any) -> str:
        requests.append((name, fields["revision"], fields["allow_patterns"][0]))
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"0" * 700)
        return str(folder)

    def hf_hub_download(repository: str, file: str, **fields: Any) -> str:
        requests.append((repository, file))
        path = tmp_path / "hub" / "benchmark.jsonl"
        path.write_text("{}")
        return str(path)

    def load_dataset(name: str, subset: Any, **fields: Any) -> datasets.Dataset:
        requests.append((name, fields["split"], fields["revision"]))
        return datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])

    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


def fetched(**sections: Any) -> dict[str, FetchedInput]:
    tree = {
        "name": "x",
        "student": {"model": "org/student"},
        "teacher": {"model": "org/teacher", "revision": "v1"},
        "data": {"source": "org/data"},
        **sections,
    }
    return {item.field: item for item in fetch_inputs(check_recipe(tree))}


def test_everything_is_fetched_with_its_size(asked: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    items = fetched(
        data={"source": "org/data", "hub_revision": "r", "test": str(file)},
        evaluate={"benchmarks": ["test", "dolly"]},
    )
    assert list(items) == [
        "student",
        "teacher",
        "data.test",
        "data.source",
        "evaluate.benchmarks.dolly",
    ]
    assert items["teacher"].bytes == 700 and items["data.test"].bytes == file.stat().st_size
    assert items["data.source"].bytes is None
    assert asked[:3] == [
        ("org/student", "main", "*.safetensors"),
        ("org/teacher", "v1", "*.safetensors"),
        ("org/data", "train", "r"),
    ]
    assert len(asked) == 4  # and the benchmark


def test_what_a_server_or_a_stream_has_is_not_fetched(asked: list[Any]) -> None:
    sft: dict[str, Any] = {"loss": {"name": "sft"}, "policy": {"name": "seqkd"}}
    endpoint = {"urls": ["http://a/v1"]}
    fetched(teacher={"model": "org/teacher", "endpoint": endpoint}, **sft)
    assert asked[1] == ("org/teacher", "main", "*.json")  # its tokenizer alone
    asked.clear()
    items = fetched(
        teacher={"model": "closed", "endpoint": {**endpoint, "api": "chat"}},
        data={"source": "org/data", "streaming": True},
        **sft,
    )
    assert list(items) == ["student"] and len(asked) == 1


def test_a_missing_file_is_one_sentence(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.jsonl"):
        fetched(data={"source": str(tmp_path / "missing.jsonl")})
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError):
        fetched(data={"source": str(tmp_path / "empty.jsonl")})
