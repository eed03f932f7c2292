"""Every container of records gives the same records, and every fault names its file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_reading import CONTAINERS, RECORDS, lines, places, read, read_error, write

from pocl_ds.config.data import SourceConfig
from pocl_ds.data import records
from pocl_ds.data.sources import read_records, read_samples, read_source_records
from pocl_ds.errors import DataError


def compressed_zst(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd"))


class TestContainers:
    @pytest.mark.parametrize(
        ("name", "first_place"),
        [
            ("columns.json", "columns.json record 1"),
            ("crlf.jsonl", "crlf.jsonl line 1"),  # begins with a byte-order mark
            ("lines.json", "lines.json line 1"),
            ("list.jsonl", "list.jsonl record 1"),
            ("pandas.json", "pandas.json record 1"),
            ("pretty.jsonl", "pretty.jsonl line 1"),
            ("saved", "saved row 1"),
            ("saved/data-00000-of-00001.arrow", "data-00000-of-00001.arrow row 1"),
            ("shards", "train-00000-of-00002.parquet row 1"),
            ("upper.JSONL", "upper.JSONL line 1"),
            ("x.csv", "x.csv line 2"),
            ("x.jsonl.gz", "x.jsonl.gz line 1"),
            ("x.ndjson", "x.ndjson line 1"),
            ("x.tsv", "x.tsv line 2"),  # with commas
        ],
    )
    def test_same_records(self, name: str, first_place: str) -> None:
        source = str(CONTAINERS / name)
        assert read(source) == RECORDS
        assert places(source)[0] == first_place
        assert len(set(places(source))) == 6

    def test_lines_of_pretty_records(self) -> None:
        assert places(str(CONTAINERS / "pretty.jsonl"))[1] == "pretty.jsonl line 5"

    def test_splits_of_a_json_file(self) -> None:
        source = str(CONTAINERS / "splits.json")
        assert read(source) == RECORDS[:4]
        assert read(source, hub_split="test", needs_split=True) == RECORDS[4:]
        message = read_error(source, hub_split="validation", setting="data.validation")
        assert "splits train, test, and not 'validation'" in message
        assert "data.hub_validation_split" in message

    def test_splits_with_longer_names_in_a_json_file(self, tmp_path: Path) -> None:
        tree = {"train_sft": RECORDS, "test_sft": RECORDS[:1]}
        source = write(tmp_path / "x.json", json.dumps(tree))
        assert read(source, hub_split="test_sft") == RECORDS[:1]
        assert "splits train_sft, test_sft, and not 'train'" in read_error(source)

    def test_one_record(self) -> None:
        (record,) = read(str(CONTAINERS / "one.json"))
        assert list(record) == ["messages"] and len(record["messages"]) == 2

    def test_values_of_other_types(self) -> None:
        assert read(str(CONTAINERS / "bool.jsonl"))[0]["answer"] is True
        assert read(str(CONTAINERS / "number.jsonl"))[1]["answer"] == 6
        nan, *_ = read(str(CONTAINERS / "nan.jsonl"))
        assert math.isnan(nan["input"])

    def test_samples_of_values_of_other_types(self) -> None:
        number, *_ = read_samples(str(CONTAINERS / "number.jsonl"))
        assert number.response.content == "4"
        no_input, *_ = read_samples(str(CONTAINERS / "nan.jsonl"))
        assert no_input.input == ""

    @pytest.mark.parametrize(
        "name", ["structs", "maps", "content_parts", "messages_as_json_text", "binary", "squad"]
    )
    def test_columns_of_parquet_files(self, name: str) -> None:
        source = CONTAINERS.parent / f"{name}.parquet"
        fields = {"output": "answers.text"} if name == "squad" else {}
        sample, *_ = read_samples(str(source), fields=fields)
        expected = "France" if name == "squad" else "Pong."
        assert sample.response.content == expected and sample.instruction in (
            "Ping?",
            "Where is Paris?",
        )

    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "TSV"])
    @pytest.mark.parametrize(
        ("suffix", "compress"),
        [
            (".gz", gzip.compress),
            (".bz2", bz2.compress),
            (".XZ", lzma.compress),
            (".zst", compressed_zst),
        ],
    )
    def test_compressed(
        self, tmp_path: Path, ending: str, suffix: str, compress: Callable[[bytes], bytes]
    ) -> None:
        content = {
            "jsonl": lines(RECORDS),
            "json": json.dumps(RECORDS, indent=2),
            "csv": "instruction,output\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(6)),
            "TSV": "instruction\toutput\n" + "".join(f"Say {n}.\tIt is {n}.\n" for n in range(6)),
        }[ending]
        source = write(tmp_path / f"x.{ending}{suffix}", compress(content.encode()))
        assert read(source) == RECORDS

    def test_parts_of_a_compressed_file(self, tmp_path: Path) -> None:
        half, rest = lines(RECORDS[:3]).encode(), lines(RECORDS[3:]).encode()
        for suffix, compress in ((".gz", gzip.compress), (".zst", compressed_zst)):
            source = write(tmp_path / f"x.jsonl{suffix}", compress(half) + compress(rest))
            assert read(source) == RECORDS

    def test_arrow_file_format(self, tmp_path: Path) -> None:
        table = pa.Table.from_pylist(RECORDS)
        with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
        assert read(str(tmp_path / "x.arrow")) == RECORDS
        assert places(str(tmp_path / "x.arrow"))[-1] == "x.arrow row 6"

    def test_saved_dataset_with_chosen_rows(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list(RECORDS).select([4, 1]).save_to_disk(tmp_path / "saved")
        assert read(str(tmp_path / "saved")) == [RECORDS[4], RECORDS[1]]

    def test_saved_dataset_dict(self, tmp_path: Path) -> None:
        parts = {"train": RECORDS[:4], "validation": RECORDS[4:5], "test": RECORDS[5:]}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        ).save_to_disk(tmp_path / "saved")
        source = str(tmp_path / "saved")
        for name, part in parts.items():
            assert read(source, hub_split=name, needs_split=True) == part
        assert read(source, hub_split="dev") == parts["validation"]
        assert "train, validation, test, and not 'other'" in read_error(source, hub_split="other")

    def test_nulls_that_arrow_added_are_left_out(self, tmp_path: Path) -> None:
        calls = [{"messages": [{"arguments": {name: 1}}]} for name in ("a", "b")]
        pq.write_table(pa.Table.from_pylist(calls), tmp_path / "x.parquet")
        datasets.Dataset.from_list(calls).save_to_disk(tmp_path / "saved")
        assert read(str(tmp_path / "x.parquet")) == calls
        assert read(str(tmp_path / "saved")) == calls


class TestCsv:
    def test_values_stay_text(self, tmp_path: Path) -> None:
        source = write(
            tmp_path / "x.csv", 'id,output,n\r\n007,NA,1.0\r\n\r\n2020-01-01,"a\r\n""b""",\r\n'
        )
        assert list(read_records(source)) == [
            (f"{source} line 2", {"id": "007", "output": "NA", "n": "1.0"}),
            (f"{source} line 4", {"id": "2020-01-01", "output": 'a\r\n"b"', "n": ""}),
        ]

    @pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
    @pytest.mark.parametrize("separator", [";", ",", "\t"])
    def test_separator_of_the_header(self, tmp_path: Path, name: str, separator: str) -> None:
        rows = [("instruction", " output"), ("a", "b")]
        source = write(
            tmp_path / name, "\ufeff" + "".join(separator.join(row) + "\n" for row in rows)
        )
        assert read(source) == [{"instruction": "a", "output": "b"}]

    def test_long_cells(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.csv", f"output\n{'x' * 300_000}\n")
        assert len(read(source)[0]["output"]) == 300_000

    def test_faulty_rows_are_in_their_place(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.csv", 'a,b\n1,2,3\n1\n"1"x,2\n1,2\n')
        records = list(read_records(source))
        assert records[-1] == (f"{source} line 5", {"a": "1", "b": "2"})
        messages = [str(record) for _, record in records[:-1]]
        assert messages[0].startswith(f"{source} line 2: the row has 3 cells, and the header 2")
        assert messages[1].startswith(f"{source} line 3: the row has 1 cells, and the header 2")
        assert messages[2].startswith(f"{source} line 4: the row cannot be read (")

    def test_an_open_quotation_mark(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.tsv", 'a\tb\n"1\t2\n3\t4\n')
        assert read_error(source).startswith(f"{source} line 2: the row cannot be read (")

    def test_a_column_twice(self, tmp_path: Path) -> None:
        assert "'a' twice" in read_error(write(tmp_path / "x.csv", "a,a\n1,2\n"))


class TestFiles:
    def test_list_of_files(self) -> None:
        names = [str(CONTAINERS / name) for name in ("x.tsv", "x.csv")]
        assert places(names)[::6] == ["x.tsv line 2", "x.csv line 2"]
        assert "occurs twice" in read_error([names[0], names[0]])
        assert "org/name does not exist" in read_error([names[0], "org/name"])

    def test_patterns(self, tmp_path: Path) -> None:
        for name in ("b/2.jsonl", "a/1.jsonl", "c.txt"):
            write(tmp_path / name, lines([{"name": name}]))
        for pattern in ("*/*.jsonl", "**/*", "[ab]"):
            assert read(str(tmp_path / pattern)) == [{"name": "a/1.jsonl"}, {"name": "b/2.jsonl"}]
        assert "no data file matches" in read_error(str(tmp_path / "*.csv"))
        write(tmp_path / "d[1].jsonl", lines([{"name": "d"}]))  # a name, and no pattern
        assert read(str(tmp_path / "d[1].jsonl")) == [{"name": "d"}]

    def test_folders_of_shards(self, tmp_path: Path) -> None:
        for name in ("part-1.jsonl", "part-0.ndjson", ".hidden.jsonl", "_temporary/x.jsonl"):
            write(tmp_path / name, lines([{"name": name}]))
        write(tmp_path / "README.md", "read me")
        write(tmp_path / "dataset_info.json", "{}")
        assert [record["name"] for record in read(str(tmp_path))] == [
            "part-0.ndjson",
            "part-1.jsonl",
        ]
        assert "has a split such as test in its name" in read_error(
            str(tmp_path), hub_split="test", needs_split=True
        )
        write(tmp_path / "x.csv", "a\n1\n")
        assert "several kinds (.csv, .jsonl)" in read_error(str(tmp_path))

    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
            ("data/train.parquet", "data/test.parquet"),
            ("train/0.parquet", "test/0.parquet"),
            ("training_data.parquet", "eval_1.parquet"),
        ],
    )
    def test_splits_in_names(self, tmp_path: Path, train: str, test: str) -> None:
        for name in (train, test):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist([{"name": name}]), tmp_path / name)
        assert read(str(tmp_path)) == [{"name": train}]
        assert read(str(tmp_path), hub_split="test", needs_split=True) == [{"name": test}]
        assert "splits test, train, and not 'dev'" in read_error(str(tmp_path), hub_split="dev")
        shutil.copy(tmp_path / train, tmp_path / "more.parquet")
        assert "more.parquet beside files of the splits test, train" in read_error(str(tmp_path))

    def test_splits_with_longer_names(self, tmp_path: Path) -> None:
        for name in ("train_sft", "train_gen"):
            write(tmp_path / f"{name}-00000-of-00001.jsonl", lines([{"name": name}]))
        assert read(str(tmp_path), hub_split="train_gen") == [{"name": "train_gen"}]

    @pytest.mark.parametrize("name", ["x.csv", "x.jsonl.gz", "list.jsonl", "pretty.jsonl", "saved"])
    def test_files_without_splits(self, name: str) -> None:
        source = str(CONTAINERS / name)
        assert read(source, hub_split="test") == RECORDS
        for names in (source, [source], f"{CONTAINERS}/./{name[:-1]}?"):
            assert "'test'" in read_error(names, hub_split="test", needs_split=True)

    def test_missing_and_unusable_files(self, tmp_path: Path) -> None:
        for name in ("none.jsonl", "none.csv.gz", "none"):
            assert read_error(str(tmp_path / name)).endswith("does not exist: check the path")
        assert "is empty" in read_error(write(tmp_path / "x.jsonl", ""))
        assert "unknown file type" in read_error(write(tmp_path / "x.txt", "a"))
        assert "is compressed" in read_error(write(tmp_path / "x.parquet.gz", "a"))
        (tmp_path / "folder").mkdir()
        assert "folder holds no .jsonl" in read_error(str(tmp_path / "folder"))
        write(tmp_path / "bad" / "dataset_dict.json", '{"splits": ["train"]}')
        assert "cannot be loaded" in read_error(str(tmp_path / "bad"))

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("x.jsonl", b'{"a": "\xe9"}\n{}', "line 1 is not UTF-8 (invalid continuation byte)"),
            ("x.json", b'[\n{"a": "\xe9"}]', "line 2 is not UTF-8 (invalid continuation byte)"),
            ("x.csv", b"a\n\xe9\n", "line 2 is not UTF-8 (invalid continuation byte)"),
            ("x.jsonl", '{"a": 1}'.encode("utf-16"), "is not UTF-8 (it is UTF-16)"),
            ("x.parquet", b"PAR0" * 8, "is not a Parquet file ("),
            ("x.arrow", b"ARRO" * 8, "is not an Arrow file ("),
            ("x.arrow", b"ARROW1\0\0", "is not an Arrow file ("),
            ("x.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-8], "cannot be read ("),
            ("x.jsonl.gz", b"{}\n", "cannot be read ("),
            ("x.jsonl.bz2", b"{}\n", "cannot be read ("),
            ("x.jsonl.xz", b"{}\n", "cannot be read ("),
            ("x.jsonl.zst", b"{}\n", "cannot be read ("),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
        assert problem in read_error(write(tmp_path / name, content))

    @pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
    def test_a_record_beyond_the_limit_is_refused_before_it_is_tokenized(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One of 100 MB took 9 GB of memory."""
        monkeypatch.setattr(records, "MAX_RECORD_CHARACTERS", 100)
        text = "x" * 200
        contents = {
            "x.jsonl": json.dumps({"instruction": "a", "output": text}) + "\n",
            "x.json": json.dumps([{"instruction": "a", "output": text}]),
            "x.csv": f"instruction,output\na,{text}\n",
        }
        with pytest.raises(DataError) as caught:
            list(read_samples(write(tmp_path / name, contents[name])))
        assert re.search(
            r"x\.\w+ (line|record) \d has 201 characters, and a record may have", str(caught.value)
        )


class TestHub:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_hub_dataset(self, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
        calls = []

        def load_dataset(*arguments: Any, **options: Any) -> Any:
            calls.append((arguments, options))
            dataset = datasets.Dataset.from_list(RECORDS)
            return dataset.to_iterable_dataset() if streaming else dataset

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = SourceConfig(
            source="org/name", hub_subset="small", hub_split="test", hub_revision="a1b2c3"
        )
        records = list(read_source_records(source, streaming=streaming))
        assert records[5] == ("org/name record 6", RECORDS[5])
        options = {"split": "test", "revision": "a1b2c3", "streaming": streaming}
        assert calls == [(("org/name", "small"), options)]

    def test_streaming_of_files(self, tmp_path: Path) -> None:
        """`datasets` itself reads a folder by the same code as a dataset of the Hub."""
        write(tmp_path / "train.jsonl", lines(RECORDS))
        from pocl_ds.data.table_records import hub_records

        for streaming in (False, True):
            records = hub_records(str(tmp_path), None, "train", None, streaming=streaming)
            assert [record for _, record in records] == RECORDS

    def test_unreachable_dataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(name: str, *_: Any, **__: Any) -> None:
            raise ConnectionError(f"Couldn't reach {name}\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        message = read_error("org/name", hub_split="train")
        assert "'org/name'" in message and "network" in message and ".jsonl" in message
