"""The step `score` on a tiny model: values, shards, restarts, and both backends."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_dependence import make_batch_dependent
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.config import GenerationConfig, PromptConfig, ScoreConfig, registry
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import shard_rows
from pocl_ds.difficulty import score as score_step
from pocl_ds.difficulty.plugin_metrics import METRICS, ScoredSamples
from pocl_ds.difficulty.score import score_training_samples
from pocl_ds.difficulty.shards import shard_file, shard_manifest, unfinished_shards
from pocl_ds.errors import ArtifactError, DataError, ModelError, RecipeError
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.models.load import load_model, load_tokenizer
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

ROOT = Path(__file__).resolve().parents[3]
PROMPT = PromptConfig(max_prompt_tokens=40, max_length=96)
SAMPLES = 11
TEXTS = [
    "the sum of the values",
    "a step",
    "the lazy dog and the quick brown fox",
    "é 你",
    "returns what the function does",
]


def make_run(
    folder: Path,
    tokenizer: Any,
    *,
    samples: int = SAMPLES,
    empty: bool = False,
    texts: list[str] = TEXTS,
) -> RunDirectory:
    """Write a data directory by hand; the last sample is truncated, so it has no EOS."""
    run = RunDirectory(folder)
    run.data.mkdir(parents=True)
    ids: list[str] = []
    sequences: list[list[int]] = []
    prompt_tokens: list[int] = []
    lines: list[str] = []
    for row in range(samples):
        answer = texts[row % len(texts)]
        question = f"Explain number {row}." * (1 + row % 3)
        sample = Sample.from_instruction(
            f"s{row * 7 % 13:02d}-{row}", question, answer, other_references=("another one",)
        )
        prompt = tokenizer(question).input_ids[: PROMPT.max_prompt_tokens]
        response = [] if empty else tokenizer(answer).input_ids
        ids.append(sample.id)
        prompt_tokens.append(len(prompt))
        truncated = row == samples - 1 and not empty
        sequences.append([*prompt, *response, *([] if truncated else [tokenizer.eos_token_id])])
        lines.append(sample.to_json() + "\n")
    save_split(run.data, "train", ids, sequences, prompt_tokens)
    (run.data / "train.jsonl").write_text("".join(lines))
    return run


def config(shards: int = 1, **fields: Any) -> ScoreConfig:
    generation = GenerationConfig(backend="transformers", max_num_seqs=4)
    return ScoreConfig(
        **{"generation": generation, "max_new_tokens": 12, "shards": shards, **fields}
    )


def run_score(run: RunDirectory, model: Path, settings: ScoreConfig, **fields: Any) -> None:
    score_training_samples(
        run, settings, PROMPT, **{"model_path": str(model), "fingerprint": "f", **fields}
    )


def read_scores(run: RunDirectory, shards: int) -> list[dict[str, Any]]:
    paths = [shard_file(run, shard, shards) for shard in range(shards)]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@given(st.integers(1, 500), st.integers(1, 40))
def test_shards_hold_every_row_once(samples: int, shards: int) -> None:
    rows = [shard_rows(samples, shard, shards) for shard in range(shards)]
    assert [row for part in rows for row in part] == list(range(samples))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_model_that_depends_on_its_batch_is_not_scored(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    make_batch_dependent(monkeypatch)
    with pytest.raises(
        ModelError,
        match=r"^score: the student in transformers: the cross-entropy of sample \S+ \(\d+ "
        r"response tokens\) is [\d.]+ nats alone and [\d.]+ in a batch of 4, [\d.]+ nats a token "
        r"apart, where rounding in float32 explains 0.0010: set score.generation.max_num_seqs=1$",
    ):
        run_score(run, tiny_llama, config())
    assert not list(run.scores.glob("*.jsonl"))

    # Samples that run alone have no batch to depend on.
    alone = GenerationConfig(backend="transformers", max_num_seqs=1)
    run_score(run, tiny_llama, config(generation=alone))
    manifest = read_manifest(run.scores, shard_manifest(run, 0, 1))
    assert manifest and manifest.info["batch_invariance"] == {"samples": 0}


def test_a_longrope_model_scores_each_sample_as_alone(tiny_longrope: Path, tmp_path: Path) -> None:
    """Samples on both sides of the original context of 64 tokens, in batches of four."""
    texts = [" ".join(["the sum of the values"] * count) for count in (1, 12, 3, 7)]
    run = make_run(tmp_path, load_tokenizer(str(tiny_longrope)), texts=texts)
    run_score(run, tiny_longrope, config())
    index = np.load(run.data / "train.index.npy")
    tokens = np.fromfile(run.data / "train.tokens.bin", np.uint32).astype(np.int64)
    lengths, model = index[:, 2], load_model(str(tiny_longrope))
    assert lengths.min() < 64 < lengths.max()
    for record, (start, prompt_tokens, total, _) in zip(read_scores(run, 1), index, strict=True):
        ids = torch.from_numpy(tokens[start : start + total])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, prompt_tokens - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt_tokens:])
        assert record["cross_entropy"] == pytest.approx(float(loss), abs=1e-5)
    manifest = read_manifest(run.scores, shard_manifest(run, 0, 1))
    assert manifest and manifest.info["batch_invariance"]["samples"] == 4
    assert manifest.info["batch_invariance"]["largest_difference"] < 1e-5


def test_scores_are_those_of_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    model: Any = load_model(str(tiny_llama))
    run = make_run(tmp_path, tokenizer)
    run_score(run, tiny_llama, config())
    scores = read_scores(run, 1)
    samples = list(read_sample_file(run.data / "train.jsonl"))
    index = np.load(run.data / "train.index.npy")
    tokens = np.fromfile(run.data / "train.tokens.bin", np.uint32).astype(np.int64)
    assert [record["id"] for record in scores] == [sample.id for sample in samples]
    for record, sample, (start, prompt_tokens, total, _) in zip(
        scores, samples, index, strict=True
    ):
        ids = torch.from_numpy(tokens[start : start + total])[None]
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                model(ids).logits[0, prompt_tokens - 1 : -1], ids[0, prompt_tokens:]
            )
            output = model.generate(ids[:, :prompt_tokens], max_new_tokens=12, do_sample=False)
        assert record["cross_entropy"] == pytest.approx(float(loss), abs=1e-5)
        assert record["tokens"] == total - prompt_tokens
        assert record["response"] == tokenizer.decode(
            output[0, prompt_tokens:], skip_special_tokens=True
        )
        assert record["rouge_l"] == rouge_l(record["response"], sample.references)
    manifest = read_manifest(run.scores, shard_manifest(run, 0, 1))
    assert manifest is not None
    assert manifest.fingerprint == "f"
    assert manifest.info["samples"] == SAMPLES
    assert manifest.info["tokens_per_second"] > 0


def test_eos_can_be_excluded_as_in_the_release(tiny_gpt2: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_gpt2))
    run, other = make_run(tmp_path / "a", tokenizer), make_run(tmp_path / "b", tokenizer)
    run_score(run, tiny_gpt2, config())
    run_score(other, tiny_gpt2, config(count_eos=False))
    model = load_model(str(tiny_gpt2))
    pairs = list(zip(read_scores(run, 1), read_scores(other, 1), strict=True))
    assert all(with_eos["tokens"] == without["tokens"] + 1 for with_eos, without in pairs[:-1])
    index = np.load(run.data / "train.index.npy")
    tokens = np.fromfile(run.data / "train.tokens.bin", np.uint32).astype(np.int64)
    for (with_eos, without), (start, _, total, _) in zip(pairs[:-1], index, strict=False):
        ids = torch.from_numpy(tokens[start : start + total])[None]
        with torch.no_grad():
            end = -float(model(ids).logits[0, -2].log_softmax(-1)[tokenizer.eos_token_id])
        total_loss = with_eos["cross_entropy"] * with_eos["tokens"]
        assert total_loss - without["cross_entropy"] * without["tokens"] == pytest.approx(
            end, abs=1e-3
        )
    truncated, without_eos = pairs[-1]
    assert truncated == without_eos  # it has no EOS to leave out


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_number_of_shards_and_chunks_changes_nothing(
    tiny_llama: Path, tmp_path: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    single, several = make_run(tmp_path / "one", tokenizer), make_run(tmp_path / "three", tokenizer)
    run_score(single, tiny_llama, config(temperature=temperature))
    monkeypatch.setattr(score_step, "MIN_SAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr(score_step, "ROUNDS_PER_CHUNK", 0)
    run_score(several, tiny_llama, config(3, temperature=temperature))
    for expected, actual in zip(read_scores(single, 1), read_scores(several, 3), strict=True):
        assert expected["cross_entropy"] == pytest.approx(actual.pop("cross_entropy"), abs=1e-5)
        assert {key: value for key, value in expected.items() if key != "cross_entropy"} == actual


def test_only_unfinished_shards_are_repeated(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    settings = config(4)
    run_score(run, tiny_llama, settings, shard=2)
    assert unfinished_shards(run, settings, "f") == [0, 1, 3]
    run_score(run, tiny_llama, settings)
    assert unfinished_shards(run, settings, "f") == []
    complete = read_scores(run, 4)
    before = {path.name: path.stat().st_mtime_ns for path in run.scores.iterdir()}
    shard_file(run, 1, 4).unlink()
    (
        run.scores / shard_manifest(run, 3, 4)
    ).unlink()  # a kill between the scores and their manifest
    assert unfinished_shards(run, settings, "f") == [1, 3]
    run_score(run, tiny_llama, settings)
    assert read_scores(run, 4) == complete
    after = {path.name: path.stat().st_mtime_ns for path in run.scores.iterdir()}
    assert after.keys() == before.keys()
    unchanged = {name for name in after if after[name] == before[name]}
    assert {name.split("-")[1] for name in unchanged} == {"00000", "00002"}
    assert {name.split("-")[1] for name in after.keys() - unchanged} == {"00001", "00003"}


def test_kill_keeps_finished_shards_and_no_partial_ones(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    monkeypatch.setattr(score_step, "MIN_SAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr(score_step, "ROUNDS_PER_CHUNK", 0)
    calls = []

    def interrupted_rouge_l(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # in the middle of the second shard
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = score_step.rouge_l_many
    monkeypatch.setattr(score_step, "rouge_l_many", interrupted_rouge_l)
    with pytest.raises(KeyboardInterrupt):
        run_score(run, tiny_llama, config(3))
    assert sorted(path.name for path in run.scores.glob("[!.]*")) == [
        shard_file(run, 0, 3).name,
        shard_manifest(run, 0, 3),
    ]
    assert unfinished_shards(run, config(3), "f") == [1, 2]


def test_finished_scores_load_no_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    run_score(run, tiny_llama, config(2))
    monkeypatch.setattr(score_step, "open_generator", lambda *a, **k: pytest.fail("opened"))
    run_score(run, tiny_llama, config(2))
    run_score(run, tiny_llama, config(5))  # another number of shards for finished scores
    assert unfinished_shards(run, config(5), "f") == []


def test_other_fingerprint_is_scored_again(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    run_score(run, tiny_llama, config(3))
    assert unfinished_shards(run, config(2), "g") == [0, 1]
    run_score(run, tiny_llama, config(2, max_new_tokens=3), fingerprint="g", shard=1)
    assert sorted(path.name for path in run.scores.glob("[!.]*")) == [
        shard_file(run, 1, 2).name,
        shard_manifest(run, 1, 2),
    ]


def test_shards_of_an_abandoned_division_are_removed(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    run_score(run, tiny_llama, config(3), shard=0)
    run_score(run, tiny_llama, config(1))
    assert sorted(path.name for path in run.scores.glob("[!.]*")) == [
        shard_file(run, 0, 1).name,
        shard_manifest(run, 0, 1),
    ]


def test_degenerate_metric_warns(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A random model generates noise: every ROUGE-L is 0, every cross-entropy differs."""
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        run_score(run, tiny_llama, config())
    warnings = [record.getMessage() for record in caplog.records if "tied" in record.getMessage()]
    assert len(warnings) == 1
    assert "rouge_l" in warnings[0]
    assert "student.heal_steps" in warnings[0]


CHINESE = ["北京是中国的首都。", "上海是一座大城市。很大。", "广州在南方。", "成都以熊猫闻名。"]


def test_every_shard_decides_on_the_same_tokenizer(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)), texts=CHINESE)
    lines = (run.data / "train.jsonl").read_text().replace("another one", "另一个")
    (run.data / "train.jsonl").write_text(lines)
    caplog.set_level(logging.INFO, "pocl_ds")
    for shard in range(3):
        run_score(run, tiny_llama, config(3), shard=shard)
        manifest = read_manifest(run.scores, shard_manifest(run, shard, 3))
        assert manifest is not None and manifest.info["rouge_tokenizer"] == "characters"
        assert manifest.info["rouge_l_zeros"]["unseen_references"] == 0
    message = "tokenizer characters: 22 references have on average 0.0% of their letters in words"
    assert caplog.text.count(message) == 3


def test_references_that_the_tokenizer_does_not_see_are_the_cause(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)), texts=CHINESE)
    lines = (run.data / "train.jsonl").read_text().replace("another one", "另一个")
    (run.data / "train.jsonl").write_text(lines)
    run_score(run, tiny_llama, config(2, rouge_tokenizer="rouge_score"))
    assert "the references of 11 of 11 samples have no letter a-z" in caplog.text
    assert "heal_steps" not in caplog.text


def test_errors_name_their_cause(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    run = make_run(tmp_path / "a", tokenizer)
    with pytest.raises(RecipeError, match=r"shard 3 does not exist: score.shards=3, choose 0 to 2"):
        run_score(run, tiny_llama, config(3), shard=3)
    with pytest.raises(RecipeError, match=r"score.shards=12 is more than the 11"):
        run_score(run, tiny_llama, config(12))
    with pytest.raises(DataError, match=r"has no response token to score"):
        run_score(
            make_run(tmp_path / "b", tokenizer, empty=True), tiny_llama, config(count_eos=False)
        )
    lines = (run.data / "train.jsonl").read_text().splitlines(keepends=True)
    (run.data / "train.jsonl").write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(ArtifactError, match=r"line 1 and train.ids.npy name different samples"):
        run_score(run, tiny_llama, config())
    (run.data / "train.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(ArtifactError, match=r"fewer lines"):
        run_score(run, tiny_llama, config())
    assert not list(run.scores.iterdir())


@pytest.fixture
def length_metric(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A metric `tokens`: the references' tokens."""
    monkeypatch.setitem(
        METRICS,
        "tokens",
        lambda samples: [len(values) for values in samples.log_probs],
    )
    registry.METRICS.append("tokens")
    yield "tokens"
    registry.METRICS.remove("tokens")


def test_plugin_metric_is_scored(tiny_llama: Path, tmp_path: Path, length_metric: str) -> None:
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    run_score(run, tiny_llama, config(metrics=(length_metric,)))
    assert all(
        record["metrics"] == {length_metric: record["tokens"]} for record in read_scores(run, 1)
    )


def test_a_metric_reads_prompts_responses_and_references(
    tiny_llama: Path, tmp_path: Path, length_metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ScoredSamples] = []

    def record(samples: ScoredSamples) -> list[float]:
        seen.append(samples)
        return [0.0] * len(samples.ids)

    monkeypatch.setitem(METRICS, length_metric, record)
    run = make_run(tmp_path, load_tokenizer(str(tiny_llama)))
    run_score(run, tiny_llama, config(metrics=(length_metric,)))
    stored = [
        Sample.from_json(line) for line in (run.data / "train.jsonl").read_text().splitlines()
    ]
    (samples,), records = seen, read_scores(run, 1)
    assert samples.ids == [sample.id for sample in stored]
    assert samples.prompts == [sample.messages_with_input[-2].content for sample in stored]
    assert all(samples.prompts)
    assert samples.references == [list(sample.references) for sample in stored]
    assert samples.responses == [record["response"] for record in records]
    assert [len(values) for values in samples.log_probs] == [r["tokens"] for r in records]


@pytest.mark.vllm
def test_vllm_scores_as_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Equal cross-entropy to 1e-4 and equal greedy text, with one engine for two shards."""
    tokenizer = load_tokenizer(str(tiny_llama))
    reference, run = make_run(tmp_path / "t", tokenizer), make_run(tmp_path / "v", tokenizer)
    run_score(reference, tiny_llama, config(2))
    code = (
        "from pocl_ds.workflow.run_dir import RunDirectory\n"
        "from pocl_ds.config import PromptConfig, ScoreConfig\n"
        "from pocl_ds.difficulty.score import score_training_samples\n"
        f"score_training_samples(RunDirectory({str(run.path)!r}), "
        "ScoreConfig(max_new_tokens=12, shards=2), "
        f"PromptConfig(max_prompt_tokens=40, max_length=96), model_path={str(tiny_llama)!r}, "
        "fingerprint='f', threads=1)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    for expected, actual in zip(read_scores(reference, 2), read_scores(run, 2), strict=True):
        assert expected["cross_entropy"] == pytest.approx(actual.pop("cross_entropy"), abs=1e-4)
        assert {key: value for key, value in expected.items() if key != "cross_entropy"} == actual
    manifest = read_manifest(run.scores, shard_manifest(run, 0, 2))
    assert manifest is not None
    assert manifest.info["backend"] == "vllm"
    assert manifest.info["batch_invariance"]["largest_difference"] < 1e-4  # also to transformers


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda texts: [1.0] * (len(texts) + 1),
            "the metric 'custom' gives 12 numbers for 11 samples",
        ),
        (
            lambda texts: [1.0] * (len(texts) - 1),
            "the metric 'custom' gives 10 numbers for 11 samples",
        ),
        (
            lambda texts: [float(i) if i else float("nan") for i in range(len(texts))],
            "sample s00-0 has custom=nan",
        ),
        (lambda texts: ["long"] * len(texts), "the metric 'custom' gives no numbers"),
    ],
)
def test_plugin_metric_must_give_one_number_per_sample(
    metric: Any, message: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "custom", lambda samples: metric(samples.responses))
    run = make_run(tmp_path / "run", load_tokenizer(str(tiny_llama)))
    with pytest.raises((RecipeError, DataError), match=re.escape(message)):
        run_score(
            run,
            tiny_llama,
            ScoreConfig.model_construct(**{**dict(config()), "metrics": ("custom",)}),
        )
    assert not list(run.scores.glob("shard*"))
