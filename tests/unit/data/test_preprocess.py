"""The stage `data`: which sample lands where does not depend on the file's order, and nothing is
left half-written.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess
from pocl_ds.data.records import Sample, read_sample_file
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import DataError
from pocl_ds.workflow.manifest import MANIFEST, damaged_files, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

TOKENIZER = tiny_models.make_tokenizer()
PROMPT = PromptConfig(template="plain", max_prompt_tokens=32, max_length=64)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Say {n}.", "input": "", "output": f"number {n}"}
        for n in range(first, first + count)
    ]


def prepare(
    folder: Path, source: str, *, prompt: PromptConfig = PROMPT, **options: Any
) -> dict[str, list[Sample]]:
    run = RunDirectory(folder)
    preprocess.preprocess(run, DataConfig(source=source, **options), prompt, TOKENIZER, "f" * 64)
    return {
        split: list(read_sample_file(run.data / f"{split}.jsonl")) for split in preprocess.SPLITS
    }


def test_splits_are_whole_disjoint_and_of_the_asked_size(tmp_path: Path) -> None:
    source = write(tmp_path / "all.jsonl", records(1000))
    splits = prepare(tmp_path / "run", source, validation_fraction=0.1, test_fraction=0.2)
    prompts = [sample.instruction for split in splits.values() for sample in split]
    assert sorted(prompts) == sorted(record["instruction"] for record in records(1000))
    assert abs(len(splits["validation"]) - 100) < 40 and abs(len(splits["test"]) - 200) < 55
    for split, samples in splits.items():
        assert [
            name.decode() for name in TokenizedSplit.open(tmp_path / "run" / "data", split).ids
        ] == [s.id for s in samples]


def test_the_order_of_the_file_decides_nothing(tmp_path: Path) -> None:
    rows = records(400)
    limits = {"max_train_samples": 100, "max_validation_samples": 10, "max_test_samples": 5}
    there = prepare(tmp_path / "a", write(tmp_path / "a.jsonl", rows), **limits)
    random.Random(0).shuffle(rows)
    back = prepare(tmp_path / "b", write(tmp_path / "b.jsonl", rows), **limits)
    for split, limit in zip(preprocess.SPLITS, (100, 10, 5), strict=True):
        assert len(there[split]) == limit
        assert {sample.id: sample for sample in there[split]} == {
            sample.id: sample for sample in back[split]
        }


def test_more_data_moves_no_sample_to_another_split(tmp_path: Path) -> None:
    few = prepare(tmp_path / "a", write(tmp_path / "a.jsonl", records(200)))
    many = prepare(tmp_path / "b", write(tmp_path / "b.jsonl", records(400)))
    for split in preprocess.SPLITS:
        assert {s.id for s in few[split]} <= {s.id for s in many[split]}


def test_the_same_prompt_never_lies_in_two_splits(tmp_path: Path) -> None:
    rows = [{**record, "output": f"answer {n}"} for record in records(200) for n in range(3)]
    splits = prepare(
        tmp_path / "run",
        write(tmp_path / "all.jsonl", rows),
        validation_fraction=0.3,
        test_fraction=0.3,
    )
    prompts = {
        split: {sample.instruction for sample in samples} for split, samples in splits.items()
    }
    assert not (prompts["train"] & prompts["test"] or prompts["train"] & prompts["validation"])
    assert not prompts["validation"] & prompts["test"]
    assert all(prompts.values()) and sum(map(len, splits.values())) == 600


def test_given_files_replace_the_split_and_their_prompts_leave_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "all.jsonl", records(100))
    test = write(
        tmp_path / "test.jsonl",
        [{"instruction": "Say 3.", "output": "another answer"}, *records(4, first=500)],
    )
    splits = prepare(tmp_path / "run", source, test=test, validation_fraction=0.0)
    assert len(splits["test"]) == 5 and len(splits["validation"]) == 0
    assert len(splits["train"]) == 99 and "Say 3." not in {
        sample.instruction for sample in splits["train"]
    }
    assert "1 training samples have the prompt of a validation or test sample" in caplog.text


def test_what_a_test_asks_no_validation_asks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation chooses between checkpoints, and sets DistiLLM's phi: a test that it has seen is
    none.
    """
    source, given = (
        write(tmp_path / "all.jsonl", records(300)),
        write(tmp_path / "test.jsonl", records(100)),
    )
    splits = prepare(tmp_path / "a", source, test=given, validation_fraction=0.3)
    asked = {split: {sample.prompt_key for sample in samples} for split, samples in splits.items()}
    assert len(asked["test"]) == 100 and len(asked["train"]) + len(asked["validation"]) == 200
    assert (
        not asked["test"] & (asked["train"] | asked["validation"])
        and not asked["train"] & asked["validation"]
    )
    assert len(asked["validation"]) > 20
    assert (
        "24 validation samples have the prompt of a test sample: left out of validation"
        in caplog.text
    )
    assert (
        "76 training samples have the prompt of a validation or test sample: left out of training"
        in caplog.text
    )
    splits = prepare(
        tmp_path / "b", source, test=given, validation=write(tmp_path / "v.jsonl", records(120))
    )
    assert [len(splits[split]) for split in preprocess.SPLITS] == [180, 20, 100]
    caplog.clear()
    splits = prepare(tmp_path / "c", source, validation=given, test_fraction=0.3)
    assert (
        len(splits["validation"]) == 100
        and len(splits["train"]) + len(splits["test"]) == 200
        and len(splits["test"]) > 20
    )
    assert "test samples have the prompt of a validation sample: left out of test" in caplog.text


def test_what_is_asked_in_other_words_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in P3, which has items under several templates. Short answers are equal by chance."""
    far = [f"It takes {n} steps to come from here to the next village." for n in range(5)]
    asked = [
        ("Say how far, 0.", f" {far[0].upper()} ".replace(" TO ", "\n to ")),
        ("Say how far, 1.", [f"{far[0]} Or so.", far[1]]),
        ("Say how far, 2.", far[2]),  # training has it under this prompt alone, and loses it
        (
            "Say how far, 3.",
            far[3],
        ),  # training has it as a second reference, which is not trained on
        ("Say yes.", "Yes."),
    ]
    trained = [
        ("How far, 0?", far[0]),
        ("How far, 1?", far[1]),
        ("Say how far, 2.", far[2]),
        ("How far, 3?", [far[4], far[3]]),
        ("Yes?", "Yes."),
    ]
    given = write(
        tmp_path / "test.jsonl", [{"instruction": prompt, "output": text} for prompt, text in asked]
    )
    source = write(
        tmp_path / "all.jsonl",
        [{"instruction": prompt, "output": text} for prompt, text in trained],
    )
    prepare(tmp_path / "run", source, test=given, validation_fraction=0.0)
    manifest = read_manifest(tmp_path / "run" / "data")
    assert manifest is not None
    assert manifest.info["known_references"] == {
        "validation": {"long": 0, "known": 0},
        "test": {"long": 4, "known": 2},
    }
    assert (
        "test: 2 of 5 samples (40.0%) have a reference of 10 words or more that is also a "
        "training response" in caplog.text
    )
    assert "(4 have a reference that long)" in caplog.text
    caplog.clear()
    prepare(
        tmp_path / "none",
        write(tmp_path / "few.jsonl", records(20)),
        test=given,
        validation_fraction=0.0,
    )
    assert "a training response" not in caplog.text


def test_the_limit_takes_a_cross_section_of_a_split(tmp_path: Path) -> None:
    """A limited split is not the edge of the split: its samples hash all over."""
    splits = prepare(
        tmp_path / "run", write(tmp_path / "all.jsonl", records(2000)), max_train_samples=100
    )
    places = sorted(int(sample.prompt_key[:8], 16) / 2**32 for sample in splits["train"])
    assert places[0] < 0.2 and places[-1] > 0.9


def test_the_manifest_says_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*records(60), {"instruction": "Say much.", "output": "word " * 80}]
    source = write(tmp_path / "all.jsonl", rows)
    with caplog.at_level("INFO", "pocl_ds"):
        prepare(tmp_path / "run", source, validation_fraction=0.0, test_fraction=0.0)
    folder = tmp_path / "run" / "data"
    manifest = read_manifest(folder)
    assert (
        manifest is not None
        and manifest.step == "preprocess"
        and not damaged_files(folder, manifest)
    )
    info = manifest.info
    assert info["splits"]["train"]["samples"] == 61 and info["splits"]["train"]["truncated"] == 1
    assert info["splits"]["train"]["tokens"] == int(
        TokenizedSplit.open(folder, "train").total_tokens.sum()
    )
    assert (info["pad_id"], info["eos_id"], info["vocabulary"]) == (1, 0, len(TOKENIZER))
    assert (
        "tokenizer" in info and "train: 61 samples" in caplog.text and "1 truncated" in caplog.text
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            MANIFEST,
            *(
                f"{split}.{part}"
                for split in preprocess.SPLITS
                for part in ("jsonl", "tokens.bin", "index.npy", "ids.npy")
            ),
        ]
    )


def test_a_finished_stage_is_found_and_a_damaged_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "all.jsonl", records(50))
    first = prepare(tmp_path / "run", source)
    calls = []
    monkeypatch.setattr(
        preprocess,
        "_split_samples",
        lambda *given, real=preprocess._split_samples: calls.append(1) or real(*given),
    )
    assert prepare(tmp_path / "run", source) == first and not calls
    (tmp_path / "run" / "data" / "train.tokens.bin").unlink()
    assert prepare(tmp_path / "run", source) == first and calls == [1]
    assert len(TokenizedSplit.open(tmp_path / "run" / "data", "train").tokens(0))


def test_records_that_say_nothing_are_an_error_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is broken, and not merely empty, stays an error."""
    rows: list[Any] = records(40)
    whole = prepare(tmp_path / "whole", write(tmp_path / "whole.jsonl", rows))
    rows[3:3] = [
        {"instruction": "Say it.", "output": " "},
        {"instruction": "Say it.", "output": "half \ud800"},
    ]
    rows = [{"instruction": "Say it."}, *rows, {"instruction": None, "output": "it"}]
    source = write(tmp_path / "part.jsonl", rows)
    with pytest.raises(
        DataError,
        match="line 1: there is no field 'output' .*; data.on_invalid=skip leaves out every such",
    ):
        prepare(tmp_path / "error", source)
    assert prepare(tmp_path / "skip", source, on_invalid="skip") == whole
    assert "skipped 4 records without usable content; the first: " in caplog.text
    manifest = read_manifest(tmp_path / "skip" / "data")
    assert manifest is not None and manifest.info["invalid_records"] == 4
    with (tmp_path / "part.jsonl").open("a") as stream:
        stream.write('{"instruction": "cut')
    with pytest.raises(DataError, match="line 45 is not valid JSON"):
        prepare(tmp_path / "broken", source, on_invalid="skip")
    with pytest.raises(DataError, match="leaves no training samples"):
        prepare(
            tmp_path / "none",
            write(tmp_path / "none.jsonl", [{"instruction": "Say it.", "output": ""}]),
            on_invalid="skip",
        )


def test_nothing_left_to_train_on_is_one_sentence(tmp_path: Path) -> None:
    source = write(tmp_path / "all.jsonl", records(3))
    short = PromptConfig(template="plain", max_prompt_tokens=1, max_length=2, overlong="drop")
    with pytest.raises(DataError, match="leaves no training samples"):
        prepare(tmp_path / "run", source, prompt=short)
    assert not (tmp_path / "run" / "data").exists()


def test_a_fault_on_the_way_leaves_the_earlier_result(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", records(50))
    first = prepare(tmp_path / "run", good)
    bad = write(tmp_path / "bad.jsonl", [*records(50), {"instruction": "x"}])
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(DataError, match="line 51"):
        preprocess.preprocess(run, DataConfig(source=bad), PROMPT, TOKENIZER, "e" * 64)
    assert prepare(tmp_path / "run", good) == first
    assert [path.name for path in run.path.iterdir()] == ["data"]  # no temporary folder stays


def test_ctrl_c_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "write_tokenized_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "run", write(tmp_path / "all.jsonl", records(50)))
    assert list((tmp_path / "run").iterdir()) == []


def test_the_default_corpus_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        preprocess,
        "extract_documentation_samples",
        lambda config: (Sample(f"d{n}", f"Explain {n}.", "", ("It does.",)) for n in range(90)),
    )
    splits = prepare(tmp_path / "run", "documentation")
    assert sum(map(len, splits.values())) == 90


def test_real_data_is_encoded(tmp_path: Path, shared_data: Path) -> None:
    splits = prepare(
        tmp_path / "run",
        str(shared_data / "eval_sni_11plus.jsonl"),
        test=str(shared_data / "eval_dolly500.jsonl"),
    )
    assert len(splits["test"]) == 500 and len(splits["train"]) + len(splits["validation"]) == 1694
