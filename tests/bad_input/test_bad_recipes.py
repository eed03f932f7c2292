"""Recipes that are wrong as files or on the command line: one sentence each, and nothing is
written. Wrong values of fields are in tests/unit/config/test_schema.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import error_message

from pocl_ds.resources import RECIPES

BASE = "name: x\ndata: {source: d.jsonl}\nteacher: {model: t}\nstudent: {model: s}\n"
BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij")
)
ON_LINE_5 = "FILE line 5 is not valid YAML ({}): fix it"
WITHOUT_LINE = "FILE is not valid YAML ({}): fix it"
TAG = "the tag tag:yaml.org,2002:{} is not allowed"

# Lines after BASE (bytes: the complete file), and the error message.
FILES: dict[str, tuple[str | bytes, str]] = {
    "an open bracket": (
        "curriculum: [1\n",
        "FILE line 6 is not valid YAML (expected ',' or ']', but got '<stream end>'): fix it",
    ),
    "a tab": ("\tseed: 1\n", ON_LINE_5.format("found character '\\t' that cannot start any token")),
    "a key twice": ("name: y\n", ON_LINE_5.format("the key 'name' appears twice")),
    "a key twice below": (
        "train: {lr: 1, lr: 2}\n",
        ON_LINE_5.format("the key 'lr' appears twice"),
    ),
    "an unknown field": ("trian: {}\n", "recipe field trian does not exist: did you mean train?"),
    "a number as a key": ("1: y\n", "recipe field 1=1: keys should be strings"),
    "a list as a key": ("? [a]\n: y\n", ON_LINE_5.format("found unhashable key")),
    "a number with too many digits": (
        f"seed: {'9' * 5000}\n",
        ON_LINE_5.format(f"'{'9' * 40}' is not of the type of its tag"),
    ),
    "a number beyond 64 bits": (
        f"seed: {'9' * 30}\n",
        ON_LINE_5.format(f"'{'9' * 30}' has more than 64 bits"),
    ),
    "a number beyond 63 bits": (
        f"seed: {1 << 63}\n",
        f"recipe field seed={1 << 63}: input should be less than 9223372036854776000",
    ),
    "a tag of nothing": ("seed: !!int\n", ON_LINE_5.format("'' is not of the type of its tag")),
    "a tag of another type": (
        "seed: !!int abc\n",
        ON_LINE_5.format("'abc' is not of the type of its tag"),
    ),
    "bytes": ("hardware: !!binary aGk=\n", ON_LINE_5.format(TAG.format("binary"))),
    "a set": ("hardware: !!set {a}\n", ON_LINE_5.format(TAG.format("set"))),
    "code": (
        "hardware: !!python/object/apply:os.system [ls]\n",
        ON_LINE_5.format(TAG.format("python/object/apply:os.system")),
    ),
    "a document too many": ("---\nname: y\n", ON_LINE_5.format("but found another document")),
    "an anchor that contains itself": (
        "policy: {options: &a {b: *a}}\n",
        WITHOUT_LINE.format("it is more than 32 levels deep"),
    ),
    "anchors that multiply": (
        BILLION_LAUGHS,
        WITHOUT_LINE.format("it has more than 100000 values"),
    ),
    "too deep": (f"hardware: {'[' * 600}\n", WITHOUT_LINE.format("it is nested too deeply")),
    "half a character": (
        'hardware: "\\ud800"\n',
        WITHOUT_LINE.format("a text has a null character or half of a surrogate pair"),
    ),
    "a zero byte in a text": (
        'hardware: "a\\0b"\n',
        WITHOUT_LINE.format("a text has a null character or half of a surrogate pair"),
    ),
    "a zero byte": ("\0", WITHOUT_LINE.format("special characters are not allowed")),
    "a list": (b"- 1\n", f"FILE has no sections: start from a shipped recipe in {RECIPES}"),
    "nothing": (b"", f"FILE has no sections: start from a shipped recipe in {RECIPES}"),
    "UTF-16": (
        BASE.encode("utf-16"),
        "FILE is not UTF-8 (invalid start byte in line 1): convert it",
    ),
    "Latin-1": (
        b"name: \xe9\n",
        "FILE is not UTF-8 (invalid continuation byte in line 1): convert it",
    ),
    "data by mistake": (
        b"x" * ((1 << 20) + 1),
        "FILE has 1048577 bytes, more than any recipe, study or profile: check that it is the "
        "right file",
    ),
    "a long text for a number": (
        f"seed: {'a' * 3000}\n",
        f"recipe field seed='{'a' * 57}...{'a' * 58}': input should be a valid integer, unable to "
        f"parse string as an integer: write a whole number, as in 8",
    ),
    "infinity": (
        "train: {lr: .inf}\n",
        "recipe field train.lr=inf: input should be a finite number",
    ),
    "a range of one": (
        "curriculum: {sft_ratio: [.nan, 0]}\n",
        "recipe field curriculum.sft_ratio.0=nan: input should be a finite number",
    ),
    "a stage without epochs": (
        "curriculum: {epochs_per_stage: [2, 0, 2, 2]}\n",
        "recipe field curriculum.epochs_per_stage=[2, 0, 2, 2]: write one number of epochs, at "
        "least 1, or one for each stage, as in 8 or [10, 8, 6, 6]",
    ),
    "epochs of other stages": (
        "curriculum: {epochs_per_stage: [2, 2]}\n",
        "recipe field curriculum: epochs_per_stage has 2 numbers and num_subsets=4: write one "
        "number for each stage, or one for all",
    ),
    "an option that is not a number": (
        "loss: {name: jsd, options: {beta: .nan}}\n",
        "recipe: loss.options of jsd: beta=nan must be a finite number",
    ),
    "an option out of range": (
        "loss: {name: jsd, options: {beta: 7}}\n",
        "recipe: loss.options of jsd: beta=7 must be between 0 and 1",
    ),
    "an option of another kind": (
        "loss: {name: jsd, options: {beta: true}}\n",
        "recipe: loss.options.beta=True of jsd must be a number",
    ),
    "a plugin without a name": (
        "plugins: ['']\n",
        "recipe field plugins: module '' cannot be imported (ValueError: Empty module name): fix "
        "it",
    ),
    "a plugin that is not there": (
        "plugins: [no_such_plugin]\n",
        "recipe field plugins: module no_such_plugin cannot be imported "
        "(No module named 'no_such_plugin'): add its folder to PYTHONPATH",
    ),
}

# Arguments after the recipe, and the error message.
ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no field": (
        ("train.lr",),
        "found two recipes (FILE, train.lr): give one; overrides have the form field=value",
    ),
    "no name": (("=3",), "override '=3' is not of the form section.field=value"),
    "below a value": (("name.first=x",), "override 'name.first=x': name is a value, not a section"),
    "a misspelled field": (
        ("train.lrr=1",),
        "recipe field train.lrr does not exist: did you mean lr?",
    ),
    "nothing after =": (
        ("seed=",),
        "recipe field seed=None: input should be a valid integer: write a whole number, as in 8",
    ),
    "an open list": (
        ("train.lr=[",),
        "override 'train.lr=[': the value is not valid YAML (expected the node content, but found "
        "'<stream end>'): quote it",
    ),
    "a tag": (
        ("hardware=!foo x",),
        "override 'hardware=!foo x': the value is not valid YAML (the tag !foo is not "
        "allowed): quote it",
    ),
    "true for a number": (
        ("launch.ranks=true",),
        "recipe field launch.ranks=True: write a number, not true or false",
    ),
    "the last of two counts": (
        ("train.lr=1", "train.lr=-1"),
        "recipe field train.lr=-1: input should be greater than 0",
    ),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = FILES[case]
    recipe.write_bytes(content if isinstance(content, bytes) else (BASE + content).encode())
    assert error_message(capsys, "run", recipe, "--run-dir", tmp_path / "run") == expected.replace(
        "FILE", str(recipe)
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(
    case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = ARGUMENTS[case]
    assert error_message(
        capsys, "run", recipe, "--run-dir", tmp_path / "run", *arguments
    ) == expected.replace("FILE", str(recipe))
    assert not (tmp_path / "run").exists()


def test_names(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that do not refer to a recipe."""
    assert (
        error_message(capsys, "run", tmp_path)
        == f"recipe {tmp_path} is a folder: name a file in it, or a run directory with --run-dir"
    )
    assert error_message(capsys, "run", "quikstart").startswith(
        "recipe 'quikstart' is neither a file nor a shipped recipe ("
    )
    assert error_message(capsys, "run", "a" * 300).startswith(
        f"recipe '{'a' * 300}' is neither a file nor a shipped recipe ("
    )
    assert error_message(capsys, "run") == (
        "there is no recipe: name a file or a shipped recipe (pocl run quickstart), or a --run-dir "
        "that holds a recipe.yaml"
    )
    assert (
        error_message(capsys, "run", recipe, "--ranks", 0)
        == "recipe field launch.ranks=0: input should be greater than or equal to 1"
    )
    for shard in ("2/1", "1/1", "1", "²/3", "-1/2", "a/b"):
        assert (
            error_message(capsys, "score", recipe, f"--shard={shard}")
            == f"--shard {shard}: write I/N with I from 0 to N-1, for example 2/8"
        )


def test_a_plugin_that_raises_an_error(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text, fault in (
        ("half_a_plugin", "def (:\n", "SyntaxError: invalid syntax (half_a_plugin.py, line 1)"),
        ("dividing_plugin", "1/0\n", "ZeroDivisionError: division by zero"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        message = error_message(capsys, "run", recipe, f"plugins=[{name}]")
        assert (
            message == f"recipe field plugins: module '{name}' cannot be imported ({fault}): fix it"
        )


def test_a_date_is_text(recipe: Path) -> None:
    """Hub revisions may look like dates; YAML would turn them into date objects, or refuse them."""
    from pocl_ds.config.recipe_file import dump_recipe, load_recipe

    for date in ("2024-12-01", "2024-13-45"):
        parsed = load_recipe(str(recipe), [f"student.revision={date}"])
        assert parsed.student.revision == date
        recipe.write_text(dump_recipe(parsed))
        assert load_recipe(str(recipe)) == parsed
