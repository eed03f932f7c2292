"""Token ids that a model cannot read are refused before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from refusals import error_message, restored_signals
from tiny_runs import write_recipe

from pocl_ds.cli.main import main

ROWS = tiny_models.VOCABULARY
TURN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def larger_tokenizer(template: str, **tokens: Any) -> Any:
    """The tokenizer of the tiny models with further tokens, whose ids begin at `ROWS`."""
    tokenizer = tiny_models.make_tokenizer(chat=True)
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = template
    return tokenizer


def pair(folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    """Teacher and student whose embeddings have fewer rows than their tokenizer has tokens."""
    models = [
        tiny_models.llama(folder / name, layers=1, seed=seed, rows=ROWS)
        for seed, name in enumerate(("teacher", "student"))
    ]
    for model in models:
        tokenizer.save_pretrained(model)
    return models[0], models[1]


def small_recipe(folder: Path, teacher: Path, student: Path, **changes: Any) -> Path:
    defaults: dict[str, Any] = {"launch": {"ranks": 1}, "curriculum": {"num_subsets": 2}}
    return write_recipe(folder, teacher, student, max_train_samples=40, **{**defaults, **changes})


def test_a_template_with_a_token_beyond_the_rows_is_refused_before_the_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = larger_tokenizer(
        TURN_TEMPLATE, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    teacher, student = pair(tmp_path, tokenizer)
    recipe = small_recipe(tmp_path, teacher, student)
    (tmp_path / "data.jsonl").unlink()  # the refusal comes before
    message = error_message(capsys, "preprocess", recipe, "--run-dir", tmp_path / "run")
    highest = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert message == (
        f"every sample in prompt.template=chat holds token id {highest} ('<|im_end|>'), and the "
        f"embedding of {student} has {ROWS} rows: resize it to its tokenizer "
        "(resize_token_embeddings of transformers) and save the model, or leave this token out of "
        "the template and the texts"
    )


def test_a_text_with_a_token_beyond_the_rows_is_refused_before_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data are finished then, and every later command refuses them again."""
    tokenizer = larger_tokenizer(tiny_models.CHAT_TEMPLATE, additional_special_tokens=["<|extra|>"])
    recipe = small_recipe(tmp_path, *pair(tmp_path, tokenizer))
    with (tmp_path / "data.jsonl").open("a") as stream:
        stream.writelines(
            json.dumps({"id": f"bad{i}", "instruction": f"Say {i} <|extra|>.", "output": "Yes"})
            + "\n"
            for i in range(60)
        )
    for command in ("preprocess", "init-student"):
        message = error_message(capsys, command, recipe, "--run-dir", tmp_path / "run")
        assert message.startswith("sample bad")
        assert f"holds token id {ROWS} ('<|extra|>'), and the embedding of" in message
    assert not (tmp_path / "run" / "scores").exists()


def test_padding_beyond_the_rows_is_read_by_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of several lengths are scored, although the padding token has no row."""
    tokenizer = larger_tokenizer(tiny_models.CHAT_TEMPLATE, pad_token="[PAD]")
    assert tokenizer.pad_token_id == ROWS
    recipe = small_recipe(tmp_path, *pair(tmp_path, tokenizer))
    for command in ("preprocess", "init-student", "score"):
        with restored_signals():
            assert main([command, str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    log = (tmp_path / "run" / "logs" / "preprocess.log").read_text()
    assert log.count(f"tokens beyond the {ROWS} rows of the embedding of") == 2
    assert log.count("student: 1 ('[PAD]'); a text that holds one is refused") == 1
    assert len(list((tmp_path / "run" / "scores").glob("*.jsonl"))) == 2
