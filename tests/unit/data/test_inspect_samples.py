"""Samples as text for the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ds.cli.main import main
from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.config.recipe_file import check_recipe, dump_recipe
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.inspect_samples import format_samples
from pocl_ds.data.preprocess import preprocess
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.models.load import load_tokenizer
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """12 samples in three subsets; the last sample is the easiest."""
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 2), ("test", 0)):
        samples = [
            Sample.from_instruction(
                f"s{i}", f"Say {i}.", f"number {i}", other_references=("or\x1b[31m so",)
            )
            for i in range(count)
        ]
        (run.data / f"{split}.jsonl").write_text("".join(s.to_json() + "\n" for s in samples))
    write_manifest(run.data, "preprocess", "d")
    run.ranking.mkdir()
    order = np.arange(12)[::-1]
    np.save(run.ranking / "order.npy", order)
    pq.write_table(
        pa.table(
            {
                "id": [f"s{i}" for i in order],
                "rouge_l": order / 20,
                "cross_entropy": 3.0 - order / 12,
            }
        ),
        run.ranking / "ranking.parquet",
    )
    write_manifest(run.ranking, "rank", "r")
    write_json(run.plan / "plan.json", {"subset_ends": [4, 8, 12]})
    write_manifest(run.plan, "plan", "p")
    return run


def test_shows_a_subset_from_easy_to_hard(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--run-dir", str(run.path), "--subset", "3", "--n", "2"]) == 0
    output = capsys.readouterr().out
    assert output.index("── s3  place 9 of 12  rouge_l 0.150  cross_entropy 2.750") < output.index(
        "── s0  place 12 of 12"
    )
    assert output.count("──") == 2 and "number 3" in output
    # Control characters of the data are escaped.
    assert "\x1b" not in output and r"\x1b[31m" in output


def test_shows_splits_and_the_complete_ranking(run: RunDirectory) -> None:
    assert [text.split()[1] for text in format_samples(run, count=3)] == ["s11", "s5", "s0"]
    assert [text.split()[1] for text in format_samples(run, split="validation", count=9)] == [
        "s0",
        "s1",
    ]
    (run.ranking / "manifest.json").unlink()
    assert [text.split()[1] for text in format_samples(run, count=2)] == ["s0", "s11"]


def test_shows_every_part_of_a_conversation(run: RunDirectory) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    sample = Sample(
        "s",
        (
            Message("system", "Be brief."),
            Message("user", "Weather?"),
            Message("assistant", "", "I ask.", (call,), train=False),
            Message("tool", "sunny", name="weather", tool_call_id="c1"),
            Message("user", "And?"),
            Message("assistant", "Sun."),
        ),
        input="today",
        tools=({"type": "function", "function": {"name": "weather"}},),
        source="web",
    )
    (run.data / "validation.jsonl").write_text(sample.to_json() + "\n")
    (text,) = format_samples(run, split="validation")
    assert text.splitlines() == [
        "── s  of web",
        "tool schema:",
        '  {"type": "function", "function": {"name": "weather"}}',
        "system:",
        "  Be brief.",
        "user:",
        "  Weather?",
        "assistant, train: false, thought:",
        "  I ask.",
        "assistant, train: false, tool call:",
        '  {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}',
        "tool weather, result of c1:",
        "  sunny",
        "user:",
        "  And?",
        "input:",
        "  today",
        "assistant:",
        "  Sun.",
    ]


def test_shows_which_tokens_train(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts between the template's own tokens, and the end of each turn."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    source = tmp_path / "d.jsonl"
    turns = [("user", "Say 0."), ("assistant", "It is 0."), ("user", "é?"), ("assistant", "No.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    source.write_text(json.dumps({"id": "a", "messages": messages}) + "\n")
    run = RunDirectory(tmp_path / "run")
    data = DataConfig(source=str(source), test_fraction=0.0, validation_fraction=0.0)
    prompt, tokenizer = PromptConfig(template="chat"), load_tokenizer(str(folder))
    preprocess(run, data, prompt, tokenizer, "d")
    tree = {"name": "x", "data": {"source": "d"}, "student": {"model": str(folder)}}
    run.recipe.write_text(dump_recipe(check_recipe({**tree, "loss": {"name": "sft"}})))

    assert main(["inspect", "--run-dir", str(run.path), "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    split = TokenizedSplit.open(run.data, "train")
    train = [
        int(token)
        for token, trains in zip(split.tokens(0), split.loss_mask(0), strict=True)
        if trains
    ]
    assert f"tokens: {split.total_tokens[0]}, of which {len(train)} train" in lines
    headers = [
        line for line in lines if line.startswith("  ") and line.endswith(("loss:", "train:"))
    ]
    assert [line.split()[1] for line in headers] == ["without", "that", "without", "that"]
    shown = [lines[lines.index(line) + 1].strip() for line in headers]
    assert (shown[1], shown[3]) == ("'It is 0.'", "'No.<|endoftext|>'")
    assert shown[2] == r"'\n<user>\né?\n<assistant>\n'"
    trained_ids = lines[lines.index(headers[3]) + 2].split()
    assert [int(token.rpartition(":")[2]) for token in trained_ids] == train[-len(trained_ids) :]

    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    assert main(["inspect", "--run-dir", str(run.path), "--tokens"]) == 2
    assert "is not the one that made the token ids in" in capsys.readouterr().err


def test_errors_name_what_is_missing(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="subsets 1 to 3"):
        format_samples(run, subset=4)
    with pytest.raises(RecipeError, match="leave --split validation out"):
        format_samples(run, split="validation", subset=1)
    with pytest.raises(ArtifactError, match="holds no samples"):
        format_samples(run, split="test")
    with pytest.raises(RecipeError, match="at least one"):
        format_samples(run, count=0)
    with pytest.raises(ArtifactError, match="pocl preprocess"):
        format_samples(RunDirectory(tmp_path / "none"))
    (run.plan / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="pocl plan"):
        format_samples(run, subset=1)
    (run.ranking / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="pocl rank"):
        format_samples(run, subset=1)
