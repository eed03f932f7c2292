"""Settings of the engines: timeouts of process groups, and buffers that stay in float32."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.distributed import distributed_c10d
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_ds.config import TrainConfig
from pocl_ds.config.ds_config import resolve_student, resolve_teacher
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, sharded_loading, start_deepspeed
from pocl_ds.engines.frozen_model import FrozenModel
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.models.load import load_model
from pocl_ds.runtime.distributed import PROCESS_GROUP_TIMEOUT

pytestmark = pytest.mark.usefixtures("single_rank")


def group_timeouts() -> set[timedelta]:
    """Timeouts of all process groups, and of a new one."""
    dist.new_group([0])
    return {
        group._get_backend(torch.device("cpu")).options._timeout
        for group in distributed_c10d._world.pg_map
    }


@pytest.mark.parametrize("hang_timeout_seconds", [1800.0, 31_536_000.0])
@pytest.mark.parametrize("name", ["torch", "student_zero3", "student_zero2"])
def test_ranks_wait_longer_than_the_watchdog(name: str, hang_timeout_seconds: float) -> None:
    """In every group: DeepSpeed creates further groups after it has loaded the teacher."""
    start_deepspeed()
    frozen = resolve_teacher("teacher_zero3", dtype="float32", ranks=2, micro_batch_size=1)
    assert frozen is not None
    FrozenModel(nn.Linear(4, 4), {**frozen, "train_batch_size": 1})
    assert min(group_timeouts()) >= timedelta(seconds=PROCESS_GROUP_TIMEOUT)
    train = TrainConfig(batch_size=1, micro_batch_size=1, hang_timeout_seconds=hang_timeout_seconds)
    engine: Any = (
        TorchEngine(nn.Linear(4, 4), train)
        if name == "torch"
        else DeepSpeedEngine(
            nn.Linear(4, 4), train, resolve_student(name, train=train, dtype="float32", ranks=1)
        )
    )
    assert min(group_timeouts()) > timedelta(seconds=hang_timeout_seconds + 60)
    engine.backward(engine.forward(torch.ones(1, 4)).sum(), normalizer=1, is_last=True)
    engine.step(1e-3)
    dist.barrier()


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
}
DEEPSEEK = {
    **SMALL,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "llama",
            "qwen2",
            "mistral",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "granite",
            "cohere",
        ),
        SMALL,
    ),
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "gptj": {"n_embd": 64, "n_head": 2, "n_layer": 2, "rotary_dim": 16},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 2},
    "deepseek_v3": DEEPSEEK,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_a_sharded_model_equal_those_of_a_complete_one(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Rotary frequencies, and weights that a model keeps in float32 (DeepSeek's routing bias)."""
    if dtype == "float16" and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed supports no float16 on this machine's device")
    start_deepspeed()
    config = AutoConfig.for_model(
        family, vocab_size=128, bos_token_id=0, eos_token_id=0, pad_token_id=1, **FAMILIES[family]
    )
    model = AutoModelForCausalLM.from_config(config)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.normal_()
    model.save_pretrained(tmp_path)
    unsharded = dict(load_model(str(tmp_path), dtype=dtype).named_buffers())
    frozen = resolve_teacher("teacher_zero3", dtype=dtype, ranks=2, micro_batch_size=1)
    assert frozen is not None
    with sharded_loading({**frozen, "train_batch_size": 1}):
        sharded = load_model(str(tmp_path), dtype=dtype)
    FrozenModel(sharded, {**frozen, "train_batch_size": 1})
    buffers = dict(sharded.named_buffers())
    assert buffers.keys() == unsharded.keys() and hasattr(next(sharded.parameters()), "ds_id")
    for name, buffer in unsharded.items():
        assert buffers[name].dtype == buffer.dtype and buffers[name].equal(buffer), name


def test_logits_of_a_sharded_student_equal_those_of_its_export(tiny_llama: Path) -> None:
    """Also if a ds_config names further modules that stay in float32, or none."""
    start_deepspeed()
    train = TrainConfig(batch_size=1, micro_batch_size=1)
    config = resolve_student("student_zero3", train=train, dtype="bfloat16", ranks=1)
    unsharded = load_model(str(tiny_llama), dtype="bfloat16")
    ids = torch.randint(2, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    for names in ("auto", [], ["norm"]):
        config["data_types"]["keep_in_fp32_modules"] = names
        with sharded_loading(config):
            model = load_model(str(tiny_llama), dtype="bfloat16")
        engine: Any = DeepSpeedEngine(model, train, config)
        with torch.no_grad():
            assert engine.forward(ids).logits.equal(unsharded(ids).logits)


@pytest.mark.parametrize("name", ["student_zero3", "student_zero2"])
def test_master_weights_are_those_of_the_optimizer(name: str, tiny_llama: Path) -> None:
    """They are gathered from its float32 partition, and the weights of the forward pass are their
    roundings; frozen weights have no master.
    """
    start_deepspeed()
    train = TrainConfig(batch_size=1, micro_batch_size=1, max_grad_norm=100)
    config = resolve_student(name, train=train, dtype="bfloat16", ranks=1)
    with sharded_loading(config):
        model: Any = load_model(str(tiny_llama), dtype="bfloat16").train()
    frozen = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    engine: Any = DeepSpeedEngine(model, train, config)
    ids = torch.randint(2, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.backward(engine.forward(ids, labels=ids).loss, normalizer=1, is_last=True)
        engine.step(1e-4)
    master, rounded = engine.gathered_master_state_dict(model), engine.gathered_state_dict(model)
    assert master.keys() == rounded.keys()
    assert {weight.dtype for weight in master.values()} == {torch.float32}
    for key, weight in rounded.items():
        assert weight.dtype == torch.bfloat16 and weight.equal(master[key].bfloat16()), key
    assert master[frozen].equal(rounded[frozen].float())

    # The optimizer's partition holds the same numbers, besides padding.
    optimizer = engine.engine.optimizer
    groups = (
        optimizer.fp32_partitioned_groups_flat
        if name == "student_zero3"
        else optimizer.single_partition_of_fp32_groups
    )
    expected = torch.cat([group.detach().flatten() for group in groups]).sort().values
    trained = [weight.flatten() for key, weight in master.items() if key != frozen]
    values = torch.cat(trained).sort().values
    assert len(expected) - len(values) < 64
    assert set(values.tolist()) - {0.0} == set(expected.tolist()) - {0.0}
    assert not values.equal(values.bfloat16().float()), "nothing was lost by rounding"
