"""Every family through the real steps: scored by vLLM, trained with the online teacher and with its
cached hidden states on two ZeRO-3 ranks, exported, and reloaded in vLLM and transformers.

Each number is compared with plain transformers: full logits and the model's own eager attention,
without code of the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from command_line import ROOT, environment
from family_worker import step
from safetensors.torch import load_file
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM

from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.load import load_model
from pocl_ds.runtime.metrics import read_metrics

pytestmark = pytest.mark.vllm

# Of tied and untied heads, projections, soft caps and scales; the others run weekly.
DAILY = ("gpt2", "opt", "llama", "qwen3", "gemma2")
FAMILIES = [
    name if name in DAILY else pytest.param(name, marks=pytest.mark.weekly)
    for name in tiny_models.FAMILIES
]


def run_worker(name: str, runs: list[Path], folder: Path, *, processes: int) -> None:
    """Run family_worker over some runs: as ranks, or in processes that share the runs."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {
        **environment(),
        "POCL_PYTHON": sys.executable,
        "POCL_LOG_DIR": str(folder / "logs"),
        "PYTHONPATH": paths,
    }
    if name == "train":
        launcher = [
            "bash",
            str(ROOT / "launch" / "train.sh"),
            "--ranks",
            str(processes),
            "--threads",
            "1",
        ]
        commands = [[*launcher, "--module", "family_worker", name, *map(str, runs)]]
    else:
        commands = [
            [sys.executable, "-m", "family_worker", name, *map(str, runs[part::processes])]
            for part in range(processes)
        ]
    started = [
        subprocess.Popen(
            command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for command in commands
    ]
    for process in started:
        output = process.communicate(timeout=800)[0]
        assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Path]:
    """The finished run directory of each family. Next to it are the folders teacher, student and
    other (a third model).
    """
    run_of_family, folder = {}, tmp_path_factory.mktemp("families")
    families = tiny_models.FAMILIES if pytestconfig.getoption("weekly") else DAILY
    for seed, family in enumerate(families):
        run = run_of_family[family] = folder / family / "run"
        run.mkdir(parents=True)
        teacher = tiny_models.family(run.parent / "teacher", family, layers=3, seed=seed)
        student = tiny_models.family(run.parent / "student", family, layers=2, seed=100 + seed)
        tiny_models.family(run.parent / "other", family, layers=2, seed=200 + seed)
        write_recipe(
            run,
            teacher,
            student,
            max_train_samples=24,
            curriculum={"num_subsets": 2, "epochs_per_stage": 1, "sft_ratio": [0, 0]},
            score={"generation": {"max_num_seqs": 16}, "max_new_tokens": 8, "shards": 1},
            student={"dropout": 0.0},
        )
        for name in ("preprocess", "init-student"):
            step(name, run)
    all_runs = list(run_of_family.values())
    run_worker("score", all_runs, folder, processes=2)
    for run in all_runs:
        for name in ("rank", "plan"):
            step(name, run)
    run_worker("train", all_runs, folder, processes=2)
    for run in all_runs:
        split = TokenizedSplit.open(run / "data", "test")
        sequences = [split.tokens(row).tolist() for row in range(3)]
        task = {
            "other": str(run.parent / "other"),
            "sequences": sequences,
            "starts": split.prompt_tokens[:3].tolist(),
        }
        (run / "task.json").write_text(json.dumps(task))
    run_worker("reload", all_runs, folder, processes=2)
    return run_of_family


@torch.no_grad()
def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of transformers for all tokens of a sequence but the first: [T - 1, V]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    values: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return values


def token_log_probs(log_probs: torch.Tensor, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities [T - start] of the tokens from `start` on, from those of all ids."""
    return log_probs[start - 1 :].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_those_of_transformers(name: str, runs: dict[str, Path]) -> None:
    split = TokenizedSplit.open(runs[name] / "data", "train")
    lines = [
        json.loads(line)
        for path in runs[name].glob("scores/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == len(split) == 24
    for line in lines[:3]:
        (row,) = split.rows_of([line["id"]])
        ids, start = split.tokens(row).tolist(), int(split.prompt_tokens[row])
        expected = -token_log_probs(
            logits(runs[name].parent / "student", ids).log_softmax(-1), ids, start
        ).mean()
        assert line["cross_entropy"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_equals_that_of_full_logits_online_and_cached(
    name: str, runs: dict[str, Path]
) -> None:
    """Compare the first step's KD loss per token (forward KL at temperature 1), then all steps and
    the weights.
    """
    run = runs[name]
    split, plan = TokenizedSplit.open(run / "data", "train"), load_plan(run / "plan" / "plan.json")
    rows = Sampler(plan, seed=42).batch(0)
    kd = []
    for row in rows:
        ids, start = split.tokens(row).tolist(), int(split.prompt_tokens[row])
        teacher, student = (
            logits(run.parent / model, ids).log_softmax(-1)[start - 1 :]
            for model in ("teacher", "student")
        )
        kd.append((teacher.exp() * (teacher - student)).sum(-1))
    steps = {name: read_metrics(run / name / "metrics.jsonl") for name in ("online", "train")}
    assert plan.stages[0].temperature == 1 and len(steps["online"]) == 4
    assert steps["online"][0]["kd_loss"] == pytest.approx(float(torch.cat(kd).mean()), rel=1e-5)
    for online, cached in zip(*steps.values(), strict=True):
        for key in ("step", "loss_tokens", "sample_ids_digest"):
            assert online[key] == cached[key]
        for key in ("loss", "kd_loss", "sft_loss"):
            assert online[key] == pytest.approx(cached[key], rel=2e-5)
    weights = [load_file(run / name / "final" / "model.safetensors") for name in steps]
    assert weights[0].keys() == weights[1].keys()
    # Adam turns any gradient into an update of about lr = 1e-3, also one that is a rounding error:
    # a few weights differ by a part of that.
    errors = [float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]]
    assert max(errors) < 2e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_export_agrees_in_vllm_transformers_and_the_trainer(
    name: str, runs: dict[str, Path]
) -> None:
    """They also agree after vLLM has loaded the weights of another model, as in a rollout."""
    run = runs[name]
    task, reloaded = (
        json.loads((run / file).read_text()) for file in ("task.json", "reloaded.json")
    )
    model = load_model(str(run / "export"), attention=PER_SAMPLE)
    for index, (ids, start) in enumerate(zip(task["sequences"], task["starts"], strict=True)):
        exported, other = (
            logits(folder, ids).log_softmax(-1) for folder in (run / "export", run.parent / "other")
        )
        assert (exported - other).abs().max() > 0.05
        for weights, expected in (("exported", exported), ("loaded", other)):
            np.testing.assert_allclose(
                reloaded[weights][index], token_log_probs(expected, ids, start), atol=1e-4
            )
        with torch.no_grad():
            states = hidden_states(
                model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
            )[0, :-1]
            actual = output_head(model).logits(states).log_softmax(-1)
        np.testing.assert_allclose(actual, exported, atol=1e-5)
