"""The hidden states that vLLM caches are those of transformers, for each family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from teacher_cache_runs import (
    LENGTHS,
    TEMPERATURES,
    cache_manifest,
    open_train_cache,
    sequences,
    train_split,
    write_cache,
)
from torch import Tensor
from torch.nn import functional

from pocl_ds.data.batches import collate
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.load import load_model
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.workflow.run_dir import RunDirectory

pytestmark = pytest.mark.vllm

TESTS = Path(__file__).resolve().parents[2]
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gemma2", "qwen3_moe"]
REFUSED = "refused"
ROWS = tuple(range(len(LENGTHS)))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family with the model and its cache by vLLM; refused.json has the message
    about a model with a quantization that vLLM's CPU engine does not have.
    """
    folder = tmp_path_factory.mktemp("caches")
    for seed, family in enumerate(FAMILIES):
        tiny_models.family(folder / family / "model", family, layers=2, seed=seed)
    model = shutil.copytree(folder / "llama" / "model", folder / REFUSED / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps(config))

    names = [str(folder / name) for name in (*FAMILIES, REFUSED)]
    completed = subprocess.run(
        [sys.executable, "-m", "vllm_cache_worker", str(folder / "refused.json"), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return folder


def open_cache(run: RunDirectory) -> tuple[CachedTeacher, Tensor]:
    cache = open_train_cache(run)
    return CachedTeacher(cache), cache.read("train", ROWS)


def loss_and_gradient(
    teacher: CachedTeacher, states: Tensor, student: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean forward KL to a student with some logits [n, V], and its gradient in them."""
    logits = student.clone().requires_grad_()
    with torch.no_grad(), teacher.head() as head:
        assert isinstance(head, OutputHead)
        log_p = (head.logits(states) / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    loss = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_cache_the_same_states(family: str, caches: Path, tmp_path: Path) -> None:
    """Equal up to rounding, as are loss and gradient; the states before the last layer or before
    the final norm, or those of the next position, are not.
    """
    model = caches / family / "model"
    vllm_run = RunDirectory(caches / family / "vllm")
    vllm_teacher, vllm_states = open_cache(vllm_run)
    teacher, states = open_cache(write_cache(tmp_path, model))
    assert vllm_states.dtype == states.dtype == torch.float32
    torch.testing.assert_close(vllm_states, states, rtol=1e-5, atol=2e-5)

    # Nothing that one could take by mistake is as close.
    batch = collate(train_split(vllm_run), ROWS)
    wrong: dict[str, Tensor] = {}
    layers: list[Tensor] = []
    loaded: Any = load_model(str(model))
    for module in loaded.modules():
        if type(module).__name__.endswith(("DecoderLayer", "GPT2Block")):
            module.register_forward_hook(
                lambda _, __, output: layers.append(
                    output if torch.is_tensor(output) else output[0]
                )
            )
    with torch.no_grad():
        loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for name, layer in zip(("the first layer", "the last layer"), layers, strict=True):
        wrong[name] = batch.at_loss_positions(layer)
    wrong["the next position"] = vllm_states.roll(-1, 0)
    for name, others in wrong.items():
        if others.shape == states.shape:  # OPT projects the output of its last layer
            assert float((others - states).abs().mean()) > 0.1, name

    # The same loss and gradient, at each temperature.
    student = torch.randn(len(states), 320, generator=torch.Generator().manual_seed(0))
    for temperature in TEMPERATURES:
        loss, gradient = loss_and_gradient(teacher, states, student, temperature)
        vllm_loss, vllm_gradient = loss_and_gradient(
            vllm_teacher, vllm_states, student, temperature
        )
        assert float(loss) > 0.1
        torch.testing.assert_close(vllm_loss, loss, rtol=1e-5, atol=0.0)
        difference = (vllm_gradient - gradient).norm() / gradient.norm()
        assert float(difference) < 1e-5
    manifest = cache_manifest(vllm_run)
    assert manifest.info["backend"] == "vllm"
    assert manifest.info["batch_invariance"]["largest_difference"] < 1e-4


def test_a_model_that_vllm_refuses_is_one_sentence(caches: Path) -> None:
    messages = json.loads((caches / "refused.json").read_text())
    assert list(messages) == [REFUSED]
    assert messages[REFUSED].startswith(f"vLLM cannot open {caches / REFUSED / 'model'} (")
    assert messages[REFUSED].endswith("or choose the slower teacher_cache.backend=transformers")


def test_a_process_next_to_the_rank_fills_a_cache_of_records(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The complete way: an engine in its own process, in shards, with top-k records."""
    options: dict[str, Any] = {"mode": "cached_topk", "shards": 2}
    run = write_cache(tmp_path / "a", tiny_llama, backend="vllm", **options)
    other = write_cache(tmp_path / "b", tiny_llama, **options)
    found = []
    for each in (run, other):
        teacher, records = open_cache(each)
        codec = teacher.cache.codec
        assert codec is not None
        found.append(codec.unpack(records))
    tokens = sum(len(ids) for ids in sequences()) - 5 * len(LENGTHS)
    assert len(found[0][1]) == tokens and torch.equal(found[0][1], found[1][1])
    for place in (0, 2):
        torch.testing.assert_close(found[0][place], found[1][place], rtol=1e-4, atol=2e-3)
