"""Held-out loss in detail: masked ids, chunks, NaN, choice of samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import RecipeError
from pocl_ds.evaluation import held_out_loss
from pocl_ds.evaluation.benchmarks import check_benchmark_names
from pocl_ds.evaluation.evaluated_models import model_path
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.files import read_json
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
    loss, kl = held_out_loss.token_losses(
        hidden, student, labels, VocabMap(24, masked), teacher_hidden, teacher
    )
    shared = (~masked).nonzero()[:, 0]
    q, p = (
        (h.double() @ w.weight.double().T)[:, shared].log_softmax(-1)
        for h, w in ((hidden, student), (teacher_hidden, teacher))
    )
    columns = torch.tensor([int((shared == label).nonzero()) for label in labels])
    assert loss.tolist() == pytest.approx((-q[torch.arange(11), columns]).tolist(), rel=1e-5)
    assert kl.tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-5)


def test_nan_hidden_states_give_nan(run: RunDirectory) -> None:
    student, teacher = head(8, 4), head(8, 4)
    hidden = torch.full((2, 4), float("nan"))
    loss, kl = held_out_loss.token_losses(
        hidden, student, torch.tensor([1, 2]), VocabMap(8, None), torch.ones(2, 4), teacher
    )
    assert loss.isnan().all() and kl.isnan().all()


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


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_teacher_with_its_own_prompts_reads_them(
    run: RunDirectory,
    make_config: Callable[..., EvaluateConfig],
    prompt: PromptConfig,
    tmp_path: Path,
) -> None:
    """Against float64 over full logits: the student's prompt in the student, and in the teacher the
    prompt of its own template, with the same response.
    """
    teacher = tmp_path / "own"
    shutil.copytree(model_path(run, "teacher"), teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(teacher)
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "q", "output": "an answer"}))
    paths = {"teacher": str(teacher), "initial": model_path(run, "initial")}
    chat = prompt.model_copy(update={"template": "chat"})
    student_tokenizer = AutoTokenizer.from_pretrained(paths["initial"])
    student_tokenizer.chat_template = CHAT_TEMPLATE.replace("<", "[")
    initial = tmp_path / "initial"
    shutil.copytree(paths["initial"], initial)
    student_tokenizer.save_pretrained(initial)
    paths["initial"] = str(initial)
    config = make_config(max_samples=4, benchmarks={"b": str(tmp_path / "b.jsonl")})
    held_out_loss.measure_held_out_loss(run, config, chat, paths, teacher_template="own")
    losses = read_json(run.evaluation / "held_out_loss.json")

    own = SampleTokenizer(tokenizer, chat)
    split = TokenizedSplit.open(run.data, "test")
    samples = list(read_sample_file(run.data / "test.jsonl"))
    models = [
        AutoModelForCausalLM.from_pretrained(paths[name]).double().eval()
        for name in ("initial", "teacher")
    ]
    kl, count = 0.0, 0
    expected = dict[str, list[float]]()  # tokens, loss and KL of each sample
    for row in select_by_hash(split.ids, 4):
        start = int(split.prompt_tokens[row])
        response = split.tokens(row)[start:].astype("int64").tolist()
        prompts = [split.tokens(row)[:start].tolist(), own.tokenize_prompt(samples[row])]
        with torch.no_grad():
            q, p = (
                model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1, :320]
                for model, ids in zip(models, prompts, strict=True)
            )
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        count += len(response)
        loss = -q.gather(-1, torch.tensor(response)[:, None]).sum()
        expected[bytes(split.ids[row]).decode()] = [
            len(response),
            float(loss),
            float((p.exp() * (p - q)).sum()),
        ]
    stored = losses["initial"]["samples"]
    assert sorted(stored["ids"]) == sorted(expected)
    for name, *sums in zip(*(stored[key] for key in ("ids", "tokens", "loss", "kl")), strict=True):
        assert sums == pytest.approx(expected[name], rel=1e-4)
    assert losses["initial"]["tokens"] == count
    assert losses["initial"]["kl"] == pytest.approx(kl / count, rel=1e-5)
    assert losses["initial"]["benchmarks"]["b"]["kl"] > 0

    # The student's prompts are another measurement, so the result is not reused.
    held_out_loss.measure_held_out_loss(run, config, chat, paths)
    of_student = read_json(run.evaluation / "held_out_loss.json")["initial"]
    assert of_student["loss"] == pytest.approx(losses["initial"]["loss"], rel=1e-6)
    assert of_student["kl"] != pytest.approx(kl / count, rel=1e-3)


@pytest.mark.parametrize("mode", ["escape", "drop"])
def test_special_tokens_in_references_are_ordinary_text(
    mode: str,
    run: RunDirectory,
    make_config: Callable[..., EvaluateConfig],
    prompt: PromptConfig,
    tmp_path: Path,
) -> None:
    """No item is dropped, and the text of EOS inside a reference costs more than one token."""
    path = model_path(run, "initial")
    eos = AutoTokenizer.from_pretrained(path).eos_token
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"instruction": "q", "output": f"one {eos} two"}) + "\n"
    )
    config = make_config(benchmarks={"b": str(tmp_path / "b.jsonl")})
    tokens = []
    for setting in ("allow", mode):
        held_out_loss.measure_held_out_loss(
            run,
            config,
            prompt,
            {"initial": path},
            special_tokens_in_text=setting,  # type: ignore[arg-type]
        )
        losses = read_json(run.evaluation / "held_out_loss.json")
        tokens.append(losses["initial"]["benchmarks"]["b"]["tokens"])
    assert tokens[1] > tokens[0]
