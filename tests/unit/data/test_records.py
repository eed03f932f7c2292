"""Mapped fields, counts of what is not used, invalid records, and sample files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from record_reading import GOOD, QA, TURNS, counts_of, read, read_error, read_one

from pocl_ds.config import DataConfig
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.data.records import MAX_COUNTED_NAMES, RecordCounts
from pocl_ds.data.sample_ids import SampleIds
from pocl_ds.data.sources import read_samples
from pocl_ds.errors import DataError


class TestFieldMapping:
    def test_mapped_fields(self) -> None:
        record = {"q": "Q", "ctx": "C", "answers": ["A", "B"], "key": 7}
        fields = {"instruction": "q", "input": "ctx", "output": "answers", "id": "key"}
        sample = read_one(record, fields=fields)
        assert sample.id == "7" and sample.input == "C" and sample.references == ("A", "B")

    def test_a_mapped_field_decides_the_format(self) -> None:
        record = {"instruction": "Answer.", "question": "Q", "answer": "A"}
        counts = RecordCounts()
        sample = read_one(record, fields={"prompt": "question"}, counts=counts)
        assert list(sample.messages) == QA and counts.unused_fields == {"instruction": 1}

    def test_paths(self) -> None:
        record = {"q": "Q", "meta": {"id": "k"}, "answers": [{"text": "A"}], "a.b": "C"}
        fields = {
            "instruction": "q",
            "id": "meta.id",
            "output": "answers.0.text",
            "input": "a.b",
        }
        counts = RecordCounts()
        sample = read_one(record, fields=fields, counts=counts)
        assert (sample.id, sample.input) == ("k", "C") and list(sample.messages) == QA
        assert counts.unused_fields == {}
        assert counts.formats == {"alpaca (q, a.b, answers)": 1}

    @pytest.mark.parametrize("path", ["answers.1", "answers.0.x", "answers.x", "answer", "q.0"])
    def test_a_path_that_leads_nowhere(self, path: str) -> None:
        record = {"q": "Q", "answers": [{"text": "A"}]}
        fields = {"instruction": "q", "output": path}
        message = read_error(record, reason="missing field", fields=fields)
        assert f"line 1: there is no field {path!r}, which data.fields.output names" in message

    def test_a_required_field_may_be_absent_in_some_records(self) -> None:
        errors: list[DataError] = []
        fields = {"instruction": "q", "output": "a"}
        records = [{"q": "Q", "a": "A"}, {"q": "Q"}, {"a": "A", "input": "Q"}]
        samples = read(*records, fields=fields, on_invalid=errors.append)
        assert len(samples) == 1
        assert [error.reason for error in errors] == ["missing field"] * 2

    @pytest.mark.parametrize("field", ["id", "input", "system"])
    def test_a_mapped_field_that_no_record_has(self, field: str) -> None:
        message = read_error(GOOD, {**GOOD, "late": 1}, reason="missing field", fields={field: "x"})
        assert message == (
            f"dir/x.jsonl: no record has the field 'x', which data.fields.{field} names (fields: "
            f"{', '.join([*GOOD, 'late'])}): correct data.fields"
        )

    def test_a_recipe_maps_a_column_once(self) -> None:
        with pytest.raises(ValidationError, match="instruction and input both name 'q'"):
            DataConfig(source="x.jsonl", fields={"instruction": "q", "input": "q"})
        fields = DataConfig(source="x.jsonl", fields={"id": None, "system": None}).fields
        assert fields == {"id": None, "system": None}


class TestUnusedFields:
    def test_unused_fields_are_counted_over_all_records(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        records: list[Any] = [GOOD] * 1200 + [{**GOOD, "options": ["a"], "source": "web"}] * 34
        counts = counts_of(*records, {**GOOD, "options": [], "images": None, "choices": "b"})
        assert counts.unused_fields == {"options": 34, "source": 34, "choices": 1}
        logged = [(record.levelname, record.getMessage()) for record in caplog.records[1:]]
        assert logged == [
            (
                "INFO",
                "dir/x.jsonl: 34 of 1,235 records have the field 'source', which is not used",
            ),
            (
                "WARNING",
                "dir/x.jsonl: 34 of 1,235 records have the field 'options', 1 of 1,235 records has "
                "the field 'choices', which are not used",
            ),
        ]

    @pytest.mark.parametrize(
        ("record", "unused"),
        [
            ({"instruction": "I", "question": "Q", "output": "A"}, "question"),
            ({"question": "Q", "options": ["a", "b"], "answer": "A"}, "options"),
            ({"messages": TURNS, "input": "I"}, "input"),
            ({"messages": TURNS, "history": [["a", "b"]]}, "history"),
            ({"messages": TURNS, "images": ["x.png"]}, "images"),
            ({"messages": TURNS, "chosen": "a", "rejected": "b"}, "chosen"),
        ],
    )
    def test_fields_with_content_are_warned_of(
        self, record: dict[str, Any], unused: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        read(record)
        assert f"1 of 1 record has the field '{unused}'" in caplog.text

    def test_a_field_that_the_recipe_ignores_needs_no_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        counts = counts_of({**GOOD, "system": "x"}, fields={"system": None})
        assert not caplog.records
        assert counts.unused_fields == {"system": 1}
        assert counts.formats == {"alpaca (instruction, input, output)": 1}

    def test_unused_keys_of_turns_are_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        turns = [{**turn, "channel": "final", "timestamp": 3} for turn in TURNS]
        counts = counts_of({"messages": turns})
        assert counts.unused_message_keys == {"channel": 2, "timestamp": 2}
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert warnings == ["dir/x.jsonl: 2 turns have the key 'channel', which is not used"]

    def test_many_names_take_little_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        counts = counts_of(*({**GOOD, f"k{n}": "x"} for n in range(MAX_COUNTED_NAMES + 5)))
        assert len(counts.unused_fields) == MAX_COUNTED_NAMES + 1
        assert counts.unused_fields["(other names)"] == 5
        assert "and 981 other names occur, which are not used" in caplog.text

    def test_counts_are_written_as_json(self) -> None:
        counts = counts_of({**GOOD, "id": "a", "x": 1}, {**GOOD, "id": "a"}, duplicate_ids="suffix")
        assert json.loads(json.dumps(asdict(counts))) == {
            "records": 2,
            "formats": {"alpaca (instruction, input, output)": 2},
            "unused_fields": {"x": 1},
            "unused_message_keys": {},
            "invalid": {},
            "dropped_turns": 0,
            "renamed_ids": 1,
        }


class TestInvalidRecords:
    def test_every_error_of_a_record_can_be_skipped(self) -> None:
        errors: list[DataError] = []
        counts = RecordCounts()
        unparsed = DataError("dir/x.jsonl line 9 is not valid JSON", reason="not JSON")
        records = [
            [],
            {"q": "a"},
            {**GOOD, "output": ""},
            {**GOOD, "output": ""},
            {**GOOD, "id": "a"},
            {**GOOD, "id": "a"},
            {**GOOD, "id": True},
            {"messages": [*TURNS, {"role": "narrator", "content": "a"}]},
            unparsed,
        ]
        samples = read(*records, on_invalid=errors.append, counts=counts)
        assert [sample.id for sample in samples] == ["a"]
        assert counts.invalid == {
            "not an object": 1,
            "unknown format": 1,
            "empty text": 2,
            "duplicate id": 1,
            "invalid id": 1,
            "unknown role": 1,
            "not JSON": 1,
        }
        assert [error.reason for error in errors[:3]] == [*counts.invalid][:3]
        assert errors[-1] is unparsed

    def test_a_source_of_invalid_records_is_an_error(self) -> None:
        message = read_error([], "a", reason="other", on_invalid=lambda error: None)
        assert message.startswith("dir/x.jsonl: none of its 2 records can be used; the first: dir/")

    def test_a_source_without_records_is_an_error(self) -> None:
        assert "holds no samples" in read_error(reason="other")


def test_several_sources_share_a_table_of_ids() -> None:
    ids = SampleIds("suffix", "data.fields.id")
    counts = [RecordCounts(), RecordCounts()]
    read({**GOOD, "id": "a"}, {**GOOD, "id": "a"}, ids=ids, counts=counts[0])
    (sample,) = read({**GOOD, "id": "a"}, ids=ids, counts=counts[1])
    assert sample.id == "a-2" and [count.renamed_ids for count in counts] == [1, 1]


def test_content_ids_do_not_depend_on_the_order_of_the_records() -> None:
    records = [{**GOOD, "output": str(n % 5)} for n in range(12)]

    def ids(records: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(sample.id, sample.response.content) for sample in read(*records)}

    assert ids(records) == ids(reversed(records)) and len(ids(records)) == 12


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)
FLAT = st.fixed_dictionaries(
    {"instruction": TEXT, "input": st.just("") | TEXT, "output": TEXT | st.lists(TEXT, min_size=1)}
)
CHAT = st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=3).map(
    lambda pairs: {
        "messages": [
            turn
            for question, answer, trains in pairs
            for turn in (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer, "weight": int(trains)},
            )
        ]
    }
)


@given(st.lists(FLAT | CHAT, max_size=8))
def test_sample_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    samples = read(GOOD, *records, on_invalid=lambda error: None)
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.response.role == "assistant" for sample in samples)
    assert all(sample.response.train for sample in samples)
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    path.write_text("".join(sample.to_json() + "\n" for sample in samples), encoding="utf-8")
    assert list(read_sample_file(path)) == samples


@given(CHAT)
def test_every_turn_is_read_or_counted(record: dict[str, Any]) -> None:
    turns = record["messages"]
    trained = [n for n, turn in enumerate(turns) if turn.get("weight")]
    counts = RecordCounts()
    samples = read(record, GOOD, counts=counts, on_invalid=lambda error: None)
    if not trained:
        assert len(samples) == 1 and counts.invalid == {"no turn trains": 1}
        return
    messages = samples[0].messages
    assert [(m.role, m.content) for m in messages] == [
        (turn["role"], turn["content"]) for turn in turns[: len(messages)]
    ]
    assert [n for n, m in enumerate(messages) if m.role == "assistant" and m.train] == trained
    assert counts.dropped_turns == len(turns) - len(messages)


def test_real_files_load(shared_data: Path) -> None:
    counts = {
        path.name: len({sample.id for sample in read_samples(str(path))})
        for path in shared_data.glob("*.jsonl")
    }
    assert counts["train.jsonl"] == 11_027
    assert counts["eval_dolly500.jsonl"] == 500 and counts["eval_sni_11plus.jsonl"] == 1_694
    assert len(counts) >= 7
