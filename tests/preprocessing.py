"""Runs of the step `preprocess` on small files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.workflow.run_dir import RunDirectory

TOKENIZER = tiny_models.make_tokenizer()
PROMPT = PromptConfig(template="plain", max_prompt_tokens=32, max_length=64)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Say {n}.", "input": "", "output": f"number {n}"}
        for n in range(start, start + count)
    ]


def preprocess_file(
    folder: Path, source: str, *, prompt: PromptConfig = PROMPT, **options: Any
) -> dict[str, list[Sample]]:
    run = RunDirectory(folder)
    preprocess.preprocess(run, DataConfig(source=source, **options), prompt, TOKENIZER, "f" * 64)
    return {
        split: [
            replace(sample, place="") for sample in read_sample_file(run.data / f"{split}.jsonl")
        ]
        for split in preprocess.SPLITS
    }
