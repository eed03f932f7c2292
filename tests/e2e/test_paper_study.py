"""The study of the paper's table with tiny models: its cost, its runs, and its table beside the
published numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import tiny_models
import yaml
from command_line import ROOT, pocl

from pocl_ds.config.registry import BENCHMARKS
from pocl_ds.workflow.files import read_json

METHODS = ("fkl", "gkd")
CONTAMINATED = "Say all words of a question that training and a benchmark have in common here."
SMALLER = (
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.engine=torch",
    "train.lr=0.01",
    "launch.ranks=1",
    "score.shards=1",
    "score.max_new_tokens=8",
    "score.generation.backend=transformers",
    "policy.max_new_tokens=8",
    "policy.rollout_backend=transformers",
    "evaluate.max_new_tokens=8",
    "evaluate.generation.backend=transformers",
)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The shipped study with both pairs as tiny models and two of its methods."""
    models = {
        "openai-community/gpt2-xl": tiny_models.gpt2(tmp_path / "gpt2-xl", layers=2),
        "openai-community/gpt2": tiny_models.gpt2(tmp_path / "gpt2", layers=1, seed=1),
        "facebook/opt-2.7b": tiny_models.opt(tmp_path / "opt-2.7b", projection=None),
        "facebook/opt-350m": tiny_models.opt(tmp_path / "opt-350m", layers=1, seed=1),
    }
    tree: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "studies" / "paper.yaml").read_text())
    grid = tree["grid"]
    for overrides in grid["pair"].values():
        fields = [override.partition("=") for override in overrides]
        overrides[:] = [f"{field}={models[model]}" for field, _, model in fields]
    grid["method"] = {method: grid["method"][method] for method in METHODS}
    values = tree["published"]["values"]
    tree["published"]["values"] = {
        group: values[group] for group in values if group.rpartition(", ")[2] in METHODS
    }
    file = tmp_path / "paper.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Data, of which a benchmark has one question, and the files of the benchmarks."""
    items = [{"instruction": f"Say {i}.", "output": f"It is {i} " * (1 + i % 3)} for i in range(32)]
    items.append({"instruction": CONTAMINATED, "output": "These."})
    write_jsonl(tmp_path / "data.jsonl", items)
    for name in BENCHMARKS:
        # References of different lengths, so that the benchmarks have different scores.
        reference = " ".join(["It is", *name])
        questions = [
            {"instruction": text, "output": reference} for text in (f"Is it {name}?", "Say 1.")
        ]
        if name == "dolly":
            questions.append({"instruction": CONTAMINATED, "output": "These."})
        write_jsonl(tmp_path / "benchmarks" / f"{name}.jsonl", questions)
    return [
        *SMALLER,
        f"data.source={tmp_path / 'data.jsonl'}",
        f"evaluate.benchmark_dir={tmp_path / 'benchmarks'}",
    ]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.weekly
def test_the_paper_study_with_tiny_models(study: Path, overrides: list[str]) -> None:
    folder = study.parent / "runs"
    words = ("study", str(study), "--run-dir", str(folder), "--gpu", "h100-80g", *overrides)

    # Eight runs; those of a pair share the data, the student, its scores and the ranking.
    planned = pocl(*words, "--dry-run").stdout.splitlines()
    assert planned[0] == "8 runs with 72 steps, 48 after sharing equal ones"
    assert planned[1].startswith("estimate on 1 x 1 h100-80g: ") and not folder.exists()

    process = pocl(*words)
    assert process.stdout.splitlines()[:2] == planned[:2]
    assert "1 samples are left out (data.decontaminate=train)" in process.stderr
    lines = process.stdout.splitlines()
    header = next(line for line in lines if line.split()[:2] == ["dolly", "published"])
    assert header.split() == [
        *(word for name in BENCHMARKS for word in (name, "published")),
        *("mean", "of", "all", "published"),
    ]
    for arm in ("kd", "pocl"):
        for method in METHODS:
            assert_row(lines[lines.index(header) :], f"{arm}, gpt2-1.5b-to-0.1b, {method}", folder)
    absent = next(line for line in lines if line.startswith("no published values: "))
    assert absent.count("opt-2.7b-to-350m") == 4 and "gpt2" not in absent
    assert sum("pocl against kd" in line for line in lines) == 2 * 2 * (len(BENCHMARKS) + 1)
    assert "published: POCL (arXiv 2506.05695)" in (folder / "study.html").read_text()


def assert_row(lines: list[str], group: str, folder: Path) -> None:
    """The row of a group has the numbers of its results, and those of the shipped study."""
    row = next(line for line in lines if line.startswith(group))
    numbers = [text.strip() for text in row[len(group) :].split("  ") if text.strip()]
    run = folder / f"{group.replace(', ', '-')}-seed42"
    entries = read_json(run / "evaluation" / "results.json")["models"]["student"]["benchmarks"]
    shipped = yaml.safe_load((ROOT / "launch" / "studies" / "paper.yaml").read_text())
    published = shipped["published"]["values"][group]
    for place, name in enumerate(BENCHMARKS):
        scores = entries[name]["rouge_l_by_seed"]
        assert len(scores) == 5
        assert numbers[2 * place] == f"{fmean(scores):.2f} ± {stdev(scores):.2f}"
        assert numbers[2 * place + 1] == f"{published[name][0]:.2f}"
    if group.startswith("kd") and group.endswith("fkl"):  # its student learns "It is"
        assert len({entries[name]["rouge_l"] for name in BENCHMARKS}) > 2
