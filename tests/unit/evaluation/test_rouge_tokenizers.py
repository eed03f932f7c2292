"""The tokenizer of ROUGE-L by benchmark, its warning and its footnote."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pocl_ds.config import EvaluateConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.split_writer import save_split
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluation.rouge_tokenizers import benchmark_rouge_tokenizers, tokenizer_footnote
from pocl_ds.workflow.run_dir import RunDirectory

ENGLISH, RUSSIAN, CHINESE = "The capital of France.", "Столица Франции.", "法国的首都。"


def samples(text: str, count: int = 3) -> list[Sample]:
    return [Sample.from_instruction(f"s{i}", f"Question {i}?", text) for i in range(count)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A data folder whose training references are Russian."""
    run = RunDirectory(tmp_path)
    run.data.mkdir(parents=True)
    items = samples(RUSSIAN, 5)
    save_split(run.data, "train", [item.id for item in items], [[1, 2]] * 5, [1] * 5)
    (run.data / "train.jsonl").write_text("".join(item.to_json() + "\n" for item in items))
    return run


def test_auto_uses_the_training_data_for_the_test_split_and_each_benchmark_by_itself(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pocl_ds")
    config = EvaluateConfig(benchmarks={"test": "test", "en": "en.jsonl", "zh": "zh.jsonl"})
    items = {"test": samples(ENGLISH), "en": samples(ENGLISH), "zh": samples(CHINESE)}
    assert benchmark_rouge_tokenizers(run, config, items, "auto") == {
        "test": "unicode_words",
        "en": "rouge_score",
        "zh": "characters",
    }
    assert "benchmark zh: ROUGE-L uses the tokenizer characters: 3 references" in caplog.text


def test_a_fixed_tokenizer_serves_every_benchmark_and_warns_of_what_it_does_not_see(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvaluateConfig(benchmarks={"en": "en.jsonl", "zh": "zh.jsonl"})
    items = {"en": samples(ENGLISH), "zh": samples(CHINESE)}
    chosen = benchmark_rouge_tokenizers(run, config, items, "rouge_score")
    assert chosen == {"en": "rouge_score", "zh": "rouge_score"}
    assert [record.getMessage() for record in caplog.records] == [
        "benchmark zh: the references of 3 of 3 items have no token of "
        "score.rouge_tokenizer=rouge_score, so their ROUGE-L is 0 for every answer"
    ]


def test_without_training_data_the_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run `pocl preprocess` first"):
        benchmark_rouge_tokenizers(
            RunDirectory(tmp_path), EvaluateConfig(), {"test": samples(ENGLISH)}, "auto"
        )


def test_other_tokens_than_those_of_rouge_score_are_a_footnote() -> None:
    assert tokenizer_footnote("rouge_score") is None
    assert tokenizer_footnote("characters") == (
        "ROUGE-L compares characters (score.rouge_tokenizer=characters)"
    )
