"""JSON files of every form are read record by record, and every fault names its line."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_reading import RECORDS, lines, read, read_error, write

from pocl_ds.data import json_document, json_records
from pocl_ds.data.sources import read_records
from pocl_ds.errors import DataError


class TestJson:
    @pytest.mark.parametrize(
        "tree",
        [
            {"version": "1.0", "data": RECORDS},
            {"data": RECORDS},
            {"name": "x", "examples": RECORDS, "tags": ["a", "b"]},
            {
                "columns": list(RECORDS[0]),
                "index": [*range(6)],
                "data": [[*r.values()] for r in RECORDS],
            },
            {"schema": {"fields": []}, "data": RECORDS},
            {str(n): record for n, record in enumerate(RECORDS)},
        ],
        ids=["version", "data", "examples", "split", "table", "index"],
    )
    @pytest.mark.parametrize("indent", [None, 1])
    def test_objects_with_records(self, tmp_path: Path, tree: Any, indent: int | None) -> None:
        source = write(tmp_path / "x.json", json.dumps(tree, indent=indent))
        assert read(source) == RECORDS

    @pytest.mark.parametrize(
        "record",
        [
            {"instruction": "a", "output": ["b", "c"]},
            {"instruction": "a", "output": "b", "tools": [{"name": "f"}]},
            {"messages": [{"role": "user", "content": "a"}], "tags": ["x"]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"text": "a", "data": [{"b": 1}]},
            {},
        ],
    )
    @pytest.mark.parametrize("indent", [None, 1])
    def test_single_records(self, tmp_path: Path, record: Any, indent: int | None) -> None:
        source = write(tmp_path / "x.jsonl", "\n\n" + json.dumps(record, indent=indent))
        assert list(read_records(source)) == [(f"{source} line 3", record)]

    def test_columns_of_conversations(self, tmp_path: Path) -> None:
        turns = [[{"role": "user", "content": str(n)}] for n in range(2)]
        source = write(tmp_path / "x.json", json.dumps({"messages": turns}))
        assert read(source) == [{"messages": turns[0]}, {"messages": turns[1]}]

    def test_rows_by_name_keep_their_name_as_id(self, tmp_path: Path) -> None:
        tree = {"a": {"output": "1"}, "b": {"output": "2"}}
        source = write(tmp_path / "x.json", json.dumps(tree))
        assert read(source) == [{"id": "a", "output": "1"}, {"id": "b", "output": "2"}]

    def test_several_lists_are_an_error(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.json", json.dumps({"easy": RECORDS, "hard": RECORDS}))
        assert "several lists of records (easy, hard)" in read_error(source)

    def test_a_damaged_line_is_in_its_place(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.jsonl", lines(RECORDS[:1]) + '{"a": \n\n' + lines(RECORDS[1:]))
        (_, first), (place, fault), *rest = read_records(source)
        assert first == RECORDS[0] and [record for _, record in rest] == RECORDS[1:]
        assert isinstance(fault, DataError) and fault.reason == "not JSON"
        assert str(fault) == (
            f"{source} line 2 is not valid JSON (Expecting value at column 6): fix that line"
        )
        assert place == f"{source} line 2" and rest[0][0] == f"{source} line 4"

    def test_a_comma_after_a_record(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.jsonl", lines(RECORDS).replace("}\n", "},\n"))
        message = read_error(source)
        assert message.startswith(f"{source} line 1 ends with a comma: remove it")
        pretty = ",\n".join(json.dumps(record, indent=1) for record in RECORDS)
        source = write(tmp_path / "y.jsonl", pretty)
        assert read_error(source).startswith(f"{source} line 4 has a comma between two records")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ('[\n{"a": 1},\n {"a": }\n]', "Expecting value at line 3 column 8"),
            ('[\n{"a": 1}\n {"a": 2}\n]', "Expecting ',' or ']' at line 3 column 2"),
            ('[\n{"a": 1},\n {"a": 2}', "Expecting ',' or ']' at line 3 column 10"),
            ('[{"a": 1}, {"a": }]', "Expecting value at line 1 column 18"),
            ('[\n{"a": 1}]\n}', "Extra data at line 3 column 1"),
            ('{\n"a": 1,\n"b": "', "Unterminated string starting at at line 3 column 6"),
        ],
    )
    def test_damaged_documents(self, tmp_path: Path, content: str, problem: str) -> None:
        source = write(tmp_path / "x.json", content)
        assert read_error(source) == f"data file {source} is not valid JSON ({problem}): fix it"

    def test_records_before_the_damage_are_read(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.json", '[\n{"a": 1},\n{"a": 2},\n{"a": 3} ?')
        records = read_records(source)
        assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]
        with pytest.raises(DataError, match="line 4 column 10"):
            list(records)

    @pytest.mark.parametrize("begin", ["", "[\n", '{\n"a": '])
    @pytest.mark.parametrize("value", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
    def test_beyond_the_limits_of_the_parser(self, tmp_path: Path, begin: str, value: str) -> None:
        source = write(tmp_path / "x.jsonl", begin + value)
        message = read_error(source)
        assert "line " in message and "too deeply or holds too long a number" in message

    def test_line_separators_inside_a_string_do_not_end_a_line(self, tmp_path: Path) -> None:
        record = {"output": "a\u2028b\x85c\x0cd"}
        source = write(tmp_path / "x.jsonl", json.dumps(record, ensure_ascii=False) + "\n{}")
        assert read(source) == [record, {}]

    def test_lone_surrogates_are_read(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.jsonl", '{"a": "\\ud800"}\n{}')
        assert read(source) == [{"a": "\ud800"}, {}]

    def test_reads_line_by_line(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.jsonl", lines([{"a": "x" * 1000}] * 20_000))
        tracemalloc.start()
        assert sum(1 for _ in read_records(source)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20 < Path(source).stat().st_size

    def test_reads_a_list_in_pieces(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.json", json.dumps([{"a": "x" * 1000}] * 20_000, indent=1))
        tracemalloc.start()
        assert sum(1 for _ in read_records(source)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 << 20 < Path(source).stat().st_size

    def test_a_long_list_on_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(json_records, "MAX_FIRST_LINE_BYTES", 50)
        records = [{"a": "é" * n} for n in range(60)]
        source = write(tmp_path / "x.json", json.dumps(records, ensure_ascii=False))
        assert read(source) == records


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(st.lists(VALUES, min_size=2, max_size=6), st.booleans(), st.integers(1, 60), st.booleans())
def test_documents_in_small_pieces(
    values: list[Any], as_list: bool, first_bytes: int, ascii_only: bool
) -> None:
    """Wherever the pieces end, the values are the same."""
    text = "\n".join(json.dumps(value, indent=1, ensure_ascii=ascii_only) for value in values)
    if as_list:
        text = json.dumps(values, indent=1, ensure_ascii=ascii_only)
    elif text.startswith("["):
        return  # would be read as a list
    content = text.encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_document, "CHUNK_BYTES", 7)
        patch.setattr(json_document, "TRUNCATION_CHARACTERS", 7)
        document = json_document.JsonDocument(
            Path("x"), content[:first_bytes], 1, io.BytesIO(content[first_bytes:])
        )
        entries = list(document.values())
    assert [value for _, value in entries] == values
    assert document.is_list == as_list
    rows = text.split("\n")
    for line, value in entries:
        assert json.dumps(value, indent=1, ensure_ascii=ascii_only)[:1] in rows[line - 1]
