"""Exported teacher caches: what comes back is what was written, and nothing else is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_transfers import DATA, FINGERPRINT, MODEL, SAMPLES, CacheRun, write_data
from command_line import ROOT, environment

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.teachers import cache_export
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.cache_format import METADATA, read_metadata
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.workflow.files import MARK
from pocl_ds.workflow.run_dir import RunDirectory

STORED: list[tuple[str, dict[str, Any]]] = [
    ("cached_hidden_states", {}),
    ("cached_hidden_states", {"hidden_dtype": "bfloat16"}),
    ("cached_hidden_states", {"hidden_dtype": "int8"}),
    ("cached_topk", {}),
    ("cached_topk", {"top_k": 40, "top_p": 0.3}),
    ("cached_sampled", {}),
]
ORDER = (4, 1, 6, 0)  # rows of the exporting run, in the order of the importing one


def opened(run: RunDirectory) -> TeacherCache:
    splits = [TokenizedSplit.open(run.data, name) for name in ("train", "validation")]
    return open_cache(run.teacher_cache, FINGERPRINT, "teacher", splits)


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("the teacher was loaded")


@pytest.fixture(scope="module")
def filled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CacheRun]:
    """Runs with a finished cache, each filled once."""
    runs: dict[str, CacheRun] = {}

    def fill(mode: str = "cached_topk", **config: Any) -> CacheRun:
        name = f"{mode} {config}"
        if name not in runs:
            folder = tmp_path_factory.mktemp("filled")
            runs[name] = CacheRun(write_data(folder), tiny_llama, mode, shards=2, **config)
            runs[name].fill()
        return runs[name]

    return fill


@pytest.fixture
def exported(filled: Callable[..., CacheRun], tmp_path: Path) -> Path:
    """A folder with the export of a cache of top-k records."""
    filled().export_to(tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def target(tiny_llama: Path, tmp_path: Path) -> CacheRun:
    """A run that wants the same cache."""
    return CacheRun(write_data(tmp_path / "target"), tiny_llama, "cached_topk")


@pytest.mark.parametrize(("mode", "config"), STORED)
def test_another_run_reads_the_same_outputs(
    mode: str,
    config: dict[str, Any],
    filled: Callable[..., CacheRun],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has fewer samples in another order and other shards, and one of its validation samples was
    trained on; the export has several files.
    """
    monkeypatch.setattr(cache_export, "FILE_BYTES", 700)
    source = filled(mode, **config)
    source.export_to(tmp_path / "exported")
    assert len(list((tmp_path / "exported" / "teacher-0").glob("shard-*"))) > 3
    run = write_data(tmp_path / "b", ORDER, validation=5)
    other = CacheRun(run, tiny_llama, mode, shards=3, **config)
    other.import_from(tmp_path / "exported")

    before, after = opened(source.run), opened(run)
    rows = {("train", place): row for place, row in enumerate(ORDER)} | {("validation", 0): 5}
    for (split, place), row in rows.items():
        # Samples 0 and 6 have the same tokens; sampled records differ between them.
        if mode == "cached_sampled" and row in (0, 6):
            continue
        ours, theirs = after.read(split, (place,)), before.read("train", (row,))
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert torch.equal(after.decode(ours), before.decode(theirs))
        assert after.find_damage(split, np.array([place])) is None
    assert after.codec == before.codec
    for path in (before.directory / "head").glob("*"):
        assert path.read_bytes() == (after.directory / "head" / path.name).read_bytes()
    # The step is finished: it neither loads the teacher nor writes anything.
    other.fill(load=fail)


def test_samples_with_the_same_tokens_keep_their_own_draws(
    filled: Callable[..., CacheRun], tiny_llama: Path, tmp_path: Path
) -> None:
    source = filled("cached_sampled")
    source.export_to(tmp_path / "exported")
    run = write_data(tmp_path / "b")
    CacheRun(run, tiny_llama, "cached_sampled").import_from(tmp_path / "exported")
    before, after = opened(source.run), opened(run)
    records = [before.read("train", (row,)) for row in (0, SAMPLES - 1)]
    assert not torch.equal(*records)
    for row, record in zip((0, SAMPLES - 1), records, strict=True):
        assert torch.equal(after.read("train", (row,)), record)


def test_every_damage_to_an_export_is_refused(exported: Path, target: CacheRun) -> None:
    """Each file truncated, with a changed bit, removed, empty, and exchanged for another."""
    files = sorted(path for path in exported.rglob("*") if path.is_file() and path.name != MARK)
    contents = {path: path.read_bytes() for path in files}
    assert len(files) == 3  # a file for each split, and the metadata
    for number, path in enumerate(files):
        content, other = contents[path], contents[files[number - 1]]
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        for damaged in (content[:-2], bytes(flipped), None, b"", other):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(ArtifactError) as refusal:
                target.import_from(exported)
            assert str(exported) in str(refusal.value) and "\n" not in str(refusal.value)
            assert not target.run.teacher_cache.exists()
            path.write_bytes(content)
    target.import_from(exported)


def rewrite(exported: Path, **changes: Any) -> None:
    """Change fields of the metadata, and its checksum with them."""
    from pocl_ds.teachers.cache_format import _tree_digest

    path = exported / METADATA
    tree = json.loads(path.read_text()) | changes
    tree.pop("sha256")
    path.write_text(json.dumps({**tree, "sha256": _tree_digest(tree)}))


def test_a_newer_version_is_refused_and_an_unknown_file_is_ignored(
    exported: Path, target: CacheRun
) -> None:
    shutil.copy(
        next(exported.rglob("*.safetensors")), exported / "teacher-0" / "shard-9.safetensors"
    )
    (exported / "README.md").write_text("mine")
    rewrite(exported, version=2)
    with pytest.raises(ArtifactError, match="has version 2 of the format, and this release reads"):
        target.import_from(exported)
    rewrite(exported, version=1)
    target.import_from(exported)


def test_a_file_outside_the_export_is_not_read(exported: Path, target: CacheRun) -> None:
    files = read_metadata(exported).files
    rewrite(exported, files={**files, "teacher-0/../../secret": {"bytes": 1, "sha256": "x"}})
    with pytest.raises(ArtifactError, match="damaged"):
        target.import_from(exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": replace(DATA, tokenizer={"vocabulary": "v", "rules": "x"})},
            r"another tokenizer of the student \(different: rules\)",
        ),
        (
            {"data": replace(DATA, template={"name": "chat", "sha256": "t"})},
            "has template alpaca, and this recipe has chat",
        ),
        (
            {"data": replace(DATA, template={"name": "alpaca", "sha256": "x"})},
            "other contents or settings of the template alpaca",
        ),
        (
            {"model": replace(MODEL, label="mine", files={"model.safetensors": [1, "x"]})},
            r"another teacher \(org/teacher; mine differs in config.json and 1 more files\)",
        ),
        (
            {"model": replace(MODEL, quantization="bnb_4bit")},
            "filled with teacher.quantization=none, and this recipe has bnb_4bit",
        ),
    ],
)
def test_what_belongs_to_other_models_or_prompts_is_refused(
    changes: dict[str, Any], message: str, exported: Path, target: CacheRun
) -> None:
    with pytest.raises(ArtifactError, match=message):
        target.import_from(exported, **changes)
    assert not target.run.teacher_cache.exists()


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("cached_sampled", {}, "has teacher.mode=cached_topk, and this recipe cached_sampled"),
        ("cached_topk", {"backend": "vllm"}, "filled by teacher_cache.backend=transformers"),
        (
            "cached_topk",
            {"top_k": 5},
            "set teacher_cache.top_k=6 and teacher_cache.top_p=null, or fill",
        ),
        ("cached_topk", {"temperatures": (1.0, 2.0, 3.0)}, "this recipe needs 3 too"),
    ],
)
def test_other_records_are_refused(
    mode: str,
    changes: dict[str, Any],
    message: str,
    exported: Path,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    target = CacheRun(write_data(tmp_path / "b"), tiny_llama, mode, **changes)
    with pytest.raises(ArtifactError, match=message):
        target.import_from(exported)
    assert not target.run.teacher_cache.exists()


def test_records_of_more_temperatures_are_taken(
    exported: Path, filled: Callable[..., CacheRun], tiny_llama: Path, tmp_path: Path
) -> None:
    run = write_data(tmp_path / "b")
    CacheRun(run, tiny_llama, "cached_topk", temperatures=(1.0,)).import_from(exported)
    assert opened(run).codec == opened(filled().run).codec


def test_a_vocabulary_of_other_ids_is_refused(
    exported: Path, tiny_llama: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    target = CacheRun(write_data(tmp_path / "b"), tiny_llama, "cached_topk")
    vocabulary = read_metadata(exported).vocabulary
    rewrite(exported, vocabulary={**vocabulary, "sha256": "x"})
    with pytest.raises(ArtifactError, match="records over another vocabulary"):
        target.import_from(exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dtype": "int8"}, "has teacher_cache.hidden_dtype=model, and this recipe int8"),
        ({"dtype": "bfloat16"}, "hidden states of a teacher in float32.*set teacher.dtype=float32"),
    ],
)
def test_hidden_states_of_another_type_are_refused(
    changes: dict[str, Any],
    message: str,
    filled: Callable[..., CacheRun],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    filled("cached_hidden_states").export_to(tmp_path / "exported")
    target = CacheRun(write_data(tmp_path / "b"), tiny_llama, "cached_hidden_states", **changes)
    with pytest.raises(ArtifactError, match=message):
        target.import_from(tmp_path / "exported")


def test_missing_samples_are_counted_and_the_first_is_named(
    exported: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = write_data(tmp_path / "b")
    # The same ids and other tokens.
    tokens = run.data / "train.tokens.bin"
    content = np.fromfile(tokens, np.uint32)
    content[-1] += 1
    content[30] += 1
    content.tofile(tokens)
    with pytest.raises(ArtifactError, match="lacks 2 of the 7 samples of train, first s2"):
        CacheRun(run, tiny_llama, "cached_topk").import_from(exported)
    assert not run.teacher_cache.exists()


def test_a_loss_mask_belongs_to_the_sample(
    exported: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = write_data(tmp_path / "b")
    mask = run.data / "validation.loss_mask.bin"
    content = np.fromfile(mask, np.uint8)
    content[[3, 4]] = 0, 1
    content.tofile(mask)
    with pytest.raises(ArtifactError, match="lacks 1 of the 1 samples of validation"):
        CacheRun(run, tiny_llama, "cached_topk").import_from(exported)


def test_an_export_is_written_once_and_never_over_something_else(
    filled: Callable[..., CacheRun], exported: Path, tmp_path: Path
) -> None:
    times = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    filled().export_to(exported)
    assert times == {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    # A damaged export of the same cache is replaced.
    path = next(exported.rglob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    filled().export_to(exported)
    assert path.read_bytes() == content
    # A folder with other files, and the export of another cache.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty: choose another folder"):
        filled().export_to(tmp_path / "mine")
    rewrite(exported, fingerprint="other")
    with pytest.raises(ArtifactError, match="the export of another teacher cache"):
        filled().export_to(exported)


def test_an_unfinished_or_damaged_cache_is_not_exported(tiny_llama: Path, tmp_path: Path) -> None:
    run = CacheRun(write_data(tmp_path / "a"), tiny_llama, "cached_topk")
    with pytest.raises(ArtifactError, match="run `pocl cache-teacher` without --export first"):
        run.export_to(tmp_path / "exported")
    run.fill()
    (path,) = run.run.teacher_cache.glob("*/train-*.bin")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged at row 6 of train"):
        run.export_to(tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("command", "number"), [("export", 1), ("export", 2), ("import", 1), ("import", 5)]
)
def test_a_killed_transfer_leaves_nothing_and_can_be_repeated(
    command: str, number: int, filled: Callable[..., CacheRun], exported: Path, target: CacheRun
) -> None:
    source = filled()
    if command == "export":
        folder, other = source.run.path, exported.with_name("second")
    else:
        folder, other = target.run.path, exported
    model = source.arguments["teacher"].model
    killed = subprocess.run(
        [
            sys.executable,
            "-m",
            "cache_transfers",
            command,
            folder,
            other,
            model,
            "cached_topk",
            str(number),
        ],
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    if command == "export":
        assert not other.exists()
        source.export_to(other)
        left = sorted(path.name for path in other.parent.iterdir())
        assert left == ["exported", "second", "target"]
        target.import_from(other)
    else:
        with pytest.raises(ArtifactError, match="no complete cache"):
            opened(target.run)
        target.import_from(other)
        assert len(list(target.run.teacher_cache.iterdir())) == 2  # the folder and the manifest
    before, after = opened(source.run), opened(target.run)
    rows = tuple(range(SAMPLES))
    assert torch.equal(before.read("train", rows), after.read("train", rows))


def test_a_full_disk_leaves_no_part_of_an_import(
    exported: Path, target: CacheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", raise_disk_full)
        with pytest.raises(ResourceError, match="disk is full"):
            target.import_from(exported)
    (folder,) = target.run.teacher_cache.iterdir()
    assert not (folder / "manifest.json").exists() and not list(folder.glob("*.bin"))
    target.import_from(exported)
    assert opened(target.run).find_damage("train", np.arange(SAMPLES)) is None


def test_the_size_limit_holds_for_an_import(
    exported: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = write_data(tmp_path / "b")
    target = CacheRun(run, tiny_llama, "cached_topk", max_disk_gb=1e-6)
    with pytest.raises(ResourceError, match="max_disk_gb=1e-06"):
        target.import_from(exported)
