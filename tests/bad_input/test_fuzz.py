"""Reading any recipe or data file quickly returns a result or raises RecipeError or DataError.

POCL_FUZZ=20000 runs that fuzz_settings examples of each test instead of 200.
"""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocl_ds.config.data import COMPRESSED_ENDINGS, DATA_ENDINGS
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.data.conversation import ASSISTANT, ROLES, Sample
from pocl_ds.data.field_names import FIELD_NAMES
from pocl_ds.data.messages import ROLE_NAMES
from pocl_ds.data.record_formats import RECORD_FORMATS
from pocl_ds.data.sources import read_samples
from pocl_ds.errors import DataError, RecipeError

EXAMPLES = int(os.environ.get("POCL_FUZZ", "200"))
# Seconds of CPU time for one example; the machine may be busy with other work.
MAX_SECONDS = 5.0
fuzz_settings = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)

SHIPPED = dump_recipe(load_recipe("quickstart"))
FULL = yaml.safe_load(SHIPPED)
# Texts with a special meaning in YAML.
YAML_FRAGMENTS = [
    *"{}[]'\"#%`=~é\ud7ff",
    *("yes", "null", ".nan", ".inf", "1e999", "2024-13-45", "\\ud800"),
    *(
        ": ",
        "- ",
        "? ",
        "| ",
        "> ",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!set ",
        "!x ",
        "---\n",
        "\t",
        "\n",
        "\n  ",
        "\0",
    ),
    *("0x" + "f" * 99, "9" * 5000, "[" * 400, "{a: " * 200, "a: &a [*a, *a]\n"),
]
yaml_texts = st.lists(st.sampled_from(YAML_FRAGMENTS) | st.text(max_size=6), max_size=8).map(
    "".join
)
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates(datetime.date(1, 1, 1))
    | st.datetimes()
    | st.sets(st.integers(), max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


def names(tree: Any, before: str = "") -> list[str]:
    """Dotted names of all fields except `plugins`, which could import any module."""
    if not isinstance(tree, dict):
        return []
    here = [(f"{before}{name}", below) for name, below in tree.items() if name != "plugins"]
    return [path for name, below in here for path in [name, *names(below, f"{name}.")]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where each example overwrites the previous one."""
    return tmp_path_factory.mktemp("fuzz")


def within_time(work: Callable[[], Any], fault: type[Exception]) -> Any:
    """The result of `work`, or None if it raises `fault`. Any other error fails the test, and so
    does a result that takes too long.
    """
    start = time.process_time()
    try:
        result = work()
    except fault as error:
        assert str(error)
        result = None
    assert time.process_time() - start < MAX_SECONDS
    return result


def read_recipe(content: str | bytes, folder: Path, overrides: list[str] | None = None) -> None:
    path = folder / "r.yaml"
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    recipe = within_time(lambda: load_recipe(str(path), overrides), RecipeError)
    if recipe is not None:
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(str(path)) == recipe


@fuzz_settings
@given(content=st.binary(max_size=60) | st.text(max_size=60) | yaml_texts)
def test_a_recipe_of_anything(content: str | bytes, folder: Path) -> None:
    read_recipe(content, folder)


@fuzz_settings
@given(
    tree=plain_values
    | st.dictionaries(st.sampled_from([*FULL, "plugin"]), plain_values, max_size=4)
)
def test_a_recipe_of_any_tree(tree: Any, folder: Path) -> None:
    if isinstance(tree, dict):
        tree.pop("plugins", None)
    read_recipe(yaml.safe_dump(tree, allow_unicode=True), folder)


@fuzz_settings
@given(start=st.integers(0, len(SHIPPED)), length=st.integers(0, 40), inserted=yaml_texts)
def test_a_recipe_with_a_hole(start: int, length: int, inserted: str, folder: Path) -> None:
    read_recipe(SHIPPED[:start] + inserted + SHIPPED[start + length :], folder)


@fuzz_settings
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(names(FULL)) | st.text(max_size=6),
            yaml_texts | st.from_type(float).map(str),
        ),
        min_size=1,
        max_size=3,
    ),
    equals=st.sampled_from(["=", "=", "=", ".x=", ""]),
)
def test_overrides_of_anything(words: list[tuple[str, str]], equals: str, folder: Path) -> None:
    read_recipe(SHIPPED, folder, [f"{name}{equals}{value}" for name, value in words])


RECORD = {"id": "a", "instruction": "b", "input": "c", "output": "d"}
CHAT = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "d"}]}
LINES = "".join(
    json.dumps(record) + "\n"
    for record in (RECORD, {**RECORD, "id": 7, "output": ["d", "e"]}, {**RECORD, "id": None})
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.sampled_from([*itertools.chain.from_iterable(FIELD_NAMES.values()), "chosen"])
turn_keys = st.sampled_from(
    [
        *("role", "from", "content", "value", "tool_calls", "function_call"),
        "weight",
        "train",
        "name",
    ]
)
texts = st.sampled_from(["a", '{"name": "f", "arguments": {}}', "[]", ""])
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from([*ROLE_NAMES])}, optional={"content": texts})
    | st.dictionaries(turn_keys, json_values | texts | st.sampled_from(ROLES), max_size=4),
    max_size=4,
)


def read_data(content: bytes, ending: str, folder: Path, format: str = "auto") -> None:
    path = folder / f"d.{ending.removeprefix('.')}"
    path.write_bytes(content)
    samples = within_time(lambda: list(read_samples(str(path), format=format)), DataError)
    for sample in samples or []:
        assert isinstance(sample, Sample) and sample.id and all(sample.other_references)
        assert sample.response.role == ASSISTANT and sample.response.train
        assert sample.response.content or sample.response.tool_calls
        assert Sample.from_json(sample.to_json()).to_json() == sample.to_json()
        sample.to_json().encode(), sample.id.encode()


@fuzz_settings
@given(
    content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode),
    ending=st.sampled_from([*DATA_ENDINGS, *(f".jsonl{ending}" for ending in COMPRESSED_ENDINGS)]),
)
def test_data_of_anything(content: bytes, ending: str, folder: Path) -> None:
    read_data(content, ending, folder)


@fuzz_settings
@given(
    start=st.integers(0, len(LINES)),
    length=st.integers(0, 30),
    inserted=st.binary(max_size=6)
    | st.sampled_from(
        [
            b"\n",
            b"\r",
            b"\0",
            b"\xef\xbb\xbf",
            b"[" * 2000,
            b"9" * 5000,
            b"1e999",
            b'"\\ud800"',
            b"NaN",
            b"{}",
            b"null,",
        ]
    ),
    ending=st.sampled_from(["jsonl", "json", "csv", "tsv"]),
)
def test_lines_with_a_hole(
    start: int, length: int, inserted: bytes, ending: str, folder: Path
) -> None:
    read_data(LINES[:start].encode() + inserted + LINES[start + length :].encode(), ending, folder)


@fuzz_settings
@given(
    records=st.lists(
        json_values
        | st.dictionaries(fields, json_values | texts | turns, max_size=5)
        | st.fixed_dictionaries({"messages": turns}, optional={"tools": json_values})
        | st.just(RECORD)
        | st.just(CHAT),
        max_size=4,
    ),
    ending=st.sampled_from(["jsonl", "json"]),
    format=st.sampled_from(["auto", *RECORD_FORMATS]),
)
def test_records_of_anything(records: list[Any], ending: str, format: str, folder: Path) -> None:
    text = (
        json.dumps(records)
        if ending == "json"
        else "".join(json.dumps(record) + "\n" for record in records)
    )
    read_data(text.encode(), ending, folder, format)


@pytest.fixture(scope="module")
def table() -> bytes:
    """A valid Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**RECORD, "id": str(i)} for i in range(3)]), buffer)
    return buffer.getvalue()


@fuzz_settings
@given(data=st.data())
def test_a_table_with_a_hole(data: st.DataObject, table: bytes, folder: Path) -> None:
    start = data.draw(st.integers(0, len(table)))
    inserted, length = data.draw(st.binary(max_size=4)), data.draw(st.sampled_from([0, 1, 4, 60]))
    read_data(table[:start] + inserted + table[start + length :], "parquet", folder)
