"""With `evaluate.span: answer` only what follows a thought is compared."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocl_ds.config import EvaluateConfig, JudgeConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.evaluation.answer_writer import AnswerWriter
from pocl_ds.evaluation.answers import summarize_answers
from pocl_ds.evaluation.evaluate import _footnotes
from pocl_ds.evaluation.judge import _Judge
from pocl_ds.workflow.manifest import Manifest, read_manifest

RESPONSES = [
    "<think>It is one of two.</think>\n\nParis",
    "<think>I never come to an end",
    "the capital is Paris",
    "no opening tag</think>Paris",
]
REFERENCES = ["<think>I know it.</think>Paris", "Paris", "Paris", "Paris"]


class Generator:
    """Answers with fixed responses."""

    processed_tokens = 0

    def generate(
        self, prompts: Sequence[Any], sampling: Any, progress: Callable[[int], None]
    ) -> list[str]:
        progress(len(prompts))
        return RESPONSES


def write_answers(folder: Path, span: str) -> tuple[list[dict[str, Any]], Manifest]:
    config = EvaluateConfig.model_validate({"span": span})
    samples = [
        Sample.from_instruction(f"q{number}", "Which city?", text)
        for number, text in enumerate(REFERENCES)
    ]
    tokenizer: Any = SimpleNamespace(
        render_prompt=lambda sample: "Which city?<think>\n" if sample.id == "q3" else "Which city?",
        tokenize_prompts=lambda samples: ([[1]] * len(samples), 0),
    )
    settings = {"rouge_tokenizer": "rouge_score"}
    writer = AnswerWriter(tokenizer, config, settings, "cities", "student", samples)
    file, generator = folder / "cities-seed1.jsonl", Generator()
    writer.write(file, generator, 1, "f", lambda *_, **__: None)  # type: ignore[arg-type]
    manifest = read_manifest(folder, f"{file.name}.manifest.json")
    assert manifest is not None
    return [json.loads(line) for line in file.read_text().splitlines()], manifest


def test_answers_alone_are_compared_and_unfinished_thoughts_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    log = logging.getLogger("pocl_ds")
    monkeypatch.setattr(log, "warning", lambda text, *values: warnings.append(text % values))
    records, manifest = write_answers(tmp_path, "answer")
    assert [record["exact_match"] for record in records] == [True, False, False, True]
    assert [record["rouge_l"] for record in records] == [1.0, 0.0, pytest.approx(0.4), 1.0]
    assert [record["unfinished_thought"] for record in records] == [False, True, False, False]
    assert [record["response"] for record in records] == RESPONSES  # complete on disk
    # A judge reads the answers alone.
    judge = _Judge(JudgeConfig(base_url="http://localhost:1", model="m"))
    questions = [judge._questions(record, None)[0] for record in records]
    assert "Paris" in questions[0]
    assert not any(thought in questions[0] for thought in ("one of two", "I know it"))
    judge = _Judge(JudgeConfig(base_url="http://localhost:1", model="m", mode="pairwise"))
    pair = judge._questions(records[0], records[1])
    assert len(pair) == 2 and not any("never come" in question for question in pair)
    assert warnings == [
        "benchmark cities, student: 1 of 4 responses do not end their thought within "
        "evaluate.max_new_tokens=256 and have no answer: raise it"
    ]
    summary = summarize_answers([records], [manifest])
    assert summary["unfinished_thoughts"] == 25 and summary["exact_match"] == 50
    other = {**summary, "unfinished_thoughts": 0.0}
    assert _footnotes([summary, other]) == [
        "answers after the thoughts alone are compared; 0.0% to 25.0% of a model's responses never "
        "end their thought and have none"
    ]
    assert _footnotes([other]) == ["answers after the thoughts alone are compared"]


def test_complete_responses_are_compared_by_default(tmp_path: Path) -> None:
    records, manifest = write_answers(tmp_path, "response")
    assert not any(record["exact_match"] for record in records)
    assert 0 < records[0]["rouge_l"] < 1
    assert "unfinished_thoughts" not in summarize_answers([records], [manifest])
