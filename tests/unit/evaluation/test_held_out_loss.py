"""Held-out measures in detail: masked ids, chunks, faults that must not become numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import RecipeError
from pocl_ds.evaluation import evaluate
from pocl_ds.evaluation import held_out_loss as room
from pocl_ds.evaluation.benchmarks import check_names, chosen
from pocl_ds.models.heads import OutputHead
from pocl_ds.workflow.run_dir import RunDirectory


def head(rows: int, width: int) -> OutputHead:
    return OutputHead(nn.Parameter(torch.randn(rows, width)), None, 1.0, None)


@pytest.mark.parametrize("chunk", [1, 1 << 12, 1 << 28])
def test_masked_ids_add_nothing_and_chunks_change_nothing(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(room, "CHUNK_BYTES", chunk)
    student, teacher = head(30, 5), head(24, 7)
    hidden, other = torch.randn(11, 5), torch.randn(11, 7)
    masked = torch.zeros(24, dtype=torch.bool)
    masked[[3, 20]] = True
    labels = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 23])
    loss, kl = room.token_sums(hidden, student, labels, room.Ids(24, masked), other, teacher)
    kept = (~masked).nonzero()[:, 0]
    q, p = (
        (h.double() @ w.weight.double().T)[:, kept].log_softmax(-1)
        for h, w in ((hidden, student), (other, teacher))
    )
    place = torch.tensor([int((kept == label).nonzero()) for label in labels])
    assert loss == pytest.approx(float(-q[torch.arange(11), place].sum()), rel=1e-5)
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_a_broken_model_gives_no_number(run: RunDirectory) -> None:
    student, teacher = head(8, 4), head(8, 4)
    hidden = torch.full((2, 4), float("nan"))
    loss, kl = room.token_sums(
        hidden, student, torch.tensor([1, 2]), room.Ids(8, None), torch.ones(2, 4), teacher
    )
    assert loss != loss and kl != kl  # NaN is never taken for 0


def test_a_limit_takes_ids_by_hash_not_by_place(
    run: RunDirectory, configured: Callable[..., EvaluateConfig], prompt: PromptConfig
) -> None:
    ids = [f"s{i}" for i in range(50)]
    few = [ids[i] for i in chosen(ids, 5)]
    assert few != ids[:5] and sorted(few) == sorted(ids[::-1][i] for i in chosen(ids[::-1], 5))
    assert set(few) < {ids[i] for i in chosen(ids, 9)}  # a larger limit adds
    assert len(TokenizedSplit.open(run.data, "test")) > 6
    evaluate.held_out(
        run, configured(samples=6), prompt, {"initial": evaluate.model_path(run, "initial")}
    )
    assert not [
        path for path in run.evaluation.iterdir() if path.name.startswith(".")
    ]  # hidden states are cleaned up


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_benchmark_names_are_file_names(name: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks"):
        check_names([name])
