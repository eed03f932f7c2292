"""Manifests: a result is finished or not, and damage is named."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow import manifest
from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.manifest import (
    SCHEMA,
    Manifest,
    changed_files,
    damaged_files,
    fingerprint,
    finished_manifest,
    read_manifest,
    write_manifest,
)


def test_a_manifest_removed_during_reading_counts_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of a job array remove outdated results while other tasks read them."""
    write_manifest(tmp_path, "preprocess", "f", files=[])
    monkeypatch.setattr(Path, "is_file", lambda path: path.unlink() or True)  # type: ignore[func-returns-value]
    assert read_manifest(tmp_path) is None


def test_a_result_with_missing_files_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    write_manifest(tmp_path, "plan", "f")
    assert finished_manifest(tmp_path, "f") is not None and finished_manifest(tmp_path, "g") is None
    (tmp_path / "plan.json").unlink()
    assert finished_manifest(tmp_path, "f") is None


def test_a_flipped_bit_makes_a_result_unfinished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was used as if nothing had happened, since only the sizes were compared."""
    write_result(tmp_path)
    write_manifest(tmp_path, "preprocess", "f")
    assert finished_manifest(tmp_path, "f") is not None
    flip_bit(tmp_path / "sub" / "b.bin", 1000)
    assert finished_manifest(tmp_path, "f", checksums=False) is not None
    assert finished_manifest(tmp_path, "f") is None
    assert "sub/b.bin has another checksum) and does not count" in caplog.text
    flip_bit(tmp_path / "sub" / "b.bin", 1000)
    assert finished_manifest(tmp_path, "f") is not None


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def digest(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return file_digest(path)

    write_result(tmp_path)
    written = write_manifest(tmp_path, "preprocess", "f")
    monkeypatch.setattr(manifest, "file_digest", digest)
    for _ in range(2):
        assert changed_files(tmp_path, written) == []
    assert sorted(read) == ["a.txt", "b.bin"]
    (tmp_path / "a.txt").touch()
    assert changed_files(tmp_path, written) == [] and read[2:] == ["a.txt"]
    (tmp_path / "copy").write_bytes((tmp_path / "a.txt").read_bytes())
    os.utime(tmp_path / "copy", ns=(0, (tmp_path / "a.txt").stat().st_mtime_ns))
    os.replace(tmp_path / "copy", tmp_path / "a.txt")
    assert changed_files(tmp_path, written) == [] and read[3:] == ["a.txt"]
    # The record is no part of the result.
    assert write_manifest(tmp_path, "preprocess", "f").files == written.files
    (tmp_path / ".manifest.json.verified").write_text('{"a.txt": 1}')
    assert changed_files(tmp_path, written) == []


@given(st.data())
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(data: st.DataObject) -> None:
    """Its fingerprint would name another recipe, its checksums other files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.txt").write_text("alpha")
        written = write_manifest(folder, "plan", "f" * 64, info={"loss": 0.1, "samples": 3})
        path = folder / "manifest.json"
        flip_bit(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
        with contextlib.suppress(ArtifactError):
            assert read_manifest(folder) == written


def flip_bit(path: Path, number: int) -> None:
    content = bytearray(path.read_bytes())
    content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)


def write_result(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(200)))


def test_a_written_manifest_is_read_back(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_result(tmp_path)
    assert read_manifest(tmp_path) is None
    written = write_manifest(tmp_path, "preprocess", "f" * 64, info={"samples": 3})
    assert read_manifest(tmp_path) == written
    assert sorted(written.files) == ["a.txt", "sub/b.bin"]
    assert written.files["a.txt"]["bytes"] == 5
    assert written.info.pop("peak_host_bytes") > 2**20
    assert written.info == {"samples": 3}
    assert written.versions["numpy"] == np.__version__
    assert {"torch", "deepspeed", "transformers", "datasets", "rouge-score", "rapidfuzz"} <= set(
        written.versions
    )
    assert damaged_files(tmp_path, written) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_result(tmp_path)
    manifest = write_manifest(tmp_path, "preprocess", "f")
    (tmp_path / "a.txt").write_text("alphA")  # same size
    assert damaged_files(tmp_path, manifest) == ["a.txt has another checksum"]
    assert damaged_files(tmp_path, manifest, checksums=False) == []
    (tmp_path / "a.txt").write_text("alphas")
    assert damaged_files(tmp_path, manifest) == ["a.txt has 6 bytes instead of 5"]
    (tmp_path / "a.txt").write_text("alph")
    (tmp_path / "sub" / "b.bin").unlink()
    assert damaged_files(tmp_path, manifest) == [
        "a.txt has 4 bytes instead of 5",
        "sub/b.bin is missing",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": "x"', "is damaged (Expecting"),
        ('{"what": 1}', "is not a manifest of this program"),
        *(
            (
                json.dumps({"step": "", "fingerprint": "", **fields, "schema": SCHEMA}),
                "is not a manifest of this program",
            )
            for fields in (
                {"files": {}, "info": []},
                {"files": {"a": {"bytes": "1", "sha256": ""}}},
                {"files": {"a": {"bytes": 1, "sha256": None}}},
            )
        ),
        (
            json.dumps({"step": "", "fingerprint": "", "files": {}, "schema": SCHEMA + 1}),
            f"has schema {SCHEMA + 1} and this program writes {SCHEMA}",
        ),
    ],
)
def test_a_damaged_manifest_raises(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError) as exc_info:
        read_manifest(tmp_path)
    assert str(exc_info.value).startswith(f"{tmp_path / 'manifest.json'} {words}")


def test_the_manifest_schema_stays_readable(tmp_path: Path) -> None:
    """Raise SCHEMA if these names change, since old runs are read too."""
    tree: dict[str, Any] = {
        "step": "data",
        "fingerprint": "f",
        "files": {"a.txt": {"bytes": 5, "sha256": "0"}},
        "info": {"samples": 3},
        "versions": {"torch": "2"},
        "schema": 1,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    assert read_manifest(tmp_path) == Manifest(
        "data", "f", tree["files"], {"samples": 3}, {"torch": "2"}, 1
    )


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
def test_a_fingerprint_ignores_the_order_of_keys(tree: dict[str, object]) -> None:
    assert fingerprint(tree) == fingerprint(dict(reversed(tree.items())))
    assert fingerprint(tree) != fingerprint({**tree, "a key that is long": 1})
