"""Options of the step `preprocess`: processes, mixtures, near-duplicates, invalid samples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess, tokenize_workers
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.split_sources import read_split_sources
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import DataError
from pocl_ds.workflow.manifest import MANIFEST, Manifest
from pocl_ds.workflow.run_dir import RunDirectory

CHAT_TOKENIZER = tiny_models.make_tokenizer(chat=True)
CHAT = PromptConfig(template="chat", max_prompt_tokens=128, max_length=256)
# Gemma's template refuses system turns.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(start, start + count)
    ]


def run_preprocess(
    folder: Path,
    data: DataConfig,
    *,
    prompt: PromptConfig = CHAT,
    tokenizer: Any = CHAT_TOKENIZER,
    teacher_tokenizer: Any = None,
    **options: Any,
) -> tuple[Path, Manifest]:
    run = RunDirectory(folder)
    manifest = preprocess.preprocess(
        run, data, prompt, tokenizer, "f" * 64, teacher_tokenizer, **options
    )
    return run.data, manifest


def instructions(folder: Path, split: str = "train") -> set[str]:
    return {sample.instruction for sample in read_sample_file(folder / f"{split}.jsonl")}


@pytest.mark.parametrize("teacher", [False, True])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    monkeypatch.setattr(tokenize_workers, "CHUNK_SAMPLES", 16)
    rows: list[dict[str, Any]] = records(400)
    rows[5]["output"] = "long " * 300
    rows[7]["instruction"] = "long " * 300
    rows[11]["output"] = ""
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    folders, infos = [], []
    for workers in (1, 2, 5):
        folder, manifest = run_preprocess(
            tmp_path / str(workers),
            DataConfig(source=source, num_workers=workers, on_invalid="skip"),
            teacher_tokenizer=tiny_models.make_sentencepiece_tokenizer() if teacher else None,
        )
        folders.append(folder)
        infos.append(
            {k: v for k, v in manifest.info.items() if k not in ("seconds", "peak_host_bytes")}
        )
    files = {str(p.relative_to(folders[0])) for p in folders[0].rglob("*") if p.is_file()}
    assert ("teacher/train.tokens.bin" in files) == teacher
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        assert info == infos[0]
        for name in files - {MANIFEST}:
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes(), name


def test_a_mixture_has_shares_limits_and_names(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", records(200))
    b = write_jsonl(tmp_path / "b.jsonl", records(200, start=200))
    sources = [
        {"source": a, "weight": 0.25},
        {"source": b, "name": "second", "max_samples": 30},
        {"source": write_jsonl(tmp_path / "c.jsonl", records(1, start=900))},
    ]
    folder, manifest = run_preprocess(
        tmp_path / "run",
        DataConfig(sources=sources, validation_fraction=0.1, test_fraction=0.1),
    )
    totals: Counter[str] = Counter()
    for split in preprocess.SPLITS:
        sources_of = read_split_sources(folder, split)
        assert sources_of is not None and sources_of.names == ("a", "second", "c")
        samples = list(read_sample_file(folder / f"{split}.jsonl"))
        names = [sample.source for sample in samples]
        assert [sources_of.name_of(row) for row in range(len(samples))] == names
        for name in set(names):
            assert [names[row] for row in sources_of.rows_of(name)] == [name] * names.count(name)
        assert len(TokenizedSplit.open(folder, split)) == len(samples)
        totals.update(sample.source for sample in samples)
    assert totals == {"a": 50, "second": 30, "c": 1}
    assert manifest.info["records"]["second"]["records"] == 200


def test_one_source_has_no_files_of_sources(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", records(20))
    folder, _ = run_preprocess(tmp_path / "run", DataConfig(source=source))
    assert read_split_sources(folder, "train") is None
    assert not list(folder.glob("*sources*"))


def test_equal_records_of_two_sources_have_two_ids(tmp_path: Path) -> None:
    sources = [
        {"source": write_jsonl(tmp_path / f"{name}.jsonl", records(20))} for name in ("a", "b")
    ]
    folder, _ = run_preprocess(tmp_path / "run", DataConfig(sources=sources))
    ids = [
        sample.id
        for split in preprocess.SPLITS
        for sample in read_sample_file(folder / f"{split}.jsonl")
    ]
    assert len(ids) == len(set(ids)) == 40


def test_ids_of_two_sources_must_differ(tmp_path: Path) -> None:
    rows = [{**record, "id": n} for n, record in enumerate(records(3))]
    sources = [{"source": write_jsonl(tmp_path / f"{name}.jsonl", rows)} for name in ("a", "b")]
    with pytest.raises(DataError, match=r"b.jsonl line 1: id '0' also occurs at .*a.jsonl line 1"):
        run_preprocess(tmp_path / "run", DataConfig(sources=sources))
    folder, _ = run_preprocess(
        tmp_path / "run",
        DataConfig(sources=sources, duplicate_ids="suffix", validation_fraction=0, test_fraction=0),
    )
    assert [sample.id for sample in read_sample_file(folder / "train.jsonl")] == [
        *("0", "1", "2"),
        *("0-1", "1-1", "2-1"),
    ]


STORY = "the miller walked to the old mill by the river to grind the corn of the village"


def near_duplicate_files(folder: Path) -> dict[str, str]:
    """Training data with an edited copy of the first of two test samples."""
    rows = [{"instruction": f"Retell it: {STORY} today.", "output": "He did."}, *records(20)]
    test = [
        {"instruction": f"Retell this story: {STORY}.", "output": "He ground corn."},
        {"instruction": "Say nothing.", "output": "Well."},
    ]
    return {
        "source": write_jsonl(folder / "all.jsonl", rows),
        "test": write_jsonl(folder / "test.jsonl", test),
    }


@pytest.mark.parametrize(
    ("mode", "train", "test"),
    [("none", 21, 2), ("count", 21, 2), ("train", 20, 2), ("test", 21, 1)],
)
def test_near_duplicates_are_counted_and_removed_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, train: int, test: int
) -> None:
    folder, manifest = run_preprocess(
        tmp_path / "run",
        DataConfig(**near_duplicate_files(tmp_path), validation_fraction=0, decontaminate=mode),
    )
    assert len(instructions(folder)) == train and len(instructions(folder, "test")) == test
    assert any(STORY in text for text in instructions(folder)) == (mode != "train")
    assert any(STORY in text for text in instructions(folder, "test")) == (mode != "test")
    counted = {} if mode == "none" else {"train": 1, "validation": 0, "test": 1}
    assert manifest.info["near_duplicates"] == counted
    told = "test: 1 of 2 samples (50.0%) share 13 words in a row with one of training"
    assert (told in caplog.text) == (mode != "none")
    removed = {"train": {"train": 1}, "test": {"test": 1}}.get(mode, {})
    assert manifest.info["removed_near_duplicates"] == removed


def test_benchmarks_are_compared_and_unreadable_ones_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = Sample.from_instruction("x", f"Retell it again: {STORY}", "He did.")
    files = near_duplicate_files(tmp_path)
    folder, manifest = run_preprocess(
        tmp_path / "run",
        DataConfig(
            source=files["source"], validation_fraction=0, test_fraction=0, decontaminate="train"
        ),
        read_benchmarks=lambda: ({"tales": [item]}, {"vicuna": "it is not downloaded yet"}),
    )
    assert not any(STORY in text for text in instructions(folder))
    assert manifest.info["near_duplicates"] == {"train": 1, "validation": 0, "test": 0, "tales": 1}
    assert "benchmark tales: 1 of 1 samples" in caplog.text
    assert (
        "benchmark vicuna is not compared with the training data: it is not downloaded yet"
        in caplog.text
    )


def refusing_tokenizer() -> Any:
    tokenizer = tiny_models.make_tokenizer(chat=True)
    tokenizer.chat_template = NO_SYSTEM + tokenizer.chat_template
    return tokenizer


def system_records() -> list[dict[str, Any]]:
    rows = records(12)
    for row in rows[5:7]:
        row["system"] = "Be brief."
    return rows


def test_an_error_of_the_template_names_the_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", system_records())
    with pytest.raises(DataError, match=r"some.jsonl line 6\).*data.on_invalid=skip"):
        run_preprocess(tmp_path / "run", DataConfig(source=source), tokenizer=refusing_tokenizer())


def test_samples_that_the_template_refuses_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(
        source=write_jsonl(tmp_path / "some.jsonl", system_records()),
        on_invalid="skip",
        validation_fraction=0,
        test_fraction=0,
    )
    folder, manifest = run_preprocess(tmp_path / "run", data, tokenizer=refusing_tokenizer())
    assert len(instructions(folder)) == 10
    assert manifest.info["invalid_records"] == 2
    assert manifest.info["records"]["some"]["invalid"] == manifest.info["invalid_reasons"]
    assert "skipped 2 records that cannot be used (2 refused by the template)" in caplog.text
    assert "line 6" in caplog.text


def test_a_sample_that_the_teachers_template_refuses_leaves_both_splits(tmp_path: Path) -> None:
    """Rows of the student's and the teacher's tokens stay those of the same sample."""
    data = DataConfig(
        source=write_jsonl(tmp_path / "some.jsonl", system_records()),
        on_invalid="skip",
        validation_fraction=0.5,
        test_fraction=0,
    )
    folder, manifest = run_preprocess(
        tmp_path / "run", data, teacher_tokenizer=refusing_tokenizer()
    )
    for split in ("train", "validation"):
        own, teacher = (TokenizedSplit.open(f, split) for f in (folder, folder / "teacher"))
        assert len(own) and own.ids.tolist() == teacher.ids.tolist()
    splits = manifest.info["splits"].values()
    assert sum(split["samples"] for split in splits) == 10
    assert sum(split["events"].get("invalid", 0) for split in splits) == 2


def test_a_share_above_one_percent_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = records(300)
    for row in rows[:2]:
        row["output"] = "long " * 300
    options: dict[str, Any] = {"validation_fraction": 0, "test_fraction": 0}
    run_preprocess(
        tmp_path / "few",
        DataConfig(source=write_jsonl(tmp_path / "few.jsonl", rows), **options),
    )
    assert "that prompt.max_length cut" not in caplog.text
    run_preprocess(
        tmp_path / "many",
        DataConfig(source=write_jsonl(tmp_path / "many.jsonl", rows[:150]), **options),
    )
    assert (
        "train: 2 of 150 samples (1.3%) have a response that prompt.max_length cut" in caplog.text
    )
