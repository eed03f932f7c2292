"""Captures of DistillKit become top-k records; what is not exact is refused with what is lost.

tests/distillkit_captures/ was written by DistillKit's own compressor and Parquet writer (commit
a61c2e7), from random log-probabilities over 320 ids for the first four samples of
`cache_transfers`; expected.npz has the 16 largest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cache_transfers import FINGERPRINT, PROMPT, CacheRun, sequences, write_data

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.record_codec import DISTANCE_STEPS
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.teachers.distillkit_capture import DistillKitCapture
from pocl_ds.teachers.foreign_records import import_foreign, is_foreign
from pocl_ds.workflow.manifest import read_manifest

CAPTURES = Path(__file__).resolve().parents[2] / "distillkit_captures"
ROWS = (2, 0, 3, 1)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A copy of the exact capture."""
    return shutil.copytree(CAPTURES / "exact", tmp_path / "capture")


def make_run(folder: Path, model: Path, mode: str = "cached_topk", **config: Any) -> CacheRun:
    run = write_data(folder, ROWS, validation=1)
    return CacheRun(run, model, mode, **{"temperatures": (1.0,), "top_k": 6, **config})


def run_import(target: CacheRun, source: Path) -> None:
    assert is_foreign(source)
    import_foreign(
        target.run, source, target.layout(), config=target.config, fingerprint=FINGERPRINT
    )


@pytest.mark.parametrize("name", ["exact", "delta"])
@pytest.mark.parametrize("top_k", [6, 16])
def test_records_have_the_captured_probabilities(
    name: str, top_k: int, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = make_run(tmp_path / "run", tiny_llama, top_k=top_k, shards=2)
    run_import(target, CAPTURES / name)
    assert "name neither teacher nor tokenizer" in caplog.text
    split = TokenizedSplit.open(target.run.data, "train")
    cache = open_cache(target.run.teacher_cache, FINGERPRINT, "teacher", [split])
    assert isinstance(cache.codec, TopKCodec)
    expected, masses = np.load(CAPTURES / "expected.npz"), []
    for place, row in enumerate(ROWS):
        # The first loss token is predicted at the last token of the prompt.
        log_p, ids = (expected[f"{part}_{row}"][PROMPT - 1 : -1] for part in ("log_p", "ids"))
        decoded_ids, decoded = cache.codec.decode(cache.read("train", (place,)), 1.0)
        # Ids ascend in a record.
        order = ids[:, :top_k].argsort(-1)
        assert np.array_equal(decoded_ids, np.take_along_axis(ids[:, :top_k], order, -1))
        # A distance is rounded to 16 bits of the largest one.
        step = float((log_p[:, 0] - log_p[:, top_k - 1]).max()) / DISTANCE_STEPS
        expected_log_p = np.take_along_axis(log_p[:, :top_k], order, -1)
        np.testing.assert_allclose(decoded[:, :-1], expected_log_p, rtol=0, atol=step + 2e-6)
        mass = 1 - np.exp(log_p[:, :top_k].astype(np.float64)).sum(-1)
        np.testing.assert_allclose(decoded[:, -1].exp(), mass, rtol=1e-4, atol=1e-6)
        masses.append(mass)
    manifest = read_manifest(cache.directory)
    assert manifest and manifest.info["backend"] == "distillkit"
    # The validation sample counts too.
    mean = np.concatenate([*masses, masses[ROWS.index(1)]]).mean()
    assert manifest.info["error"] == [{"temperature": 1.0, "mass": pytest.approx(mean, rel=1e-5)}]
    # The step is finished.
    run_import(target, CAPTURES / name)


@pytest.mark.parametrize(("top_k", "top_p"), [(4, None), (16, None), (16, 0.5)])
def test_ids_that_are_not_shared_are_left_out(
    top_k: int, top_p: float | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """Against the stored probabilities without them, divided by what is left."""
    target = make_run(tmp_path / "run", tiny_llama, top_k=top_k, top_p=top_p)
    expected = np.load(CAPTURES / "expected.npz")
    split, codec = TokenizedSplit.open(target.run.data, "train"), target.layout().codec
    assert isinstance(codec, TopKCodec)
    row = 2
    log_p, ids = (expected[f"{part}_{row}"][PROMPT - 1 : -1] for part in ("log_p", "ids"))
    allowed = np.ones(320, np.bool_)
    allowed[ids[0, [0, 3]]] = False  # among them the most probable id of the first token
    capture = DistillKitCapture(CAPTURES / "exact", codec, allowed)
    place = capture.find(split, ROWS.index(row))
    assert place is not None
    decoded_ids, decoded = codec.decode(capture.read(place), 1.0)
    for token in range(len(ids)):
        p = np.exp(log_p[token].astype(np.float64))
        shared = allowed[ids[token]]
        p = np.where(shared, p, 0.0) / (1 - p[~shared].sum())
        order = np.argsort(-p, kind="stable")[: min(top_k, int(shared.sum()))]
        if top_p is not None:
            order = order[np.cumsum(p[order]) - p[order] < top_p]
        actual: dict[int, float] = {}  # an unused slot repeats an id, with probability 0
        values = decoded[token, :-1].exp().tolist()
        for stored_id, value in zip(decoded_ids[token].tolist(), values, strict=True):
            actual[stored_id] = max(value, actual.get(stored_id, 0.0))
        for place_of_id in order:
            assert actual[int(ids[token][place_of_id])] == pytest.approx(p[place_of_id], abs=1e-4)
        assert not {int(i) for i in ids[token][~shared]} & {
            i for i, value in actual.items() if value > 0
        }
    total = decoded.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-3)
    assert (capture.filled_tokens > 0) == (top_k == 16)


def test_a_capture_of_the_teacher_equals_the_cache_that_it_fills(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Written here in DistillKit's layout, from the log-probabilities of the tiny model."""
    from transformers import AutoModelForCausalLM

    model, k, bits = AutoModelForCausalLM.from_pretrained(tiny_llama), 8, 9
    rows = []
    for tokens in sequences()[:4]:
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[:-1]
        values, ids = log_p.topk(k)
        id_bits = (ids.numpy()[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows.append(
            {
                "input_ids": tokens,
                "compressed_logprobs": values.numpy().view(np.uint8).tolist(),
                "bytepacked_indices": np.packbits(id_bits.reshape(len(ids), -1), -1).tolist(),
            }
        )
    (tmp_path / "capture").mkdir()
    bytes_type = pa.list_(pa.list_(pa.uint8()))
    types = (pa.list_(pa.uint64()), bytes_type, bytes_type)
    schema = pa.schema(list(zip(rows[0], types, strict=True)))
    for number, part in enumerate((rows[:3], rows[3:])):
        path = tmp_path / "capture" / f"data_{number}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=2)
    config = {"d": 320, "k": k, "exact_k": k, "exact_dtype": "float32", "delta_encoding": False}
    (tmp_path / "capture" / "compression_config.yaml").write_text(yaml.safe_dump(config))

    imported, filled = (make_run(tmp_path / name, tiny_llama) for name in ("imported", "filled"))
    run_import(imported, tmp_path / "capture")
    filled.fill()
    decoded = []
    for target in (imported, filled):
        split = TokenizedSplit.open(target.run.data, "train")
        cache = open_cache(target.run.teacher_cache, FINGERPRINT, "teacher", [split])
        assert isinstance(cache.codec, TopKCodec)
        decoded.append(cache.codec.decode(cache.read("train", tuple(range(len(ROWS)))), 1.0))
    assert torch.equal(decoded[0][0], decoded[1][0])
    torch.testing.assert_close(decoded[0][1], decoded[1][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("half", {}, "exact_dtype=bfloat16, which has rounded the log-probabilities"),
        ("recommended", {}, "exact_k=4 of k=16, so that the other log-probabilities were replaced"),
        ("exact", {"top_k": 17}, "has 16 ids of each token: set teacher_cache.top_k to 16 or less"),
        ("exact", {"temperatures": (1.0, 2.0)}, "temperature 2 does not follow"),
        ("exact", {"mode": "cached_sampled"}, "teacher.mode=cached_sampled: set teacher.mode=c"),
        ("exact", {"mode": "cached_hidden_states"}, "this recipe has teacher.mode=cached_hidden"),
        ("missing", {}, "neither cache.json.* nor compression_config.yaml"),
    ],
)
def test_what_is_lost_or_does_not_fit_is_refused(
    source: str, config: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    target = make_run(tmp_path / "run", tiny_llama, **config)
    with pytest.raises(ArtifactError, match=message):
        run_import(target, CAPTURES / source)
    assert not target.run.teacher_cache.exists()


def change_rows(path: Path, **changes: Any) -> None:
    """Change columns of all rows: name -> function of a row's value."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        row.update({name: change(row[name]) for name, change in changes.items()})
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressed_logprobs": lambda rows: rows[:3]}, "damaged at row 0 .*compressed_logprobs"),
        ({"compressed_logprobs": lambda rows: [row[:-4] for row in rows]}, "damaged at row 0"),
        ({"compressed_logprobs": lambda rows: [row[::-1] for row in rows]}, "not log-prob"),
        ({"compressed_logprobs": lambda rows: [[0] * 64 for _ in rows]}, "sum to more than 1"),
        (
            {"bytepacked_indices": lambda rows: [[0] * 18 for _ in rows]},
            "an id that appears twice",
        ),
        (
            {"bytepacked_indices": lambda rows: [[255, row[1] | 128, *row[2:]] for row in rows]},
            "damaged at row 0 .*an id that is not below the 321 of compression_config.yaml",
        ),
        ({"input_ids": lambda ids: [*ids[:3], 1, *ids[4:]]}, "lacks 4 of the 4 samples of train"),
    ],
)
def test_damaged_rows_are_refused(
    changes: dict[str, Any], message: str, capture: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    change_rows(capture / "data_0.parquet", **changes)
    target = make_run(tmp_path / "run", tiny_llama)
    with pytest.raises(ArtifactError, match=message):
        run_import(target, capture)
    assert not list(target.run.teacher_cache.glob("**/manifest.json"))


def test_damaged_files_are_refused(capture: Path, tiny_llama: Path, tmp_path: Path) -> None:
    target = make_run(tmp_path / "run", tiny_llama)
    path, config = capture / "data_0.parquet", capture / "compression_config.yaml"
    contents = {path: path.read_bytes(), config: config.read_bytes()}
    damages = [(path, contents[path][:-9]), (path, b"")]
    damages += [(config, content) for content in (b"k: [\n", b"k: 16\n", b"\xff")]
    for file, content in damages:
        file.write_bytes(content)
        with pytest.raises(ArtifactError) as refusal:
            run_import(target, capture)
        assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)
        file.write_bytes(contents[file])
    path.unlink()
    with pytest.raises(ArtifactError, match="no Parquet files"):
        run_import(target, capture)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("input_ids", "packed_indices", "exact_values", "coeffs"), "older format, in float16"),
        (("input_ids", "token_ids", "top_values"), "has the columns input_ids, token_ids"),
        (("input_ids", "compressed_logprobs", "bytepacked_indices", "attention_mask"), "unpacked"),
    ],
)
def test_other_columns_are_refused(
    columns: tuple[str, ...], message: str, capture: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table({name: [[1]] for name in columns}), capture / "data_0.parquet")
    with pytest.raises(ArtifactError, match=message):
        run_import(make_run(tmp_path / "run", tiny_llama), capture)


RAW = {"messages": [], "target_token_ids": [[1, 2]], "logprobs": [[-0.1, -2.5]]}
LEGACY = {"messages": [], "llm_logprobs": [[{"token": "token_id:1", "logprob": -0.1}]]}
PREPARED = {"input_ids": [1], "labels": [1], "target_logprobs": [[0.0]], "target_token_ids": [[1]]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RAW, "and without the samples' token ids"),
        (LEGACY, "and without the samples' token ids"),
        (PREPARED, "sum to 1, so that the mass of all other ids is lost"),
    ],
)
def test_the_reason_why_axolotls_files_cannot_be_read(
    record: dict[str, Any], message: str, kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """The columns that its data loaders and its preprocessing have (axolotl 0.19.0)."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    else:
        from datasets import Dataset

        dataset = Dataset.from_list([record])
        if kind == "arrow":
            dataset.save_to_disk(folder)
        else:
            dataset.to_parquet(folder / "train.parquet")
    target = make_run(tmp_path / "run", tiny_llama)
    for source in (folder, folder / "train.jsonl") if kind == "jsonl" else (folder,):
        with pytest.raises(ArtifactError, match=message):
            run_import(target, source)
