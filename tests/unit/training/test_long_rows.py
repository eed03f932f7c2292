"""Long rows: no tensor of a step has as many numbers as tokens x tokens or tokens x vocabulary, and
tiles and offloading change no gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_families import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocl_ds.config import TrainConfig
from pocl_ds.data.batches import Batch
from pocl_ds.errors import ModelError
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models import attention
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.vocab import VocabMap
from pocl_ds.training.compilation import prepare_layers
from pocl_ds.training.student import Student

TOKENS, VOCABULARY = 2048, 4096
LONG = {"max_position_embeddings": TOKENS, "vocab_size": VOCABULARY, "n_positions": TOKENS}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", {"sliding_window": 100, "attn_logit_softcapping": 1.5}),
]


class LargestTensor(TorchDispatchMode):
    """Records the largest result of an operation, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.size = max([self.size, *sizes])
        return result


def row(tokens: int) -> Batch:
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(
        input_ids=ids,
        attention_mask=None,
        position_ids=torch.arange(tokens)[None],
        lengths=(tokens,),
        positions=torch.arange(tokens - 1),
        labels=ids[0, 1:],
        sample_of_token=torch.zeros(tokens - 1, dtype=torch.int64),
        rows=(0,),
        split="train",
    )


def step(model: Any, batch: Batch, train: TrainConfig, *, offload: bool = False) -> list[Tensor]:
    """The gradients of a step with the model as its own teacher at another temperature."""
    teacher = copy.deepcopy(model)
    for part in (model, teacher):
        prepare_layers(part, train)
    student = Student(model, VocabMap(VOCABULARY), chunk_bytes=1 << 20, offload=offload)
    with torch.no_grad():
        outputs = batch.at_loss_positions(hidden_states(teacher, *batch.inputs)) * 1.1
    terms = LossTerms("fkl", 1.5, 0.3)
    total, _, _ = student(batch, terms, outputs, output_head(teacher))
    model.zero_grad()
    total.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("family", "extra"), FAMILIES)
def test_no_tensor_is_quadratic(
    family: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    model = make_model(family, {**LONG, **extra})
    model.set_attn_implementation(PER_SAMPLE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with LargestTensor() as largest:
        step(model.train(), row(TOKENS), TrainConfig(mlp_tile_tokens=256, engine="torch"))
    assert 0 < largest.size < TOKENS * min(TOKENS, VOCABULARY) / 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "extra"), [*FAMILIES, ("gpt2", GPT2)])
def test_tiles_blocks_and_offloading_change_no_gradient(
    family: str, extra: dict[str, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for tile, block, offload in ((None, 1024, False), (50, 64, True)):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        model = make_model(family, {**LONG, **extra})
        model.set_attn_implementation(PER_SAMPLE)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train = TrainConfig(mlp_tile_tokens=tile, engine="torch")
        gradients.append(step(model.train(), row(230), train, offload=offload))
    largest = max(float(value.abs().max()) for value in gradients[0])
    for value, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_layers_without_a_dense_mlp_are_refused(family: str) -> None:
    fields = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    model = make_model(family, fields)
    with pytest.raises(ModelError, match="DecoderLayer has no dense MLP of its own"):
        prepare_layers(model, TrainConfig(mlp_tile_tokens=8, engine="torch"))
