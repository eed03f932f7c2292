"""The domain of each sample: a field of its record, or the name of its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess, read_sources
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.data.split_sources import read_split_domains
from pocl_ds.errors import DataError
from pocl_ds.workflow.manifest import Manifest
from pocl_ds.workflow.run_dir import RunDirectory

PROMPT = PromptConfig(template="alpaca", max_prompt_tokens=256, max_length=320)


def write_records(path: Path, domains: list[Any]) -> str:
    with path.open("w") as stream:
        for number, domain in enumerate(domains):
            record = {"instruction": f"{path.stem} {number}.", "output": "Yes.", "kind": domain}
            stream.write(json.dumps(record) + "\n")
    return str(path)


def run_preprocess(folder: Path, **data: Any) -> tuple[Path, Manifest]:
    run = RunDirectory(folder / "run")
    tokenizer = tiny_models.make_tokenizer()
    config = DataConfig.model_validate({"validation_fraction": 0, "test_fraction": 0, **data})
    return run.data, preprocess.preprocess(run, config, PROMPT, tokenizer, "f" * 64)


def domains_of(folder: Path, split: str) -> dict[str, str]:
    """The domain of each sample by its instruction; the sample itself has the same one."""
    labels = read_split_domains(folder, split)
    assert labels is not None
    samples = list(read_sample_file(folder / f"{split}.jsonl"))
    assert [labels.name_of(row) for row in range(len(samples))] == [s.domain for s in samples]
    return {sample.instruction: sample.domain for sample in samples}


def test_a_field_holds_the_domain_and_the_source_replaces_a_missing_one(tmp_path: Path) -> None:
    source = write_records(tmp_path / "all.jsonl", ["math", 7, "", None, " math "])
    held_out = write_records(tmp_path / "held_out.jsonl", ["chat", None])
    folder, manifest = run_preprocess(
        tmp_path, source=source, validation=held_out, fields={"domain": "kind"}
    )
    expected = ["math", "7", "all", "all", "math"]
    assert domains_of(folder, "train") == {f"all {n}.": name for n, name in enumerate(expected)}
    validation = {"held_out 0.": "chat", "held_out 1.": "held_out"}
    assert domains_of(folder, "validation") == validation
    assert manifest.info["domains"]["train"] == {"math": 2, "7": 1, "all": 2}


def test_the_sources_of_a_mixture_are_domains(tmp_path: Path) -> None:
    sources = [
        {"source": write_records(tmp_path / "a.jsonl", ["x", "y"]), "name": "first"},
        {
            "source": write_records(tmp_path / "b.jsonl", ["x", None]),
            "fields": {"domain": "kind"},
        },
    ]
    folder, _ = run_preprocess(tmp_path, sources=sources)
    expected = {"a 0.": "first", "a 1.": "first", "b 0.": "x", "b 1.": "b"}
    assert domains_of(folder, "train") == expected


def test_without_a_field_or_a_mixture_there_are_no_domains(tmp_path: Path) -> None:
    folder, manifest = run_preprocess(tmp_path, source=write_records(tmp_path / "a.jsonl", ["x"]))
    assert read_split_domains(folder, "train") is None
    assert not list(folder.glob("*domains*")) and manifest.info["domains"] is None


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([["math"]], "field 'kind' must be text, found list"),
        (["a", "b", "c"], "more than 2 domains, the last one 'c'"),
    ],
)
def test_a_field_that_holds_no_domain_is_refused(
    domains: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_sources, "MAX_DOMAINS", 2)
    source = write_records(tmp_path / "a.jsonl", domains)
    with pytest.raises(DataError, match=message):
        run_preprocess(tmp_path, source=source, fields={"domain": "kind"})
