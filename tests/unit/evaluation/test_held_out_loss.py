"""Held-out loss in detail: masked ids, chunks, NaN, choice of samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import RecipeError
from pocl_ds.evaluation import held_out_loss
from pocl_ds.evaluation.benchmarks import check_benchmark_names
from pocl_ds.evaluation.evaluated_models import model_path
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.run_dir import RunDirectory


def head(rows: int, width: int) -> OutputHead:
    return OutputHead(nn.Parameter(torch.randn(rows, width)), None, 1.0, None)


@pytest.mark.parametrize("chunk", [1, 1 << 12, 1 << 28])
def test_masked_ids_add_nothing_and_chunks_change_nothing(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(held_out_loss, "CHUNK_BYTES", chunk)
    student, teacher = head(30, 5), head(24, 7)
    hidden, teacher_hidden = torch.randn(11, 5), torch.randn(11, 7)
    masked = torch.zeros(24, dtype=torch.bool)
    masked[[3, 20]] = True
    labels = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 23])
    loss, kl = held_out_loss.token_sums(
        hidden, student, labels, VocabMap(24, masked), teacher_hidden, teacher
    )
    shared = (~masked).nonzero()[:, 0]
    q, p = (
        (h.double() @ w.weight.double().T)[:, shared].log_softmax(-1)
        for h, w in ((hidden, student), (teacher_hidden, teacher))
    )
    columns = torch.tensor([int((shared == label).nonzero()) for label in labels])
    assert loss == pytest.approx(float(-q[torch.arange(11), columns].sum()), rel=1e-5)
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_nan_hidden_states_give_nan(run: RunDirectory) -> None:
    student, teacher = head(8, 4), head(8, 4)
    hidden = torch.full((2, 4), float("nan"))
    loss, kl = held_out_loss.token_sums(
        hidden, student, torch.tensor([1, 2]), VocabMap(8, None), torch.ones(2, 4), teacher
    )
    assert loss != loss and kl != kl


def test_samples_are_chosen_by_hash_and_temporary_files_are_removed(
    run: RunDirectory, make_config: Callable[..., EvaluateConfig], prompt: PromptConfig
) -> None:
    ids = [f"s{i}" for i in range(50)]
    chosen = [ids[i] for i in select_by_hash(ids, 5)]
    assert chosen != ids[:5]
    assert sorted(chosen) == sorted(ids[::-1][i] for i in select_by_hash(ids[::-1], 5))
    assert set(chosen) < {ids[i] for i in select_by_hash(ids, 9)}  # a larger limit adds
    assert len(TokenizedSplit.open(run.data, "test")) > 6
    held_out_loss.measure_held_out_loss(
        run, make_config(max_samples=6), prompt, {"initial": model_path(run, "initial")}
    )
    assert not [path for path in run.evaluation.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_benchmark_names_must_be_file_names(name: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks"):
        check_benchmark_names([name])
