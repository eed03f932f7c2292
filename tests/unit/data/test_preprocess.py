"""The step `preprocess`: counts, limits and errors, and no partial result remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preprocessing import PROMPT, TOKENIZER, preprocess_file, records, write_jsonl

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess, read_sources, tokenize_splits
from pocl_ds.data.conversation import Sample
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import DataError
from pocl_ds.workflow.manifest import MANIFEST, damaged_files, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def test_limit_selects_across_the_split(tmp_path: Path) -> None:
    """The samples of a limited split have hashes all over the range of the split."""
    preprocess_file(
        tmp_path / "run", write_jsonl(tmp_path / "all.jsonl", records(2000)), max_train_samples=100
    )
    places = np.sort(np.load(tmp_path / "run" / "data" / "train.prompt_keys.npy") / 2**64)
    assert len(places) == 100 and places[0] < 0.2 and places[-1] > 0.9


def test_manifest_counts_samples_and_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*records(60), {"instruction": "Say much.", "output": "word " * 80}]
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    with caplog.at_level("INFO", "pocl_ds"):
        preprocess_file(tmp_path / "run", source, validation_fraction=0.0, test_fraction=0.0)
    folder = tmp_path / "run" / "data"
    manifest = read_manifest(folder)
    assert (
        manifest is not None
        and manifest.step == "preprocess"
        and not damaged_files(folder, manifest)
    )
    info = manifest.info
    train = info["splits"]["train"]
    assert train["samples"] == 61 and train["truncated"] == 1
    assert train["events"] == {"response_truncated": 1}
    assert info["splits"]["train"]["tokens"] == int(
        TokenizedSplit.open(folder, "train").total_tokens.sum()
    )
    assert (info["eos_id"], info["vocabulary"]) == (0, len(TOKENIZER))
    assert (
        "tokenizer" in info and "train: 61 samples" in caplog.text and "1 truncated" in caplog.text
    )
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(
        [
            MANIFEST,
            *(
                f"{split}.{part}"
                for split in preprocess.SPLITS
                for part in (
                    "jsonl",
                    "tokens.bin",
                    "loss_mask.bin",
                    "index.npy",
                    "ids.npy",
                    "prompt_keys.npy",
                )
            ),
        ]
    )


def test_finished_result_is_reused_and_damaged_result_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", records(50))
    expected = preprocess_file(tmp_path / "run", source)
    calls = []
    monkeypatch.setattr(
        preprocess,
        "find_overlap",
        lambda *arguments, real=preprocess.find_overlap, **options: (
            calls.append(1) or real(*arguments, **options)
        ),
    )
    assert preprocess_file(tmp_path / "run", source) == expected and not calls
    (tmp_path / "run" / "data" / "train.tokens.bin").unlink()
    assert preprocess_file(tmp_path / "run", source) == expected and calls == [1]
    assert len(TokenizedSplit.open(tmp_path / "run" / "data", "train").tokens(0))


def test_invalid_records_are_an_error_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged line counts as a record that cannot be used."""
    rows: list[Any] = records(40)
    expected = preprocess_file(tmp_path / "valid", write_jsonl(tmp_path / "valid.jsonl", rows))
    rows[3:3] = [
        {"instruction": "Say it.", "output": " "},
        {"instruction": "Say it.", "output": "half \ud800"},
    ]
    rows = [{"instruction": "Say it."}, *rows, {"instruction": None, "output": "it"}]
    source = write_jsonl(tmp_path / "part.jsonl", rows)
    with pytest.raises(
        DataError,
        match="line 1: there is no field 'output' .*; data.on_invalid=skip leaves out every such",
    ):
        preprocess_file(tmp_path / "error", source)
    assert preprocess_file(tmp_path / "skip", source, on_invalid="skip") == expected
    assert "skipped 4 records that cannot be used (" in caplog.text
    manifest = read_manifest(tmp_path / "skip" / "data")
    assert manifest is not None and manifest.info["invalid_records"] == 4
    assert sum(manifest.info["invalid_reasons"].values()) == 4
    assert manifest.info["records"]["part"]["invalid"] == manifest.info["invalid_reasons"]
    with (tmp_path / "part.jsonl").open("a") as stream:
        stream.write('{"instruction": "cut')
    with pytest.raises(DataError, match="line 1: there is no field 'output'"):
        preprocess_file(tmp_path / "broken", source)
    assert preprocess_file(tmp_path / "broken", source, on_invalid="skip") == expected
    manifest = read_manifest(tmp_path / "broken" / "data")
    assert manifest is not None and manifest.info["invalid_records"] == 5
    with pytest.raises(DataError, match="none of its 1 records can be used; the first: "):
        preprocess_file(
            tmp_path / "none",
            write_jsonl(tmp_path / "none.jsonl", [{"instruction": "Say it.", "output": ""}]),
            on_invalid="skip",
        )


def test_no_training_samples_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", records(3))
    short = PromptConfig(template="plain", max_prompt_tokens=1, max_length=2, overlong="drop")
    with pytest.raises(DataError, match="leaves no training samples"):
        preprocess_file(tmp_path / "run", source, prompt=short)
    assert not (tmp_path / "run" / "data").exists()


def test_failure_keeps_the_earlier_result(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", records(50))
    expected = preprocess_file(tmp_path / "run", good)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*records(50), {"instruction": "x"}])
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(DataError, match="line 51"):
        preprocess.preprocess(run, DataConfig(source=bad), PROMPT, TOKENIZER, "e" * 64)
    assert preprocess_file(tmp_path / "run", good) == expected
    assert [path.name for path in run.path.iterdir()] == ["data"]  # no temporary folder remains


def test_ctrl_c_leaves_no_partial_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_splits, "tokenize_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess_file(tmp_path / "run", write_jsonl(tmp_path / "all.jsonl", records(50)))
    assert list((tmp_path / "run").iterdir()) == []


def test_documentation_source_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        read_sources,
        "extract_documentation_samples",
        lambda config: (
            Sample.from_instruction(f"d{n}", f"Explain {n}.", "It does.") for n in range(90)
        ),
    )
    splits = preprocess_file(tmp_path / "run", "documentation")
    assert sum(map(len, splits.values())) == 90


def test_real_data_is_tokenized(tmp_path: Path, shared_data: Path) -> None:
    splits = preprocess_file(
        tmp_path / "run",
        str(shared_data / "eval_sni_11plus.jsonl"),
        prompt=PromptConfig(template="alpaca", max_prompt_tokens=2048, max_length=4096),
        test=str(shared_data / "eval_dolly500.jsonl"),
    )
    assert len(splits["test"]) == 500 and len(splits["train"]) + len(splits["validation"]) == 1694
