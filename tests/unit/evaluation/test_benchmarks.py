"""Known benchmarks from files, from a folder and from the Hub; what is refused; parts of an
evaluation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import EvaluateConfig
from pocl_ds.config.recipe_file import validation_message
from pocl_ds.config.registry import BENCHMARKS
from pocl_ds.errors import DataError
from pocl_ds.evaluation.benchmarks import KNOWN, questions, seen_in_training
from pocl_ds.evaluation.evaluate import share
from pocl_ds.workflow.run_dir import RunDirectory

Configured = Callable[..., EvaluateConfig]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_recipes_and_the_registry_know_the_same_names() -> None:
    assert tuple(KNOWN) == BENCHMARKS
    assert KNOWN["sni"].hub_file == "11_/valid.jsonl" and KNOWN["dolly"].hub_file == "valid.jsonl"


def test_names_are_a_short_form(configured: Configured) -> None:
    long = configured(benchmarks={"dolly": {"source": "dolly"}, "vicuna": {"source": "vicuna"}})
    assert (
        configured(benchmarks=["dolly", "vicuna"]) == configured(benchmarks="dolly, vicuna") == long
    )
    assert configured(benchmarks={"mine": "a.jsonl"}).benchmarks["mine"].source == "a.jsonl"
    assert EvaluateConfig.model_validate(long.model_dump(mode="json")) == long


def test_the_real_files_by_name(
    run: RunDirectory, configured: Configured, shared_data: Path
) -> None:
    config = configured(
        benchmarks=["dolly", "self_inst", "vicuna", "sni"],
        benchmark_dir=str(shared_data),
        max_samples=None,
    )
    found = {name: questions(run, config, name) for name in config.benchmarks}
    assert {name: len(samples) for name, samples in found.items()} == {
        "dolly": 500,
        "self_inst": 242,
        "vicuna": 80,
        "sni": 1694,
    }
    assert sum(len(sample.references) for sample in found["sni"]) > 1.4 * 1694  # several references
    assert all(
        sample.references and len({s.id for s in found[name]}) == KNOWN[name].items
        for name in found
        for sample in found[name][:1]
    )


def test_short_answers_are_not_taken_for_unni(
    run: RunDirectory, configured: Configured, shared_data: Path
) -> None:
    config = configured(benchmarks=["unni"], benchmark_dir=str(shared_data))
    with pytest.raises(
        DataError,
        match=r"'unni' is not in evaluate.benchmark_dir .*looked for unni.jsonl.*my\.jsonl",
    ):
        questions(run, config, "unni")


def test_a_smaller_file_is_said(
    run: RunDirectory, configured: Configured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        tmp_path / "uinst" / "11_" / "valid.jsonl",
        [{"instruction": f"q{i}", "output": ["a", "b"]} for i in range(7)],
    )
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        found = questions(
            run,
            configured(benchmarks=["unni"], benchmark_dir=str(tmp_path), max_samples=None),
            "unni",
        )
    assert len(found) == 7 and "holds 7 items, the published one 10000" in caplog.text


def test_a_longer_file_than_the_published_one_is_said(
    run: RunDirectory, configured: Configured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The original SelfInst has 252 items, of which the benchmark is not the beginning; UnNI's file
    is meant to be longer.
    """
    write(
        tmp_path / "vicuna.jsonl", [{"instruction": f"Say {i}.", "output": "x"} for i in range(81)]
    )
    found = questions(
        run,
        configured(benchmarks=["vicuna"], benchmark_dir=str(tmp_path), max_samples=None),
        "vicuna",
    )
    assert len(found) == 80 and "holds more items, the published one 80" in caplog.text


def test_the_hub_is_asked_for_the_file(
    run: RunDirectory, configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []
    path = write(
        tmp_path / "valid.jsonl",
        [{"instruction": "q", "prompt": "whole prompt", "input": "", "output": "a"}],
    )

    def download(repository: str, file: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repository, file, repo_type, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    at_a_commit = {"sni": {"source": "sni", "hub_revision": "a1b2c3"}}
    (sample,) = questions(run, configured(benchmarks=at_a_commit), "sni")
    assert (
        asked == [("MiniLLM/sinst", "11_/valid.jsonl", "dataset", "a1b2c3")]
        and sample.instruction == "q"
    )


def test_without_a_network_one_sentence(run: RunDirectory, configured: Configured) -> None:
    with pytest.raises(
        DataError,
        match=r"benchmark 'vicuna' .* cannot be had from the Hub .*evaluate.benchmark_dir",
    ):
        questions(run, configured(benchmarks=["vicuna"]), "vicuna")


def test_questions_that_training_saw_are_counted(
    run: RunDirectory, configured: Configured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = [json.loads(line) for line in (run.data / "train.jsonl").read_text().splitlines()][:3]
    items = [
        {"instruction": item["instruction"], "input": item["input"], "output": "another answer"}
        for item in trained
    ]
    path = write(tmp_path / "b.jsonl", [*items, {"instruction": "Never asked.", "output": "a"}])
    asked = questions(run, configured(benchmarks={"b": str(path)}), "b")
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        assert seen_in_training(run, {"b": asked, "c": asked[3:]}) == {"b": 3, "c": 0}
    assert "b: 3 of 4 items" in caplog.text and "benchmark c" not in caplog.text


@pytest.mark.parametrize("output", [None, [], "", ["a", " "]])
def test_an_item_without_a_reference(
    output: Any, run: RunDirectory, configured: Configured, tmp_path: Path
) -> None:
    item = {"instruction": "q2"} | ({} if output is None else {"output": output})
    path = write(tmp_path / "b.jsonl", [{"instruction": "q1", "output": "a"}, item])
    with pytest.raises(DataError, match=r"b\.jsonl line 2: .*output"):
        questions(run, configured(benchmarks={"b": str(path)}), "b")


def test_other_field_names(run: RunDirectory, configured: Configured, tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [{"ask": "q1", "gold": ["a", "b"]}])
    config = configured(
        benchmarks={
            "b": {
                "source": str(path),
                "fields": {"instruction": "ask", "output": "gold"},
                "format": "alpaca",
            }
        }
    )
    assert questions(run, config, "b")[0].references == ("a", "b")
    with pytest.raises(DataError, match=r"evaluate\.benchmarks\.b\.fields"):
        questions(run, configured(benchmarks={"b": str(path)}), "b")


def test_a_key_in_place_of_its_variable_is_not_repeated() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        EvaluateConfig.model_validate(
            {"judge": {"base_url": "http://h/v1", "model": "m", "api_key_env": "sk-secret-1"}}
        )
    said = validation_message(caught.value, "recipe field", EvaluateConfig)
    assert "api_key_env is not the name" in said and "secret" not in said


@pytest.mark.parametrize(
    "url", ["http://user:pw@host/v1", "https://host/v1?key=x", "host/v1", "ftp://host"]
)
def test_urls_that_hold_a_secret_or_are_none(url: str) -> None:
    with pytest.raises(ValueError):
        EvaluateConfig.model_validate({"judge": {"base_url": url, "model": "m"}})


def test_shares_are_whole_disjoint_and_even() -> None:
    sizes = {
        (name, seed): size
        for name, size in (("unni", 1000), ("sni", 170), ("dolly", 50))
        for seed in range(5)
    }
    for count in (1, 2, 3, 8):
        parts = [share(sizes, number, count) for number in range(count)]
        assert sorted(key for part in parts for key in part) == sorted(sizes)
        loads = [sum(sizes[key] for key in part) for part in parts]
        assert max(loads) <= max(1000, sum(sizes.values()) / count * 4 / 3)
    assert share(sizes, 0, 1) == list(sizes)
