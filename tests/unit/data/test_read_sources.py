"""Splits and mixtures of local data reach the splits of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from source_reading import CONTAINERS, RECORDS, lines, write

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.preprocess import preprocess
from pocl_ds.errors import DataError
from pocl_ds.workflow.run_dir import RunDirectory

TOKENIZER = tiny_models.make_tokenizer()
PROMPT = PromptConfig(template="plain", max_prompt_tokens=128, max_length=256)


def split_samples(folder: Path, **data: Any) -> dict[str, list[Sample]]:
    run = RunDirectory(folder / "run")
    config = DataConfig.model_validate(
        {"validation_fraction": 0, "test_fraction": 0, "num_workers": 1, **data}
    )
    preprocess(run, config, PROMPT, TOKENIZER, "f" * 64)
    return {
        split: list(read_sample_file(run.data / f"{split}.jsonl"))
        for split in ("train", "validation", "test")
    }


def instructions(samples: list[Sample]) -> list[str]:
    return [sample.instruction for sample in samples]


def test_splits_of_one_file(tmp_path: Path) -> None:
    splits = split_samples(tmp_path, source=str(CONTAINERS / "splits.json"), hub_test_split="test")
    assert instructions(splits["train"]) == [f"Say {n}." for n in range(4)]
    assert instructions(splits["test"]) == ["Say 4.", "Say 5."]
    assert not splits["validation"]


def test_a_file_without_splits_is_not_read_as_test_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.csv holds no split 'test'"):
        split_samples(tmp_path, source=str(CONTAINERS / "x.csv"), hub_test_split="test")
    # A split of the Hub for training says nothing of a test file.
    splits = split_samples(
        tmp_path,
        source=str(CONTAINERS / "splits.json"),
        hub_split="test",
        test=write(tmp_path / "t.jsonl", lines(RECORDS[:2])),
    )
    assert instructions(splits["train"]) == ["Say 4.", "Say 5."]
    assert instructions(splits["test"]) == ["Say 0.", "Say 1."]


def test_mixtures_have_each_source_in_its_share(tmp_path: Path) -> None:
    def records(name: str, count: int) -> list[dict[str, str]]:
        return [{"question": f"{name} {n}?", "reply": f"{name} {n}"} for n in range(count)]

    sources = [
        {"source": write(tmp_path / "a.jsonl", lines(records("a", 40))), "weight": 0.5},
        {"source": write(tmp_path / "b.jsonl", lines(records("b", 30))), "max_samples": 7},
    ]
    for source in sources:
        source["fields"] = {"output": "reply"}
    train = split_samples(tmp_path, sources=[*sources, {"source": str(CONTAINERS / "x.tsv")}])[
        "train"
    ]
    names = [sample.source for sample in train]
    assert {name: names.count(name) for name in names} == {"a": 20, "b": 7, "x": 6}
    assert all(sample.instruction.split()[0] in (sample.source, "Say") for sample in train)
