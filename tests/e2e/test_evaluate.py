"""An evaluation through the command line, with two generation engines and a folder of benchmarks,
and the commands that read its results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import pocl
from tiny_runs import write_recipe

from pocl_ds.cli.main import main


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_untied: Path
) -> Path:
    """An evaluated and exported run, with a benchmark file that replaces a published benchmark."""
    folder = tmp_path_factory.mktemp("evaluate")
    items = [
        {"instruction": f"Ask {i}.", "input": "", "output": [f"It is {i}", "or not"]}
        for i in range(24)
    ]
    (folder / "vicuna.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    recipe = write_recipe(
        folder,
        tiny_llama_untied,
        tiny_llama,
        max_train_samples=24,
        curriculum={"num_subsets": 2, "epochs_per_stage": 1},
        ranking={"strategy": "random"},
        launch={"ranks": 1},
        evaluate={
            "models": ["teacher", "student"],
            "seeds": [1, 2],
            "benchmarks": ["test", "vicuna"],
            "data_parallel_size": 2,
            "benchmark_dir": str(folder),
        },
    )
    run = str(folder / "run")
    # In this process: a separate one takes seconds to start.
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", run]) == 0
    pocl("train", "--run-dir", run)
    pocl("evaluate", "--run-dir", run)
    assert main(["export", "--run-dir", run]) == 0
    return folder / "run"


def test_results_hold_every_measure(finished: Path) -> None:
    results = json.loads((finished / "evaluation" / "results.json").read_text())
    for model, entry in results["models"].items():
        for measures in entry["benchmarks"].values():
            assert (
                measures["tokens_per_second"] > 0
                and 0 < measures["distinct_1"] <= 1
                and measures["loss"] > 0
            )
            assert (measures["kl"] == 0) == (model == "teacher")
    manifests = [
        json.loads(path.read_text())["info"]
        for path in (finished / "evaluation" / "student").glob("*.manifest.json")
    ]
    assert {(info["benchmark"], info["seed"]) for info in manifests} == {
        (b, s) for b in ("test", "vicuna") for s in (1, 2)
    }


def test_commands_that_read_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def output_of(*words: str) -> str:
        assert main([words[0], "--run-dir", str(finished), *words[1:]]) == 0
        return capsys.readouterr().out

    output = output_of("compare", "--models", "teacher", "student", "--benchmark", "vicuna")
    assert "vicuna: " in output and (
        "better than" in output or "worse than" in output or "no difference shown" in output
    )
    assert output_of("inspect", "--subset", "2", "--n", "3").count("── ") == 3
    output = output_of("push", "--repo", "my-org/tiny", "--dry-run")
    assert (
        "would upload to my-org/tiny" in output
        and "model.safetensors" in output
        and "README.md" in output
    )


def test_a_shard_without_a_model_is_refused(finished: Path) -> None:
    process = pocl("evaluate", "--run-dir", str(finished), "--shard", "0/2", check=False)
    assert process.returncode == 2 and process.stderr.strip().endswith("add --model")
