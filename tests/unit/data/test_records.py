"""Files of every format give equal samples, and an error names file, line and remedy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.config import RecordFields, RecordFormat
from pocl_ds.data.records import (
    FIELD_NAMES,
    RECORD_FORMATS,
    Sample,
    read_sample_file,
    samples_from_records,
)
from pocl_ds.data.sources import read_samples
from pocl_ds.errors import DataError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def jsonl(folder: Path, *records: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read_error(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_samples(source, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("record", "instruction", "given_input", "reference"),
    [
        (GOOD, "Add.", "1 2", "3"),
        (
            {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"},
            "Add.",
            "1 2",
            "3",
        ),
        ({"prompt": "Add 1 2.", "completion": "3"}, "Add 1 2.", "", "3"),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "Q",
            "",
            "A",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "Q",
            "",
            "A",
        ),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add.", "", "3"),
    ],
)
def test_known_formats_are_recognized(
    tmp_path: Path, record: dict[str, Any], instruction: str, given_input: str, reference: str
) -> None:
    (sample,) = read_samples(jsonl(tmp_path, record))
    assert (sample.instruction, sample.input, sample.references) == (
        instruction,
        given_input,
        (reference,),
    )


def test_every_format_and_field_of_the_recipe_is_implemented() -> None:
    assert {"auto", *RECORD_FORMATS} == set(get_args(RecordFormat))
    assert set(FIELD_NAMES) == set(get_args(get_args(RecordFields)[0]))
    assert all(set(form.fields) <= set(FIELD_NAMES) for form in RECORD_FORMATS.values())


def test_log_names_the_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = jsonl(tmp_path, {"instruction": "a", "context": "", "response": "b"})
    with caplog.at_level(logging.INFO, "pocl_ds"):
        list(read_samples(source))
    assert "records of format alpaca (instruction, context, response)" in caplog.text


def test_earlier_turns_become_history(tmp_path: Path) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Two?"),
        ("assistant", "2"),
        ("user", "Bye"),
    ]
    source = jsonl(
        tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]}
    )
    (sample,) = read_samples(source)
    # The unanswered turn is dropped.
    assert sample.instruction == "Two?" and sample.references == ("2",)
    assert sample.history == tuple(turns[:3])


def test_mapped_fields_and_several_references(tmp_path: Path) -> None:
    record = {"q": "Q", "ctx": "C", "answers": ["A", "B"], "key": 7}
    fields = {"instruction": "q", "input": "ctx", "output": "answers", "id": "key"}
    assert list(read_samples(jsonl(tmp_path, record), fields=fields)) == [
        Sample("7", "Q", "C", ("A", "B"))
    ]


def test_json_parquet_and_jsonl_give_equal_samples(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(2500)]
    lines = list(read_samples(jsonl(tmp_path, *records)))
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(
        json.dumps({"version": 1, "data": records}), encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet")
    for name in ("array.json", "wrapped.json", "table.parquet"):
        assert list(read_samples(str(tmp_path / name))) == lines


def test_byte_order_mark_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD) + "\n\n  \n" + json.dumps(GOOD), encoding="utf-8")
    assert len(list(read_samples(str(path)))) == 2


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps({**GOOD, "output": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (sample,) = read_samples(str(path))
    assert sample.references == ("a\u2028b\x85c",)


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\nbroken\n", encoding="utf-8")
    samples = read_samples(str(path))
    assert next(samples).references == ("3",)  # before line 2, which is invalid
    with pytest.raises(DataError, match="line 2"):
        next(samples)


class TestIds:
    def test_ids_come_from_the_record_or_its_content(self, tmp_path: Path) -> None:
        with_id, without_id = read_samples(jsonl(tmp_path, {**GOOD, "id": "é/1"}, GOOD))
        assert with_id.id == "é/1"
        assert len(without_id.id) == 16 and int(without_id.id, 16) >= 0

    def test_duplicates_get_numbered_ids(self, tmp_path: Path) -> None:
        original, other, duplicate, second_duplicate = read_samples(
            jsonl(tmp_path, GOOD, {**GOOD, "output": "4"}, GOOD, GOOD)
        )
        assert (duplicate.id, second_duplicate.id) == (f"{original.id}-1", f"{original.id}-2")
        assert other.id != original.id

    def test_content_ids_do_not_depend_on_the_order_of_the_file(self, tmp_path: Path) -> None:
        records = [{**GOOD, "output": str(n % 5)} for n in range(12)]
        in_order = {sample.id: sample for sample in read_samples(jsonl(tmp_path, *records))}
        reversed_order = {
            sample.id: sample for sample in read_samples(jsonl(tmp_path, *reversed(records)))
        }
        assert in_order == reversed_order and len(in_order) == 12

    def test_error_names_a_repeated_id_and_both_lines(self, tmp_path: Path) -> None:
        message = read_error(
            jsonl(tmp_path, {**GOOD, "id": "x"}, {**GOOD, "id": "y"}, {**GOOD, "id": "x"})
        )
        assert "'x'" in message and "line 1" in message and "line 3" in message

    @pytest.mark.parametrize("name", ["a\nb", "a\0b", "é" * 65, True, [1], 1.5])
    def test_invalid_ids_are_refused(self, tmp_path: Path, name: Any) -> None:
        assert "line 1" in read_error(jsonl(tmp_path, {**GOOD, "id": name}))

    def test_longest_allowed_id_is_accepted(self, tmp_path: Path) -> None:
        (sample,) = read_samples(jsonl(tmp_path, {**GOOD, "id": "é" * 64}))
        assert sample.id == "é" * 64


class TestBadInput:
    def test_missing_and_empty_files(self, tmp_path: Path) -> None:
        assert "does not exist" in read_error(str(tmp_path / "missing.jsonl"))
        (tmp_path / "empty.jsonl").touch()
        assert "empty.jsonl is empty" in read_error(str(tmp_path / "empty.jsonl"))
        (tmp_path / "blank.jsonl").write_text("\n\n")
        assert "holds no samples" in read_error(str(tmp_path / "blank.jsonl"))
        (tmp_path / "none.json").write_text("[]")
        assert "holds no samples" in read_error(str(tmp_path / "none.json"))
        assert "is a folder" in read_error(str(tmp_path))
        (tmp_path / "data.csv").write_text("a,b")
        assert "unknown file type" in read_error(str(tmp_path / "data.csv"))

    def test_error_of_invalid_json_names_file_and_line(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text(
            (json.dumps(GOOD) + "\n") * 6 + '{"instruction": "a", \n' + json.dumps(GOOD),
            encoding="utf-8",
        )
        message = read_error(str(path))
        assert f"{path} line 7 is not valid JSON" in message and "fix that line" in message
        (tmp_path / "data.json").write_text('[\n{"instruction": "a",\n "output": }\n]')
        assert "line 3 column" in read_error(str(tmp_path / "data.json"))
        (tmp_path / "lines.json").write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n")
        assert ".jsonl" in read_error(str(tmp_path / "lines.json"))

    @pytest.mark.parametrize("line", ["[" * 100_000, '{"instruction": ' + "9" * 5000 + "}"])
    def test_json_beyond_the_parsers_limits_is_an_error(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "data.jsonl").write_text(line)
        assert "line 1" in read_error(str(tmp_path / "data.jsonl"))

    def test_error_of_a_missing_output_names_fields_and_remedy(self, tmp_path: Path) -> None:
        message = read_error(jsonl(tmp_path, GOOD, {"instruction": "a", "text": "b"}))
        assert (
            "line 2" in message
            and "instruction, text" in message
            and "data.fields.output" in message
        )

    def test_error_of_an_unknown_format_names_fields_and_remedy(self, tmp_path: Path) -> None:
        message = read_error(jsonl(tmp_path, {"q": "a", "a": "b"}))
        assert "line 1" in message and "q, a" in message and "data.fields" in message

    @pytest.mark.parametrize("field", ["id", "instruction", "input", "output"])
    def test_error_names_a_missing_mapped_field(self, tmp_path: Path, field: str) -> None:
        message = read_error(jsonl(tmp_path, GOOD), fields={field: "contxt"})
        assert "'contxt'" in message and f"data.fields.{field}" in message

    @pytest.mark.parametrize(
        "change",
        [
            {"instruction": 3},
            {"instruction": None},
            {"instruction": " "},
            {"input": 3},
            {"output": 3},
            {"output": ""},
            {"output": " "},
            {"output": []},
            {"output": ["a", ""]},
            {"output": ["a", 1]},
            {"output": None},
            {"instruction": "\ud800"},
            {"output": "\ud800"},
            {"id": "\ud800"},
        ],
    )
    def test_values_other_than_text_are_refused(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        assert "line 2" in read_error(jsonl(tmp_path, GOOD, {**GOOD, **change}))

    @pytest.mark.parametrize("record", [[1], "text", 5, None])
    def test_records_other_than_objects_are_refused(self, tmp_path: Path, record: Any) -> None:
        assert "line 1" in read_error(jsonl(tmp_path, record))

    @pytest.mark.parametrize(
        "turns",
        [
            "text",
            [],
            [{"role": "user", "content": "a"}],
            [{"role": "assistant", "content": "a"}],
            ["a", "b"],
            [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
            [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}],
            [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
        ],
    )
    def test_conversations_without_an_answer_are_refused(self, tmp_path: Path, turns: Any) -> None:
        assert "line 1" in read_error(jsonl(tmp_path, {"messages": turns}))

    def test_error_names_the_field_that_a_requested_format_lacks(self, tmp_path: Path) -> None:
        assert "data.fields.messages" in read_error(jsonl(tmp_path, GOOD), format="messages")

    def test_invalid_utf8_and_parquet_are_errors(self, tmp_path: Path) -> None:
        (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xe9\n")
        assert "UTF-8" in read_error(str(tmp_path / "latin.jsonl"))
        (tmp_path / "data.parquet").write_bytes(b"PAR0" * 8)
        assert "Parquet" in read_error(str(tmp_path / "data.parquet"))

    def test_unreachable_hub_data_set_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        def unreachable(name: str, subset: str | None, *, split: str, revision: str | None) -> None:
            raise ConnectionError(f"Couldn't reach {name}\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        message = read_error("someone/some-set", hub_split="train")
        assert "'someone/some-set'" in message and "network" in message and ".jsonl" in message

    def test_hub_data_set_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None) -> Any:
            assert (name, subset, split, revision) == (
                "someone/some-set",
                "small",
                "test",
                "a1b2c3",
            )
            return datasets.Dataset.from_list([GOOD, {**GOOD, "output": "4"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        samples = list(
            read_samples(
                "someone/some-set", hub_subset="small", hub_split="test", hub_revision="a1b2c3"
            )
        )
        assert [sample.references for sample in samples] == [("3",), ("4",)]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)


RECORDS = st.fixed_dictionaries(
    {"instruction": TEXT, "input": st.just("") | TEXT, "output": TEXT | st.lists(TEXT, min_size=1)}
)


@given(st.lists(RECORDS, max_size=8))
def test_sample_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    def numbered_records() -> Iterator[tuple[str, Any]]:
        yield from (
            (f"here record {number}", record) for number, record in enumerate([GOOD, *records], 1)
        )

    samples = list(samples_from_records(numbered_records(), "here", "auto", {}))
    assert len({sample.id for sample in samples}) == len(samples)
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    path.write_text("".join(sample.to_json() + "\n" for sample in samples), encoding="utf-8")
    assert list(read_sample_file(path)) == samples


def test_real_files_load(shared_data: Path) -> None:
    counts = {
        path.name: len({sample.id for sample in read_samples(str(path))})
        for path in shared_data.glob("*.jsonl")
    }
    assert counts["train.jsonl"] == 11_027
    assert counts["eval_dolly500.jsonl"] == 500 and counts["eval_sni_11plus.jsonl"] == 1_694
    assert len(counts) >= 7


def test_records_may_name_their_input_differently(tmp_path: Path) -> None:
    """Data sets leave empty fields out, so the first record cannot decide the input's name."""
    source = jsonl(
        tmp_path,
        {"instruction": "a", "output": "b"},
        {"instruction": "c", "context": "IN", "output": "d"},
        {"instruction": "e", "input": "", "context": "THERE", "output": "f"},
        {**GOOD, "context": None},
    )
    assert [sample.input for sample in read_samples(source)] == ["", "IN", "THERE", "1 2"]
    mapped = jsonl(
        tmp_path,
        {"instruction": "a", "passage": "X", "context": "no", "output": "b"},
        name="mapped.jsonl",
    )
    assert [sample.input for sample in read_samples(mapped, fields={"input": "passage"})] == ["X"]


def test_warning_names_an_ignored_system_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    list(
        read_samples(
            jsonl(tmp_path, {"system_prompt": "Be brief.", "question": "a", "response": "b"})
        )
    )
    assert "the field system_prompt is ignored" in caplog.text
    caplog.clear()
    list(read_samples(jsonl(tmp_path, {"system_prompt": "", **GOOD})))
    assert "is ignored" not in caplog.text


def test_truncated_reference_round_trips(tmp_path: Path) -> None:
    truncated, complete = Sample("a", "b", "", ("c",), ended=False), Sample("d", "e", "", ("f",))
    path = tmp_path / "train.jsonl"
    path.write_text(f"{truncated.to_json()}\n{complete.to_json()}\n")
    assert (
        list(read_sample_file(path)) == [truncated, complete] and "ended" not in complete.to_json()
    )
