"""Splits do not depend on the order of a file, and share no prompt."""

from __future__ import annotations

import itertools
import random
import unicodedata
from pathlib import Path

import pytest
import tiny_models
from preprocessing import TOKENIZER, preprocess_file, records, write_jsonl

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data import preprocess
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def test_splits_are_complete_disjoint_and_of_the_configured_size(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", records(1000))
    splits = preprocess_file(tmp_path / "run", source, validation_fraction=0.1, test_fraction=0.2)
    prompts = [sample.instruction for split in splits.values() for sample in split]
    assert sorted(prompts) == sorted(record["instruction"] for record in records(1000))
    assert abs(len(splits["validation"]) - 100) < 40 and abs(len(splits["test"]) - 200) < 55
    for split, samples in splits.items():
        assert [
            name.decode() for name in TokenizedSplit.open(tmp_path / "run" / "data", split).ids
        ] == [s.id for s in samples]


def test_splits_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    rows = records(400)
    limits = {"max_train_samples": 100, "max_validation_samples": 10, "max_test_samples": 5}
    original = preprocess_file(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", rows), **limits)
    random.Random(0).shuffle(rows)
    shuffled = preprocess_file(tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", rows), **limits)
    for split, limit in zip(preprocess.SPLITS, (100, 10, 5), strict=True):
        assert len(original[split]) == limit
        assert {sample.id: sample for sample in original[split]} == {
            sample.id: sample for sample in shuffled[split]
        }


def test_more_data_moves_no_sample_to_another_split(tmp_path: Path) -> None:
    few = preprocess_file(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", records(200)))
    many = preprocess_file(tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", records(400)))
    for split in preprocess.SPLITS:
        assert {s.id for s in few[split]} <= {s.id for s in many[split]}


def prompt_tokens(folder: Path, split: str) -> set[bytes]:
    """The prompts of a split, as token ids."""
    tokens = TokenizedSplit.open(folder, split)
    return {
        tokens.tokens(row)[: int(tokens.prompt_tokens[row])].tobytes() for row in range(len(tokens))
    }


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("form", ["composed", "decomposed"])
def test_prompts_that_render_alike_are_in_one_split(
    tmp_path: Path, template: str, form: str
) -> None:
    """The input may stand in the instruction, and accents may be characters of their own."""
    separator = "\n\n" if template == "chat" else "\n"
    rows = []
    for n in range(60):
        question, text = f"Résumez le texte {n}.", f"Voilà le texte numéro {n}."
        merged = question + separator + text
        if form == "decomposed":
            merged = unicodedata.normalize("NFD", merged)
        rows.append({"instruction": question, "input": text, "output": f"Bref {n}."})
        rows.append({"instruction": merged, "output": f"Encore plus bref {n}."})
    run = RunDirectory(tmp_path / "run")
    preprocess.preprocess(
        run,
        DataConfig(
            source=write_jsonl(tmp_path / "all.jsonl", rows),
            validation_fraction=0.2,
            test_fraction=0.3,
        ),
        PromptConfig(template=template, max_prompt_tokens=128, max_length=256),
        tiny_models.make_tokenizer(chat=True),
        "f" * 64,
    )
    questions = {
        split: {
            unicodedata.normalize("NFC", sample.instruction).split("\n")[0]
            for sample in read_sample_file(run.data / f"{split}.jsonl")
        }
        for split in preprocess.SPLITS
    }
    assert all(questions.values()) and len(set().union(*questions.values())) == 60
    for one, other in itertools.combinations(preprocess.SPLITS, 2):
        assert not questions[one] & questions[other]
        assert not prompt_tokens(run.data, one) & prompt_tokens(run.data, other)


def test_a_conversation_that_begins_with_a_test_prompt_is_not_in_training(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Say 3."},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "And twice?"},
        {"role": "assistant", "content": "It is 6."},
    ]
    other = [{**turns[0], "content": "Say 4."}, *turns[1:]]
    run = RunDirectory(tmp_path / "run")
    preprocess.preprocess(
        run,
        DataConfig(
            source=write_jsonl(tmp_path / "all.jsonl", [{"messages": turns}, {"messages": other}]),
            test=write_jsonl(tmp_path / "t.jsonl", [{"instruction": "Say 3.", "output": "3"}]),
            validation_fraction=0,
        ),
        PromptConfig(template="chat", max_prompt_tokens=128, max_length=256),
        tiny_models.make_tokenizer(chat=True),
        "f" * 64,
    )
    (sample,) = read_sample_file(run.data / "train.jsonl")
    assert sample.messages[0].content == "Say 4."


def test_prompts_that_become_equal_by_cutting_are_counted_and_not_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A long input is cut at its end, so that inputs with one beginning become one prompt."""
    rows = [
        {"instruction": "Sum up.", "input": "word " * 60 + f"end {n}", "output": f"sum {n}"}
        for n in range(40)
    ]
    run = RunDirectory(tmp_path / "run")
    manifest = preprocess.preprocess(
        run,
        DataConfig(
            source=write_jsonl(tmp_path / "all.jsonl", [*rows, *records(20)]),
            validation_fraction=0,
            test_fraction=0.3,
            decontaminate="none",
        ),
        PromptConfig(template="plain", max_prompt_tokens=64, max_length=128),
        TOKENIZER,
        "f" * 64,
    )
    cut = manifest.info["splits"]["test"]["events"]["same_prompt_when_cut"]
    left_out = manifest.info["splits"]["train"]["events"]["prompt_in_held_out"]
    assert cut > 2 and left_out == 40 - cut
    assert f"test: {cut} of " in caplog.text
    assert "have, after cutting, the same prompt as another sample" in caplog.text
    assert not prompt_tokens(run.data, "train") & prompt_tokens(run.data, "test")


def test_equal_prompts_are_in_one_split(tmp_path: Path) -> None:
    rows = [{**record, "output": f"answer {n}"} for record in records(200) for n in range(3)]
    splits = preprocess_file(
        tmp_path / "run",
        write_jsonl(tmp_path / "all.jsonl", rows),
        validation_fraction=0.3,
        test_fraction=0.3,
    )
    prompts = {
        split: {sample.instruction for sample in samples} for split, samples in splits.items()
    }
    assert not (prompts["train"] & prompts["test"] or prompts["train"] & prompts["validation"])
    assert not prompts["validation"] & prompts["test"]
    assert all(prompts.values()) and sum(map(len, splits.values())) == 600


def test_split_files_replace_the_split_and_reserve_their_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", records(100))
    test = write_jsonl(
        tmp_path / "test.jsonl",
        [{"instruction": "Say 3.", "output": "another answer"}, *records(4, start=500)],
    )
    splits = preprocess_file(tmp_path / "run", source, test=test, validation_fraction=0.0)
    assert len(splits["test"]) == 5 and len(splits["validation"]) == 0
    assert len(splits["train"]) == 99 and "Say 3." not in {
        sample.instruction for sample in splits["train"]
    }
    assert "1 training samples have the prompt of a validation or test sample" in caplog.text


def test_test_and_validation_share_no_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation chooses checkpoints and sets DistiLLM's phi, so it must not see the test."""
    source, test_file = (
        write_jsonl(tmp_path / "all.jsonl", records(300)),
        write_jsonl(tmp_path / "test.jsonl", records(100)),
    )
    splits = preprocess_file(tmp_path / "a", source, test=test_file, validation_fraction=0.3)
    prompts = {
        split: {sample.instruction for sample in samples} for split, samples in splits.items()
    }
    assert len(prompts["test"]) == 100 and len(prompts["train"]) + len(prompts["validation"]) == 200
    assert (
        not prompts["test"] & (prompts["train"] | prompts["validation"])
        and not prompts["train"] & prompts["validation"]
    )
    assert len(prompts["validation"]) > 20
    assert (
        "34 validation samples have the prompt of a test sample: left out of validation"
        in caplog.text
    )
    assert (
        "66 training samples have the prompt of a validation or test sample: left out of training"
        in caplog.text
    )
    splits = preprocess_file(
        tmp_path / "b",
        source,
        test=test_file,
        validation=write_jsonl(tmp_path / "v.jsonl", records(120)),
    )
    assert [len(splits[split]) for split in preprocess.SPLITS] == [180, 20, 100]
    caplog.clear()
    splits = preprocess_file(tmp_path / "c", source, validation=test_file, test_fraction=0.3)
    assert (
        len(splits["validation"]) == 100
        and len(splits["train"]) + len(splits["test"]) == 200
        and len(splits["test"]) > 20
    )
    assert "test samples have the prompt of a validation sample: left out of test" in caplog.text


def test_references_in_training_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in P3, which has items under several templates. Short answers are equal by chance."""
    sentences = [f"It takes {n} steps to come from here to the next village." for n in range(5)]
    test_pairs = [
        ("Say how far, 0.", f" {sentences[0].upper()} ".replace(" TO ", "\n to ")),
        ("Say how far, 1.", [f"{sentences[0]} Or so.", sentences[1]]),
        ("Say how far, 2.", sentences[2]),  # this prompt is reserved, so training does not have it
        # A second reference is not a training response.
        ("Say how far, 3.", sentences[3]),
        ("Say yes.", "Yes."),
    ]
    training_pairs = [
        ("How far, 0?", sentences[0]),
        ("How far, 1?", sentences[1]),
        ("Say how far, 2.", sentences[2]),
        ("How far, 3?", [sentences[4], sentences[3]]),
        ("Yes?", "Yes."),
    ]
    test_file = write_jsonl(
        tmp_path / "test.jsonl",
        [{"instruction": prompt, "output": text} for prompt, text in test_pairs],
    )
    source = write_jsonl(
        tmp_path / "all.jsonl",
        [{"instruction": prompt, "output": text} for prompt, text in training_pairs],
    )
    preprocess_file(tmp_path / "run", source, test=test_file, validation_fraction=0.0)
    manifest = read_manifest(tmp_path / "run" / "data")
    assert manifest is not None
    assert manifest.info["references_in_training"] == {
        "validation": {"with_long_reference": 0, "in_training": 0},
        "test": {"with_long_reference": 4, "in_training": 2},
    }
    assert (
        "test: 2 of 5 samples (40.0%) have a reference of 10 words or more that is also a "
        "training response" in caplog.text
    )
    assert "(4 have a reference that long)" in caplog.text
    caplog.clear()
    preprocess_file(
        tmp_path / "none",
        write_jsonl(tmp_path / "few.jsonl", records(20)),
        test=test_file,
        validation_fraction=0.0,
    )
    assert "a training response" not in caplog.text
