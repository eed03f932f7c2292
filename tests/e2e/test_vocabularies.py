"""Full-vocabulary distillation between two families with their real vocabularies: GPT-2 teachers
and an OPT student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from transformers import AutoModelForCausalLM

from pocl_ds.cli.main import main


def tokenizer(folder: Path, eos: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=eos)


@pytest.fixture
def run(shared_data: Path, tmp_path: Path) -> Path:
    """Three steps of KL from an ensemble of two GPT-2 to an OPT, on real samples, without SFT and
    with full batches.
    """
    tables = shared_data / "tokenizers"
    gpt2, opt = tokenizer(tables / "gpt2", "<|endoftext|>"), tokenizer(tables / "opt", "</s>")
    for seed in (0, 1):
        tiny_models.gpt2(tmp_path / f"teacher{seed}", seed=seed, hidden=32, tokenizer=gpt2)
    tiny_models.opt(tmp_path / "student", hidden=32, projection=None, tokenizer=opt)
    recipe = {
        "name": "across",
        "data": {
            "source": str(shared_data / "train.jsonl"),
            "max_train_samples": 32,
            "max_validation_samples": 4,
        },
        "prompt": {"max_prompt_tokens": 250, "max_length": 320},
        "teacher": {
            "model": str(tmp_path / "teacher0"),
            "weight": 3.0,
            "ensemble": [{"model": str(tmp_path / "teacher1")}],
        },
        "student": {"model": str(tmp_path / "student"), "dropout": 0.0},
        "ranking": {"strategy": "random"},
        "curriculum": {
            "num_subsets": 1,
            "epochs_per_stage": 3,
            "temperature": [1.5, 1.5],
            "sft_ratio": [0, 0],
        },
        "train": {"engine": "torch", "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "run"


def test_gpt2_teaches_opt_all_common_tokens(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(run.parent / "recipe.yaml"), "--run-dir", str(run)]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--run-dir", str(run)]) == 0
    log = capsys.readouterr().err
    assert (
        "50257 tokens shared under other ids, mapped" in log
        and "50257 tokens common, 0 only the teacher's" in log
    )
    assert "teacher ensemble: 0.75 " in log
    steps = [
        json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [step for step in steps if step["kind"] == "step"]
    assert len(steps) == 9 and steps[-1]["kd_loss"] < steps[0]["kd_loss"]
    assert steps[0]["kd_loss"] == pytest.approx(first_divergence(run), rel=1e-4)


def first_divergence(run: Path) -> float:
    """tau^2 KL per token of the first step's samples in float64, by the names of the tokens and
    without code of the package.
    """
    folder = run.parent
    load = lambda name: AutoModelForCausalLM.from_pretrained(folder / name).double().eval()  # noqa: E731
    student, teachers, temperature = load("student"), [load("teacher0"), load("teacher1")], 1.5
    names: list[dict[str, int]] = [
        json.loads((folder / name / "tokenizer.json").read_text())["model"]["vocab"]
        for name in ("student", "teacher0")
    ]
    common = [token for token in names[0] if token in names[1] and token != "<|endoftext|>"]
    student_ids = [names[0][token] for token in [*common, "</s>"]]
    teacher_ids = [names[1][token] for token in [*common, "<|endoftext|>"]]
    teacher_id_of = dict(zip(student_ids, teacher_ids, strict=True))
    index, tokens = (
        np.load(run / "data" / "train.index.npy"),
        np.fromfile(run / "data" / "train.tokens.bin", np.uint32),
    )
    first_record = json.loads((run / "train" / "metrics.jsonl").read_text().splitlines()[0])
    from pocl_ds.curriculum.plan_step import load_plan
    from pocl_ds.curriculum.sampler import Sampler

    rows = Sampler(load_plan(run / "plan" / "plan.json"), 42).batch(0)
    total, count = 0.0, 0
    for row in rows:
        start, prompt, size = (int(value) for value in index[row][:3])
        ids = torch.from_numpy(tokens[start : start + size].astype(np.int64))[None]
        mapped = torch.tensor([[teacher_id_of[int(token)] for token in ids[0]]])
        with torch.no_grad():
            log_q = (
                student(input_ids=ids).logits[0, prompt - 1 : -1][:, student_ids] / temperature
            ).log_softmax(-1)
            distributions = [
                (
                    teacher(input_ids=mapped).logits[0, prompt - 1 : -1][:, teacher_ids]
                    / temperature
                ).softmax(-1)
                for teacher in teachers
            ]
        p = 0.75 * distributions[0] + 0.25 * distributions[1]
        total += float((p * (p.log() - log_q)).sum()) * temperature**2
        count += size - prompt
    assert count == first_record["loss_tokens"]
    return total / count
