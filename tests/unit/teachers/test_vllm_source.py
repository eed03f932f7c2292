"""Filling the teacher cache from a process next to the rank, which here answers with the states of
transformers.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hidden_state_child import start_child_instead
from teacher_cache_runs import (
    LENGTHS,
    cache_manifest,
    open_train_cache,
    train_split,
    write_cache,
    write_data,
)

from pocl_ds.config import TeacherCacheConfig, TeacherConfig
from pocl_ds.errors import ModelError, RecipeError, ResourceError
from pocl_ds.models.recipe_model import load_recipe_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers import mode_selection
from pocl_ds.teachers.cache_shard import CacheShard
from pocl_ds.teachers.state_sources import SourceFactory
from pocl_ds.teachers.vllm_source import VllmSource, first_of_group
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

pytestmark = pytest.mark.vllm  # the package must be installed

ROWS = tuple(range(len(LENGTHS)))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started; each runs tests/hidden_state_child.py."""
    return start_child_instead(monkeypatch)


def cached(run: RunDirectory) -> torch.Tensor:
    return open_train_cache(run).read("train", ROWS)


@pytest.mark.parametrize("mode", ["cached_hidden_states", "cached_topk"])
def test_both_backends_write_the_same_cache(
    mode: str, processes: list[Any], tiny_llama_untied: Path, tmp_path: Path
) -> None:
    """In three shards and batches of a few samples, and with all but one shard written again."""
    config = {"shards": 3, "max_batch_tokens": 130}
    expected = write_cache(tmp_path / "a", tiny_llama_untied, mode=mode)
    run = write_cache(tmp_path / "b", tiny_llama_untied, mode=mode, backend="vllm", **config)
    if mode == "cached_hidden_states":
        torch.testing.assert_close(cached(run), cached(expected), rtol=1e-4, atol=1e-5)
        for name in ("model.safetensors", "head.json"):
            heads = [open_train_cache(r).directory / "head" / name for r in (run, expected)]
            assert heads[0].read_bytes() == heads[1].read_bytes()
    else:
        assert (cached(run) == cached(expected)).float().mean() > 0.9  # bytes of records
    manifest = cache_manifest(run)
    assert manifest.info["backend"] == "vllm"
    assert manifest.info["batch_invariance"]["largest_difference"] < 1e-5
    assert len(processes) == 1 and processes[0].wait(30) == 0


def test_ids_are_mapped_and_any_tokens_may_train(
    processes: list[Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """Turns that train in the middle of a sample, samples without such tokens, other ids."""
    run, draw = write_data(tmp_path / "run"), np.random.default_rng(1)
    sequences = [draw.integers(2, 300, length).tolist() for length in (12, 9, 1, 30)]
    masks = [draw.random(len(sequence)) < 0.4 for sequence in sequences]
    masks[1][:] = False
    masks[2][:] = True
    split: Any = SimpleNamespace(
        name="train",
        total_tokens=np.array([12, 9, 1, 30]),
        loss_tokens=np.array([mask[1:].sum() for mask in masks]),
        tokens=lambda row: np.array(sequences[row], np.uint32),
        loss_mask=lambda row: masks[row],
    )
    vocab = VocabMap(320, teacher_ids=torch.from_numpy(draw.permutation(320)))
    factory = SourceFactory(
        TeacherConfig(model=str(tiny_llama), ds_config=None),
        str(tiny_llama),
        vocab,
        TeacherCacheConfig(),
        max(LENGTHS),
        load_recipe_model,
    )
    found = {}
    for backend in ("transformers", "vllm"):
        with factory.open(backend, train_split(run)) as source:  # type: ignore[arg-type]
            parts = list(source.states(split, np.arange(4)))
        assert np.concatenate([rows for rows, _ in parts]).tolist() == [0, 1, 2, 3]
        found[backend] = torch.cat([states for _, states in parts])
    assert len(found["vllm"]) == split.loss_tokens.sum() > 0
    torch.testing.assert_close(found["vllm"], found["transformers"], rtol=1e-4, atol=1e-5)


def test_a_process_that_dies_is_one_sentence_and_keeps_finished_shards(
    processes: list[Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of four samples is five calls, and the first shard the sixth."""
    monkeypatch.setenv("HIDDEN_STATE_CHILD", "dies:7")
    with pytest.raises(
        ResourceError,
        match=r"^the process that runs the teacher in vLLM ended with code 9: its error message is "
        r"above; teacher_cache.backend=transformers works without it$",
    ):
        write_cache(tmp_path, tiny_llama, backend="vllm", shards=3)
    folder = RunDirectory(tmp_path).teacher_cache
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/train-00000-*")}
    assert len(first) == 3 and not list(folder.glob("*/train-00001-*.manifest.json"))
    monkeypatch.delenv("HIDDEN_STATE_CHILD")
    run = write_cache(tmp_path, tiny_llama, backend="vllm", shards=3)
    assert read_manifest(run.teacher_cache)
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_a_refused_model_is_one_sentence(
    processes: list[Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN_STATE_CHILD", "refuses")
    with pytest.raises(ResourceError, match=r"^vLLM cannot open the model \(unknown quantization"):
        write_cache(tmp_path, tiny_llama, backend="vllm")
    assert processes[0].wait(30) == 0


def test_a_full_disk_ends_the_process(
    processes: list[Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheShard, "write", fail)
    with pytest.raises(ResourceError, match=r"^the disk is full while writing .*00001.bin: free"):
        write_cache(tmp_path, tiny_llama, backend="vllm")
    assert processes[0].wait(30) is not None


def test_states_of_another_layer_are_found(
    processes: list[Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN_STATE_CHILD", "layer")
    with pytest.raises(
        ModelError,
        match=r"^cache-teacher: the teacher in vLLM: .* in transformers, .* nats a token apart.*: "
        r"set teacher_cache.backend=transformers$",
    ):
        write_cache(tmp_path, tiny_llama, backend="vllm")


@pytest.mark.parametrize("selected", ["online", "cached_hidden_states"])
def test_auto_measures_the_online_teacher(
    selected: str,
    processes: list[Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a cache needs an engine."""
    monkeypatch.setattr(mode_selection, "select_mode", lambda costs: (selected, "a test"))
    run = write_cache(tmp_path, tiny_llama, mode="auto", backend="vllm")
    manifest = read_manifest(run.teacher_cache)
    assert manifest and manifest.info["mode"] == selected
    assert len(processes) == (selected != "online")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_process_sends_the_dtype_of_the_model(dtype: str) -> None:
    states = torch.randn(3, 8).to(getattr(torch, dtype))
    data = states.view(torch.uint8).numpy()
    assert torch.equal(torch.from_numpy(data).view(getattr(torch, dtype)), states)


@pytest.mark.parametrize(
    ("ranks", "size", "engines"), [(4, 1, [0, 1, 2, 3]), (4, 2, [0, 2]), (4, 4, [0])]
)
def test_ranks_share_the_engines(
    ranks: int, size: int, engines: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    found = []
    for rank in range(ranks):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found += [rank] if first_of_group(size) else []
    assert found == engines

    # Every row goes to one engine, and all ranks have as many batches.
    source = object.__new__(VllmSource)
    source.engines = {rank: number for number, rank in enumerate(engines)}
    source.max_tokens = 100
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    batches = source.assign(lengths)
    assert len({len(batches_of_rank) for batches_of_rank in batches}) == 1
    assert sorted(np.concatenate([np.concatenate(rows) for rows in batches])) == list(range(50))
    tokens = [sum(int(lengths[batch].sum()) for batch in rows) for rows in batches]
    assert {rank for rank in range(ranks) if tokens[rank]} == set(engines)
    assert max(tokens) <= 1.2 * sum(tokens) / len(engines)


def test_a_group_that_does_not_fit_the_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(RecipeError, match="tensor_parallel_size=4 does not divide the 6 ranks"):
        first_of_group(4)
