"""Steps that train only adapters equal those of plain PyTorch and peft; checkpoints hold only
adapters.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from pocl_ds.config import LoraConfig, TrainConfig
from pocl_ds.data.batches import Batch
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.errors import ArtifactError
from pocl_ds.losses import divergence
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.load import load_model
from pocl_ds.models.lora import add_adapters
from pocl_ds.models.vocab import VocabMap
from pocl_ds.training.seeding import seed_micro_batch
from pocl_ds.training.student import Student

peft = pytest.importorskip("peft")
SIZE, TEMPERATURE, SFT_RATIO, PROMPT, STEPS = 320, 1.5, 0.3, 4, 3
LORA = LoraConfig(r=4, alpha=8, dropout=0.2, target_modules=("q_proj", "down_proj"))
TRAIN = TrainConfig(lr=1e-2, weight_decay=0.1)


def tokens(step: int) -> torch.Tensor:
    return torch.randint(2, SIZE, (1, 20), generator=torch.Generator().manual_seed(step))


def batch_of(ids: torch.Tensor) -> Batch:
    labels = ids[0, PROMPT:]
    positions = torch.arange(PROMPT - 1, ids.shape[1] - 1)
    return Batch(
        ids,
        torch.ones_like(ids),
        None,
        None,
        positions,
        labels,
        torch.zeros_like(labels),
        (0,),
        "train",
    )


def build_engine(folder: Path) -> TorchEngine:
    model = load_model(str(folder), attention=PER_SAMPLE)
    add_adapters(model, LORA, seed=7)
    return TorchEngine(Student(model, VocabMap(SIZE), chunk_bytes=1 << 20).train(), TRAIN)


def run(engine: TorchEngine, teacher: Any) -> None:
    for step in range(STEPS):
        batch = batch_of(tokens(step))
        with torch.no_grad():
            hidden = batch.at_loss_positions(hidden_states(teacher, *batch.inputs))
        seed_micro_batch(0, step, 0)
        total, *_ = engine.forward(
            batch, LossTerms("fkl", TEMPERATURE, SFT_RATIO), hidden, output_head(teacher)
        )
        engine.backward(total, normalizer=batch.labels.numel(), is_last=True)
        assert math.isfinite(engine.step(TRAIN.lr))


def test_steps_are_those_of_plain_peft(tiny_llama: Path, tiny_llama_untied: Path) -> None:
    teacher: Any = load_model(str(tiny_llama_untied))
    engine = build_engine(tiny_llama)
    run(engine, teacher)

    base: Any = load_model(str(tiny_llama))
    targets = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "down_proj"))]
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=targets)
    torch.manual_seed(7)
    plain = peft.get_peft_model(base, settings).train()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=TRAIN.lr, betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    )
    for step in range(STEPS):
        ids = tokens(step)
        with torch.no_grad():
            target = teacher(input_ids=ids).logits[0, PROMPT - 1 : -1, :SIZE]
        seed_micro_batch(0, step, 0)
        logits = plain(input_ids=ids).logits[0, PROMPT - 1 : -1, :SIZE]
        ce = functional.cross_entropy(logits, ids[0, PROMPT:])
        (
            SFT_RATIO * ce
            + (1 - SFT_RATIO) * divergence("fkl", logits, target, temperature=TEMPERATURE)
        ).backward()
        torch.nn.utils.clip_grad_norm_(trained, TRAIN.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    adapted = dict(engine.module.model.named_parameters())
    reference = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in plain.named_parameters()
    }
    initial = dict(build_engine(tiny_llama).module.model.named_parameters())
    assert adapted.keys() == reference.keys()
    for name, parameter in adapted.items():
        torch.testing.assert_close(parameter, reference[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(parameter, initial[name]) == ("lora_" not in name)
        assert parameter.grad is None


def test_a_checkpoint_holds_adapters_alone(
    tiny_llama: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    teacher = load_model(str(tiny_llama_untied))
    uninterrupted, stopped = build_engine(tiny_llama), build_engine(tiny_llama)
    run(uninterrupted, teacher)
    run(stopped, teacher)
    stopped.snapshot(tmp_path, copy=True)()
    saved = torch.load(tmp_path / "torch.pt", weights_only=True)["module"]
    assert saved and all("lora_" in name for name in saved)
    again = build_engine(tiny_llama)
    again.load(tmp_path)
    state = uninterrupted.module.state_dict()
    assert all(torch.equal(part, state[name]) for name, part in again.module.state_dict().items())

    full = TorchEngine(
        Student(
            load_model(str(tiny_llama), attention=PER_SAMPLE), VocabMap(SIZE), chunk_bytes=1 << 20
        ),
        TRAIN,
    )
    with pytest.raises(
        ArtifactError, match=r"the checkpoint and the student differ in .*remove the checkpoint"
    ):
        full.load(tmp_path)
