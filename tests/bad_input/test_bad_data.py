"""Data files, templates and models that `pocl preprocess` cannot use: one sentence each, and no
partial result. Wrong records are in tests/unit/data/test_records.py.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import error_message, files_below

RECORDS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(40)]
# Files that a refused step leaves in an empty run directory.
FILES_AFTER_REFUSAL = {".lock", "recipe.yaml", "input_digests.json", "logs/preprocess.log"}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


VALID_LINES = lines(RECORDS)
SKIP_HINT = "; data.on_invalid=skip leaves out every such record"
BROKEN_LINES = VALID_LINES.splitlines(keepends=True)
BROKEN_LINES[6] = '{"instruction": "Say 6.", "output": \n'
FORMAT_HINT = (
    "it needs messages, or instruction and output, or prompt and output, or text; map other names "
    "with data.fields, as in data.fields.output=answer"
)
ENDINGS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"
NO_TRAINING_SAMPLES = (
    "data.source=FILE leaves no training samples: change data.validation_fraction, "
    "data.test_fraction, data.decontaminate or prompt.overlong, raise prompt.max_prompt_tokens, or "
    "give more data"
)

# File type and content (None: no file), further arguments, and the error message.
DATA: dict[str, tuple[str, str | bytes | None, tuple[str, ...], str]] = {
    "not there": ("jsonl", None, (), "data file FILE does not exist: check the path"),
    "empty": ("jsonl", "", (), "data file FILE is empty: check that it is the right file"),
    "blank lines": (
        "jsonl",
        "\n\n \n",
        (),
        "FILE holds no samples: check that it is the right file",
    ),
    "broken on line 7": (
        "jsonl",
        "".join(BROKEN_LINES),
        (),
        "FILE line 7 is not valid JSON (Expecting value at column 36): fix that line" + SKIP_HINT,
    ),
    "zero bytes at the end": (
        "jsonl",
        VALID_LINES + "\0\0\n",
        (),
        "FILE line 41 is not valid JSON (Expecting value at column 1): fix that line" + SKIP_HINT,
    ),
    "UTF-16": (
        "jsonl",
        VALID_LINES.encode("utf-16"),
        (),
        "data file FILE is not UTF-8 (it is UTF-16): convert it",
    ),
    "gzip": (
        "jsonl",
        gzip.compress(VALID_LINES.encode(), mtime=0),
        (),
        "FILE line 1 is not UTF-8 (invalid start byte): convert the file" + SKIP_HINT,
    ),
    "half a gzip": (
        "jsonl.gz",
        gzip.compress(VALID_LINES.encode(), mtime=0)[:-9],
        (),
        "data file FILE cannot be read (Compressed file ended before the end-of-stream marker was "
        "reached): check it",
    ),
    "a list of numbers": (
        "jsonl",
        "[1, 2]",
        (),
        "FILE record 1: a record must be an object with named fields, found int" + SKIP_HINT,
    ),
    "a comma after each record": (
        "jsonl",
        VALID_LINES.replace("}\n", "},\n"),
        (),
        "FILE line 1 ends with a comma: remove it, or make the file a list in brackets" + SKIP_HINT,
    ),
    "a list without its end": (
        "json",
        json.dumps(RECORDS, indent=1)[:-2],
        (),
        "data file FILE is not valid JSON (Expecting ',' or ']' at line 161 column 3): fix it",
    ),
    "several lists": (
        "json",
        json.dumps({"easy": RECORDS, "hard": RECORDS}),
        (),
        "data file FILE holds several lists of records (easy, hard): write the one to read into "
        "its own file",
    ),
    "splits": (
        "json",
        json.dumps({"train": RECORDS, "test": RECORDS}),
        ("data.hub_validation_split=dev",),
        "data file FILE holds the splits train, test, and not 'dev': set data.hub_validation_split "
        "to one of them",
    ),
    "no splits": (
        "jsonl",
        VALID_LINES,
        ("data.hub_test_split=test",),
        "data file FILE holds no split 'test': name a file for each split instead (data.source, "
        "data.validation, data.test)",
    ),
    "a row with too many cells": (
        "csv",
        "instruction,output\nAdd 1, 2.,3\n",
        (),
        "FILE line 2: the row has 3 cells, and the header 2: quote cells that contain a separator "
        "or a line break" + SKIP_HINT,
    ),
    "a column twice": (
        "tsv",
        "output\toutput\n1\t2\n",
        (),
        "FILE line 1: the header has 'output' twice: rename a column",
    ),
    "an empty list": ("json", "[]", (), "FILE holds no samples: check that it is the right file"),
    "another ending": (
        "txt",
        "a,b\n",
        (),
        f"data file FILE has an unknown file type: give a {ENDINGS} file or a Hub name",
    ),
    "half a Parquet file": (
        "parquet",
        b"PAR1abc",
        (),
        "data file FILE is not a Parquet file (Parquet file size is 7 bytes, smaller "
        "than the minimum file footer (8 bytes)): check it",
    ),
    "no output": (
        "jsonl",
        lines([{"instruction": "a"}]),
        (),
        "FILE line 1: there is no field 'output' (fields: instruction): add it, or "
        "name the one that holds the answer with data.fields.output" + SKIP_HINT,
    ),
    "an empty output": (
        "jsonl",
        lines([{"instruction": "a", "output": " "}]),
        (),
        "FILE line 1: field 'output' is empty: fix or remove the record" + SKIP_HINT,
    ),
    "a list as instruction": (
        "jsonl",
        lines([{"instruction": ["a"], "output": "b"}]),
        (),
        "FILE line 1: field 'instruction' must be text, found list: fix or remove the record"
        + SKIP_HINT,
    ),
    "ids twice": (
        "jsonl",
        lines([{"id": "x", **record} for record in RECORDS]),
        (),
        "FILE line 2: id 'x' also occurs at FILE line 1: make ids unique, or set "
        "data.duplicate_ids=suffix to number them or data.fields.id=null to ignore them"
        + SKIP_HINT,
    ),
    "unknown names": (
        "jsonl",
        lines([{"a\nb": 1, "c\x1b[2J": 2}]),
        (),
        f"FILE line 1: no known record format (fields: a b, c\\x1b[2J): {FORMAT_HINT}{SKIP_HINT}",
    ),
    "many names": (
        "jsonl",
        lines([{f"k{i}": 1 for i in range(500)}]),
        (),
        f"FILE line 1: no known record format (fields: {', '.join(f'k{i}' for i in range(20))} "
        f"and 480 more): {FORMAT_HINT}{SKIP_HINT}",
    ),
    "a mapped name that is not there": (
        "jsonl",
        VALID_LINES,
        ("data.fields.output=ans",),
        "FILE line 1: there is no field 'ans', which data.fields.output names (fields: "
        "instruction, output): correct data.fields, or fix or remove the record" + SKIP_HINT,
    ),
    "a mapped name of an optional field that is not there": (
        "jsonl",
        VALID_LINES,
        ("data.fields.input=ctx",),
        "FILE: no record has the field 'ctx', which data.fields.input names (fields: instruction, "
        "output): correct data.fields",
    ),
    "an unknown role": (
        "jsonl",
        lines([{"messages": [{"role": "narrator", "content": "a"}]}]),
        (),
        "FILE line 1: turn 1 of messages has the unknown role 'narrator': map it to one of system, "
        "developer, user, assistant, tool with data.roles" + SKIP_HINT,
    ),
    "all too long": (
        "jsonl",
        VALID_LINES,
        ("prompt.overlong=drop", "prompt.max_prompt_tokens=1", "prompt.max_length=2"),
        NO_TRAINING_SAMPLES.replace(
            "samples:",
            "samples (36 were left out, because their prompt or response is too long):",
        ),
    ),
    "all held out": (
        "jsonl",
        lines(RECORDS[:1]),
        ("data.test_fraction=0.999999", "data.validation_fraction=0"),
        NO_TRAINING_SAMPLES,
    ),
}

# Text of a template, and why it fails.
TEMPLATES: dict[str, tuple[str, str]] = {
    "a way out of the sandbox": (
        "{{ ''.__class__ }}",
        "access to attribute '__class__' of 'str' object is unsafe.",
    ),
    "a variable that is not there": ("{{ question }}", "'question' is undefined"),
    "a turn that is not there": ("{{ history[3].content }}", "list object has no element 3"),
    "a division by zero": ("{{ 1 / 0 }}", "division by zero"),
    "a text and a number": ("{{ 1 + 'a' }}", "unsupported operand type(s) for +: 'int' and 'str'"),
    "an endless loop": (
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).",
    ),
    "a file that it includes": ("{% include 'x' %}", "no loader for this environment specified"),
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    """One model as teacher and student, and valid data."""
    (tmp_path / "valid.jsonl").write_text(VALID_LINES)
    model = {"model": str(tiny_llama)}
    tree = {
        "name": "x",
        "teacher": model,
        "student": model,
        "data": {"source": str(tmp_path / "valid.jsonl")},
        "prompt": {"template": "plain", "max_prompt_tokens": 64, "max_length": 96},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending, content, words, expected = DATA[case]
    file, run = tmp_path / f"bad.{ending}", tmp_path / "run"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_message(
        capsys, "preprocess", recipe, "--run-dir", run, f"data.source={file}", *words
    ) == expected.replace("FILE", str(file))
    assert files_below(run) == FILES_AFTER_REFUSAL


def test_sources_that_are_no_data_file(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (tmp_path / "folder.jsonl").mkdir()
    for source, expected in (
        (
            tmp_path / "folder.jsonl",
            f"data folder SOURCE holds no {ENDINGS} file: check the path",
        ),
        (tmp_path / "*.csv", "no data file matches SOURCE: check the pattern"),
        (
            f"[{tmp_path / 'valid.jsonl'}, org/name]",
            "data file org/name does not exist: check the path; datasets of the Hub are sources of "
            "their own in data.sources",
        ),
        ("~no-such-user/x.jsonl", "data file SOURCE does not exist: check the path"),
        (f"/{'a' * 300}.jsonl", "data file SOURCE does not exist: check the path"),
        (
            "org/name",
            "data set 'SOURCE' (subset None, split 'train', revision main) cannot be loaded "
            "(ConnectionError: Couldn't reach "
            "'SOURCE' on the Hub (OfflineModeIsEnabled)): check the name and the network, or give "
            "a .jsonl file",
        ),
    ):
        message = error_message(
            capsys, "preprocess", recipe, "--run-dir", run, f"data.source={source}"
        )
        assert message == expected.replace("SOURCE", str(source))
    message = error_message(
        capsys,
        "preprocess",
        recipe,
        "--run-dir",
        run,
        "data.source=documentation",
        "data.documentation.packages=[none_such]",
    )
    assert (
        message
        == "data.documentation.packages names 'none_such', which is not installed: install it or "
        "leave it out"
    )
    assert files_below(run) == FILES_AFTER_REFUSAL


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(
    case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, reason = TEMPLATES[case]
    file, run = tmp_path / "t.jinja", tmp_path / "run"
    file.write_text(text)
    message = error_message(
        capsys, "preprocess", recipe, "--run-dir", run, f"prompt.template={file}"
    )
    sample, _, reason_and_remedy = message.partition(": ")
    assert sample.startswith("sample ")
    assert (
        reason_and_remedy
        == f"prompt.template {file} fails ({reason}): its variables are instruction, input, "
        "history, system, messages, tools, bos_token and eos_token"
    )
    assert files_below(run) == FILES_AFTER_REFUSAL


def without_eos(model: Path) -> None:
    tree = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tree, "eos_token": None}))


LOAD_ERROR = r"the {} of MODEL cannot be loaded ("
# How a valid model is damaged, and how the error message begins and ends.
MODELS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no configuration": (
        lambda model: (model / "config.json").unlink(),
        "folder MODEL is not a model folder, config.json is missing",
        ": give a Hugging Face model folder",
    ),
    "half a configuration": (
        lambda model: (model / "config.json").write_text("{"),
        LOAD_ERROR.format("configuration"),
        "is not a valid JSON file): check the files in that folder",
    ),
    "another family": (
        lambda model: (model / "config.json").write_text('{"model_type": "nope"}'),
        LOAD_ERROR.format("configuration"),
        "does not recognize this architecture): check the files in that folder",
    ),
    "no weights": (
        lambda model: (model / "model.safetensors").unlink(),
        "model folder MODEL holds no weights (*.safetensors or *.bin)",
        ": get the complete model",
    ),
    "half a tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{"),
        LOAD_ERROR.format("tokenizer"),
        "): check the files in that folder",
    ),
    "an empty tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{}"),
        LOAD_ERROR.format("tokenizer"),
        "): check the files in that folder",
    ),
    "no EOS": (
        without_eos,
        "the tokenizer of MODEL has no EOS token, so a response would never end",
        ": set eos_token in its tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(
    case: str, recipe: Path, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, begins, ends = MODELS[case]
    model, run = Path(shutil.copytree(tiny_llama, tmp_path / "model")), tmp_path / "run"
    damage(model)
    message = error_message(
        capsys, "preprocess", recipe, "--run-dir", run, f"student.model={model}"
    )
    assert message.startswith(begins.replace("MODEL", str(model))) and message.endswith(ends)
    assert files_below(run) == FILES_AFTER_REFUSAL


def test_a_missing_chat_template(
    recipe: Path, tmp_path: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    message = error_message(
        capsys,
        "preprocess",
        recipe,
        "--run-dir",
        run,
        f"student.model={tiny_gpt2}",
        "prompt.template=chat",
    )
    assert (
        message
        == "prompt.template=chat, but the tokenizer has no chat template: use alpaca, plain or a "
        ".jinja file"
    )
    assert files_below(run) == FILES_AFTER_REFUSAL


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                "policy.name=distillm",
                "policy.replay_buffer_size=64",
                "policy.rollout_backend=transformers",
                "curriculum.sft_ratio=[0, 0]",
                "train.validate_every_n_steps=1",
            ],
            "policy.replay_buffer_size=64 is more than the COUNT training samples: lower it",
        ),
        (
            ["curriculum.num_subsets=64"],
            "curriculum.num_subsets=64 for COUNT samples: make it at least 1 and at most one for "
            "each sample",
        ),
        (
            ["train.batch_size=64"],
            "stage 0 has COUNT samples, fewer than train.batch_size=64: make fewer subsets "
            "(curriculum.num_subsets), "
            "smaller batches, or set curriculum.drop_last=false",
        ),
        (
            ["train.batch_size=64", "curriculum.drop_last=false", "student.heal_steps=2"],
            "train.batch_size=64 is more than the COUNT training samples: healing needs one full "
            "batch; lower it",
        ),
    ],
)
def test_values_that_the_data_is_too_small_for(
    words: list[str],
    message: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The number of samples is known only after `preprocess`, which then checks it."""
    run = tmp_path / "run"
    words = ["curriculum.num_subsets=1", "train.batch_size=8", *words]
    found = error_message(capsys, "preprocess", recipe, "--run-dir", run, *words)
    count = len((run / "data" / "train.jsonl").read_text().splitlines())
    assert 8 <= count < 64 and found == message.replace("COUNT", str(count))


def test_names_of_models(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    run, file = tmp_path / "run", tmp_path / "x.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    for name, begins in (
        (
            "/nowhere/m",
            "model folder NAME does not exist: check the path, or give a Hub name such as org/name",
        ),
        ("~no-such-user/m", "model folder NAME does not exist"),
        (recipe, "model NAME is a file: give a Hugging Face folder, a Hub name or a .gguf file"),
        ("x.gguf", "model file NAME does not exist: check the path"),
        (file, "NAME cannot be read as a GGUF language model ("),
        (
            "package://none_such/x.gguf",
            "model NAME: the Python package none_such is not installed: pip install none-such",
        ),
        ("package://a.b/x", "model 'NAME' is not of the form package://PACKAGE/"),
        ("org/none", "the revision main of NAME cannot be loaded (An error happened while "),
    ):
        message = error_message(
            capsys, "preprocess", recipe, "--run-dir", run, f"student.model={name}"
        )
        assert message.startswith(begins.replace("NAME", str(name))), message
        assert files_below(run) == FILES_AFTER_REFUSAL
    assert {name for name in files_below(tmp_path / "cache") if not name.endswith(".lock")} == set()
