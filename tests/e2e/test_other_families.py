"""Families with an unknown head: refused before scoring, or trained with loss.fused=false."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from refusals import error_message
from tiny_runs import records, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_ds.cli.main import main
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.tokenized import TokenizedSplit

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def make_model(folder: Path, family: str, **fields: Any) -> Path:
    tokenizer = tiny_models.make_tokenizer(chat=True)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1, **fields
    )
    torch.manual_seed(len(family))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """StarCoder 2, with an attention of transformers, teaches BLOOM, which has its own."""
    teacher = make_model(tmp_path / "teacher", "starcoder2", **SMALL, num_key_value_heads=2)
    student = make_model(
        tmp_path / "student", "bloom", hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=24,
        student={"dropout": 0.0},
        ranking={"strategy": "random"},
        curriculum={
            "num_subsets": 1,
            "epochs_per_stage": 2,
            "temperature": [1.5, 1.5],
            "sft_ratio": [0, 0],
        },
        evaluate={"models": ["student"]},
        train={"engine": "torch"},
        launch={"ranks": 1},
    )


def test_unsupported_models_are_refused_before_anything_is_scored(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, pair = tmp_path / "run", tmp_path / "pair.yaml"
    attention = ["teacher.attn_implementation=sdpa", "student.attn_implementation=eager"]
    for family, other in zip(("starcoder2", "bloom"), reversed(attention), strict=True):
        message = error_message(
            capsys, "init-student", recipe, "--run-dir", run, "loss.fused=false", other
        )
        assert message == (
            f"attn_implementation=per_sample is not tested with models of the family {family!r}, "
            "which may need their mask: set their attn_implementation=eager, or sdpa if they have "
            "it"
        )
    message = error_message(capsys, "init-student", recipe, "--run-dir", run, *attention)
    assert message.startswith("models of the family 'bloom' are not supported: use one of cohere, ")
    assert "set loss.fused=false, so that" in message
    student = {"model": str(tiny_models.llama(tmp_path / "known"))}
    pair.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "student": student}))
    message = error_message(
        capsys,
        "init-student",
        pair,
        "--run-dir",
        tmp_path / "other",
        "teacher.attn_implementation=sdpa",
    )
    assert message.startswith("models of the family 'starcoder2' are not supported")
    assert not (run / "models").exists() and not (tmp_path / "other" / "models").exists()


def first_divergence(run: Path) -> float:
    """tau^2 KL per token of the first step's samples, by the models' own logits in float64."""
    split, plan = TokenizedSplit.open(run / "data", "train"), load_plan(run / "plan" / "plan.json")
    models = [
        AutoModelForCausalLM.from_pretrained(run.parent / name, attn_implementation="eager")
        .double()
        .eval()
        for name in ("teacher", "student")
    ]
    divergences = []
    for row in Sampler(plan, seed=42).batch(0):
        ids, start = (
            torch.from_numpy(split.tokens(row).astype(np.int64))[None],
            int(split.prompt_tokens[row]),
        )
        with torch.no_grad():
            log_p, log_q = (
                (model(input_ids=ids).logits[0, start - 1 : -1] / 1.5).log_softmax(-1)
                for model in models
            )
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1) * 1.5**2)
    return float(torch.cat(divergences).mean())


def test_unknown_heads_are_trained_without_the_fused_head(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, overrides = (
        tmp_path / "run",
        [
            "student.attn_implementation=eager",
            "teacher.attn_implementation=sdpa",
            "loss.fused=false",
        ],
    )
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(run), *overrides]) == 0
    monkeypatch.setitem(os.environ, "RANK", "0")
    for command in (["train"], ["evaluate", "--model", "student"], ["evaluate"]):
        assert main([*command, "--run-dir", str(run)]) == 0
    steps = records(run)
    assert len(steps) == 6 and steps[-1]["kd_loss"] < steps[0]["kd_loss"]
    assert steps[0]["kd_loss"] == pytest.approx(first_divergence(run), rel=1e-5)
    assert (
        json.loads((run / "evaluation" / "results.json").read_text())["models"]["student"]["loss"]
        > 0
    )
