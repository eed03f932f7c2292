"""Known benchmarks from files, from a folder and from the Hub; errors; shards of an evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import EvaluateConfig
from pocl_ds.config.recipe_file import validation_message
from pocl_ds.config.registry import BENCHMARKS
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.errors import ArtifactError, DataError
from pocl_ds.evaluation.benchmarks import (
    KNOWN_BENCHMARKS,
    benchmark_samples,
    count_seen_in_training,
    skip_empty_test_split,
)
from pocl_ds.evaluation.evaluate import select_shard
from pocl_ds.workflow.run_dir import RunDirectory

MakeConfig = Callable[..., EvaluateConfig]


def write_items(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_the_registry_lists_the_known_benchmarks() -> None:
    assert tuple(KNOWN_BENCHMARKS) == BENCHMARKS
    assert (
        KNOWN_BENCHMARKS["sni"].hub_file == "11_/valid.jsonl"
        and KNOWN_BENCHMARKS["dolly"].hub_file == "valid.jsonl"
    )


def test_benchmarks_may_be_a_list_of_names(make_config: MakeConfig) -> None:
    long = make_config(benchmarks={"dolly": {"source": "dolly"}, "vicuna": {"source": "vicuna"}})
    assert (
        make_config(benchmarks=["dolly", "vicuna"])
        == make_config(benchmarks="dolly, vicuna")
        == long
    )
    assert make_config(benchmarks={"mine": "a.jsonl"}).benchmarks["mine"].source == "a.jsonl"
    assert EvaluateConfig.model_validate(long.model_dump(mode="json")) == long


def test_the_published_files_are_read_by_name(
    run: RunDirectory, make_config: MakeConfig, shared_data: Path
) -> None:
    config = make_config(
        benchmarks=["dolly", "self_inst", "vicuna", "sni"],
        benchmark_dir=str(shared_data),
        max_samples=None,
    )
    samples = {name: benchmark_samples(run, config, name) for name in config.benchmarks}
    assert {name: len(items) for name, items in samples.items()} == {
        "dolly": 500,
        "self_inst": 242,
        "vicuna": 80,
        "sni": 1694,
    }
    assert (
        sum(len(sample.references) for sample in samples["sni"]) > 1.4 * 1694
    )  # several references
    assert all(
        sample.references and len({s.id for s in samples[name]}) == KNOWN_BENCHMARKS[name].items
        for name in samples
        for sample in samples[name][:1]
    )


def test_a_file_of_another_name_is_not_used_for_unni(
    run: RunDirectory, make_config: MakeConfig, shared_data: Path
) -> None:
    config = make_config(benchmarks=["unni"], benchmark_dir=str(shared_data))
    with pytest.raises(
        DataError,
        match=r"'unni' is not in evaluate.benchmark_dir .*looked for unni.jsonl.*my\.jsonl",
    ):
        benchmark_samples(run, config, "unni")


def test_a_shorter_file_is_a_warning(
    run: RunDirectory, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_items(
        tmp_path / "uinst" / "11_" / "valid.jsonl",
        [{"instruction": f"q{i}", "output": ["a", "b"]} for i in range(7)],
    )
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        samples = benchmark_samples(
            run,
            make_config(benchmarks=["unni"], benchmark_dir=str(tmp_path), max_samples=None),
            "unni",
        )
    assert len(samples) == 7 and "holds 7 items, the published one 10000" in caplog.text


def test_a_file_longer_than_the_published_one_is_a_warning(
    run: RunDirectory, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The original SelfInst has 252 items, and the benchmark is not their beginning; UnNI's
    file is longer on purpose.
    """
    write_items(
        tmp_path / "vicuna.jsonl", [{"instruction": f"Say {i}.", "output": "x"} for i in range(81)]
    )
    samples = benchmark_samples(
        run,
        make_config(benchmarks=["vicuna"], benchmark_dir=str(tmp_path), max_samples=None),
        "vicuna",
    )
    assert len(samples) == 80 and "holds more items, the published one 80" in caplog.text


def test_a_known_benchmark_is_downloaded_from_the_hub(
    run: RunDirectory, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    downloads: list[Any] = []
    path = write_items(
        tmp_path / "valid.jsonl",
        [{"instruction": "q", "prompt": "whole prompt", "input": "", "output": "a"}],
    )

    def download(repository: str, file: str, *, repo_type: str, revision: str | None) -> str:
        downloads.append((repository, file, repo_type, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    at_a_commit = {"sni": {"source": "sni", "hub_revision": "a1b2c3"}}
    (sample,) = benchmark_samples(run, make_config(benchmarks=at_a_commit), "sni")
    assert (
        downloads == [("MiniLLM/sinst", "11_/valid.jsonl", "dataset", "a1b2c3")]
        and sample.instruction == "q"
    )


def test_a_failed_download_is_an_error_of_one_sentence(
    run: RunDirectory, make_config: MakeConfig
) -> None:
    with pytest.raises(
        DataError,
        match=r"benchmark 'vicuna' .* cannot be downloaded from the Hub .*evaluate.benchmark_dir",
    ):
        benchmark_samples(run, make_config(benchmarks=["vicuna"]), "vicuna")


def test_items_seen_in_training_are_counted(
    run: RunDirectory, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = list(islice(read_sample_file(run.data / "train.jsonl"), 3))
    items = [
        {"instruction": item.instruction, "input": item.input, "output": "another answer"}
        for item in trained
    ]
    path = write_items(
        tmp_path / "b.jsonl", [*items, {"instruction": "Never asked.", "output": "a"}]
    )
    samples = benchmark_samples(run, make_config(benchmarks={"b": str(path)}), "b")
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        assert count_seen_in_training(run, {"b": samples, "c": samples[3:]}) == {"b": 3, "c": 0}
    assert "b: 3 of 4 items" in caplog.text and "benchmark c" not in caplog.text


@pytest.mark.parametrize("output", [None, [], "", ["a", " "]])
def test_an_item_without_a_reference_is_an_error(
    output: Any, run: RunDirectory, make_config: MakeConfig, tmp_path: Path
) -> None:
    item = {"instruction": "q2"} | ({} if output is None else {"output": output})
    path = write_items(tmp_path / "b.jsonl", [{"instruction": "q1", "output": "a"}, item])
    with pytest.raises(DataError, match=r"b\.jsonl line 2: .*output"):
        benchmark_samples(run, make_config(benchmarks={"b": str(path)}), "b")


def test_field_names_can_be_set(run: RunDirectory, make_config: MakeConfig, tmp_path: Path) -> None:
    path = write_items(tmp_path / "b.jsonl", [{"ask": "q1", "gold": ["a", "b"]}])
    config = make_config(
        benchmarks={
            "b": {
                "source": str(path),
                "fields": {"instruction": "ask", "output": "gold"},
                "format": "alpaca",
            }
        }
    )
    assert benchmark_samples(run, config, "b")[0].references == ("a", "b")
    with pytest.raises(DataError, match=r"evaluate\.benchmarks\.b\.fields"):
        benchmark_samples(run, make_config(benchmarks={"b": str(path)}), "b")


def test_a_key_in_place_of_its_variable_is_not_shown() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as exc_info:
        EvaluateConfig.model_validate(
            {"judge": {"base_url": "http://h/v1", "model": "m", "api_key_env": "sk-secret-1"}}
        )
    message = validation_message(exc_info.value, "recipe field", EvaluateConfig)
    assert "api_key_env is not the name" in message and "secret" not in message


@pytest.mark.parametrize(
    "url", ["http://user:pw@host/v1", "https://host/v1?key=x", "host/v1", "ftp://host"]
)
def test_urls_with_a_secret_and_invalid_urls_are_rejected(url: str) -> None:
    with pytest.raises(ValueError):
        EvaluateConfig.model_validate({"judge": {"base_url": url, "model": "m"}})


def test_shards_are_complete_disjoint_and_even() -> None:
    sizes = {
        (name, seed): size
        for name, size in (("unni", 1000), ("sni", 170), ("dolly", 50))
        for seed in range(5)
    }
    for count in (1, 2, 3, 8):
        shards = [select_shard(sizes, number, count) for number in range(count)]
        assert sorted(key for shard in shards for key in shard) == sorted(sizes)
        loads = [sum(sizes[key] for key in shard) for shard in shards]
        assert max(loads) <= max(1000, sum(sizes.values()) / count * 4 / 3)
    assert select_shard(sizes, 0, 1) == list(sizes)


def test_an_empty_test_split_is_left_out_with_a_warning(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    own = str(write_items(tmp_path / "own.jsonl", [{"instruction": "Say 1.", "output": "1"}]))
    alone, beside = make_config(), make_config(benchmarks={"own": own, "held_out": "test"})
    with pytest.raises(ArtifactError, match="has no finished data: run `pocl preprocess` first"):
        skip_empty_test_split(run, alone)
    run.data.mkdir()
    (run.data / "test.jsonl").write_text("")
    assert skip_empty_test_split(run, alone, warn=False).benchmarks == {}
    assert caplog.text == ""
    assert skip_empty_test_split(run, alone).benchmarks == {}
    assert "no test samples, so there is nothing to evaluate, and the student is" in caplog.text
    assert list(skip_empty_test_split(run, beside).benchmarks) == ["own"]
    assert "no test samples, so benchmark held_out is left out of the evaluation: " in caplog.text
    (run.data / "test.jsonl").write_text("{}\n")
    assert skip_empty_test_split(run, beside) is beside
