"""With `score.span: answer` only what follows a thought is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import GenerationConfig, PromptConfig, ScoreConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.thought_spans import ThoughtFinder
from pocl_ds.difficulty import score as score_step
from pocl_ds.difficulty.score import score_training_samples
from pocl_ds.difficulty.shards import shard_file, shard_manifest
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.models.load import load_model, load_tokenizer
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def test_only_answers_are_scored(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROUGE-L of answers alone, and the cross-entropy of the tokens after the thought."""
    tokenizer: Any = load_tokenizer(str(tiny_llama))
    model: Any = load_model(str(tiny_llama))
    run = RunDirectory(tmp_path)
    run.data.mkdir(parents=True)
    references = ["<think>it is two and two</think>the answer is four", "plain answer"]
    responses = ["<think>no idea</think>the answer is five", "<think>it never ends"]
    sequences, lines = [], []
    prompt = tokenizer("Explain it.").input_ids
    for number, text in enumerate(references):
        sequences.append([*prompt, *tokenizer(text).input_ids, tokenizer.eos_token_id])
        lines.append(Sample.from_instruction(f"s{number}", "Explain it.", text).to_json() + "\n")
    save_split(run.data, "train", ["s0", "s1"], sequences, [len(prompt)] * 2)
    (run.data / "train.jsonl").write_text("".join(lines))

    opened = score_step.open_generator

    def open_generator(*arguments: Any, **fields: Any) -> Any:
        generator = opened(*arguments, **fields)
        monkeypatch.setattr(generator, "generate", lambda *_: responses)
        return generator

    monkeypatch.setattr(score_step, "open_generator", open_generator)
    generation = GenerationConfig(backend="transformers", max_num_seqs=2)
    config = ScoreConfig(generation=generation, max_new_tokens=9, span="answer")
    score_training_samples(
        run,
        config,
        PromptConfig(template="plain", max_prompt_tokens=64, max_length=128),
        model_path=str(tiny_llama),
        fingerprint="f",
    )
    records = _records(run)
    assert records[0]["rouge_l"] == rouge_l("the answer is five", ["the answer is four"])
    assert records[1]["rouge_l"] == 0 and records[1]["response"] == responses[1]

    for record, ids in zip(records, sequences, strict=True):
        start = len(prompt) + (ThoughtFinder(tokenizer).answer_start(ids[len(prompt) :]) or 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
        assert record["tokens"] == len(ids) - start
        assert record["cross_entropy"] == pytest.approx(float(expected), abs=1e-5)
    assert records[0]["tokens"] < len(sequences[0]) - len(prompt)
    manifest = read_manifest(run.scores, shard_manifest(run, 0, 1))
    assert manifest and manifest.info["unfinished_thoughts"] == 1
    assert manifest.info["span"] == "answer" and np.isfinite(records[1]["cross_entropy"])


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shard_file(run, 0, 1).read_text().splitlines()]
