"""Benchmarks that training is compared with: those on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pocl_ds.config import EvaluateConfig
from pocl_ds.evaluation.local_benchmarks import read_local_benchmarks


def write_items(path: Path, count: int = 2) -> str:
    rows = ({"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_local_files_are_read_and_the_rest_is_told(tmp_path: Path) -> None:
    write_items(tmp_path / "vicuna.jsonl", count=81)  # one more than published
    config = EvaluateConfig(
        benchmarks={
            "test": "test",
            "own": write_items(tmp_path / "own.jsonl"),
            "vicuna": "vicuna",
            "dolly": "dolly",
            "hub": "someone/dataset",
            "gone": str(tmp_path / "gone.jsonl"),
        },
        benchmark_dir=str(tmp_path),
    )
    samples, unreadable = read_local_benchmarks(config)
    assert {name: len(items) for name, items in samples.items()} == {"own": 2, "vicuna": 80}
    assert set(unreadable) == {"dolly", "hub", "gone"}
    assert "is not in evaluate.benchmark_dir" in unreadable["dolly"]
    assert (
        unreadable["hub"] == "someone/dataset is a dataset of the Hub, which the evaluation loads"
    )


def test_a_known_benchmark_is_read_from_the_cache_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    config = EvaluateConfig(benchmarks=["vicuna"])
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    samples, unreadable = read_local_benchmarks(config)
    assert not samples and unreadable == {"vicuna": "MiniLLM/Vicuna is not downloaded yet"}
    path = write_items(tmp_path / "valid.jsonl")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: path)
    samples, unreadable = read_local_benchmarks(config)
    assert len(samples["vicuna"]) == 2 and not unreadable
