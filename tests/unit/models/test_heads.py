"""Backbone and output head together give the model's own logits, for each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import FAMILIES, make_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import pocl_ds.models.load  # noqa: F401  # registers the attention `per_sample`
from pocl_ds.data.batches import Batch
from pocl_ds.errors import ModelError
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models import attention
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.attention_choice import ONE_BY_ONE, PADDED
from pocl_ds.models.heads import (
    LOGIT_SCALES,
    OutputHead,
    has_known_head,
    hidden_states,
    output_head,
)
from pocl_ds.models.vocab import VocabMap
from pocl_ds.training.student import Student


@pytest.mark.parametrize(
    ("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_head_equals_the_models_logits(family: str, extra: dict[str, Any]) -> None:
    model = make_model(family, extra)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        hidden = hidden_states(model, ids, mask)
        results = output_head(model).logits(hidden[mask.bool()])
    assert expected.std() > 0.01
    torch.testing.assert_close(results, expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [ONE_BY_ONE, PADDED], ids=["one by one", "one call"])
@pytest.mark.parametrize(
    ("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_per_sample_attention_equals_the_models(
    family: str, extra: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded and packed, values and gradients, against the model's eager attention with its masks;
    also with learned positions, sliding windows and capped scores.
    """
    monkeypatch.setattr(attention, "kernel_for", lambda call: kernel)
    if family in ("mistral", "phi3", "gemma2", "cohere2", "qwen2"):
        extra = {"sliding_window": 4, **extra} | (
            {"attn_logit_softcapping": 1.5} if family == "gemma2" else {}
        )
        extra |= {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = make_model(family, extra)
    lengths = (9, 1, 6, 7)
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    is_token = mask.bool()
    row, places = ids[is_token][None], torch.cat([torch.arange(length) for length in lengths])[None]
    results = {}
    for name, backend in (("eager", "eager"), ("padded", PER_SAMPLE), ("packed", PER_SAMPLE)):
        model.set_attn_implementation(backend)
        packed = name == "packed"
        states = (
            hidden_states(model, row, None, places, lengths)[0]
            if packed
            else hidden_states(model, ids, mask)[is_token]
        )
        model.zero_grad()
        states.square().sum().backward()
        results[name] = [
            states.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
    # Some gradients are 0 up to rounding.
    largest = max(float(tensor.abs().max()) for tensor in results["eager"])
    for name in ("padded", "packed"):
        for per_sample, reference in zip(results[name], results["eager"], strict=True):
            torch.testing.assert_close(per_sample, reference, rtol=1e-4, atol=1e-5 * largest)


def test_per_sample_attention_refuses_generation() -> None:
    model = make_model("llama", {})
    model.set_attn_implementation(PER_SAMPLE)
    with pytest.raises(
        ValueError, match="attn_implementation=per_sample is for training: generate with sdpa"
    ):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    ("family", "scale", "soft_cap"),
    [("granite", 1 / 8, None), ("cohere", 1 / 16, None), ("gemma2", 1.0, 3.0), ("phi", 1.0, None)],
)
def test_scale_and_soft_cap_come_from_the_configuration(
    family: str, scale: float, soft_cap: float | None
) -> None:
    head = output_head(make_model(family, dict(FAMILIES)[family]))
    assert (head.scale, head.soft_cap) == (scale, soft_cap)
    assert (head.bias is not None) == (family == "phi")


def test_tied_head_is_the_embedding_itself() -> None:
    model = make_model("llama", {"tie_word_embeddings": True})
    assert output_head(model).weight is model.get_input_embeddings().weight


def test_hidden_states_go_through_the_backbones_forward_without_a_cache() -> None:
    model = make_model("llama", {})
    calls = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs["use_cache"], out)), with_kwargs=True
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    hidden_states(model, ids, torch.ones_like(ids))
    assert len(calls) == 1
    assert calls[0][0] is False
    assert calls[0][1].past_key_values is None


def test_quantized_head_is_refused() -> None:
    model = make_model("llama", {"tie_word_embeddings": False})
    model.hf_quantizer = object()
    assert output_head(model).weight is model.lm_head.weight  # only the other modules are quantized
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(300, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ModelError, match=r"output head of the quantized llama model is quantized too.*use a model"
    ):
        output_head(model)


@pytest.mark.parametrize(
    ("family", "extra"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 3.0}), ("phi", {})]
)
@pytest.mark.parametrize("packed", [False, True])
def test_identity_head_gives_equal_sums_and_gradients(
    family: str, extra: dict[str, Any], packed: bool
) -> None:
    """With a mask, and fewer ids than the head has rows."""
    results = []
    for split in (True, False):
        model = make_model(family, extra)
        model.set_attn_implementation(PER_SAMPLE)
        ids, positions, labels = (
            torch.arange(3, 15)[None],
            torch.tensor([2, 3, 9]),
            torch.tensor([4, 5, 80]),
        )
        places = torch.arange(12)[None] if packed else None
        batch = Batch(
            ids,
            None if packed else torch.ones_like(ids),
            places,
            (12,) if packed else None,
            positions,
            labels,
            torch.zeros(3, dtype=torch.int64),
            (0,),
            "train",
        )
        assert has_known_head(model)
        student = Student(
            model, VocabMap(90, torch.arange(90) == 7), chunk_bytes=1 << 20, split=split
        )
        teacher = OutputHead(torch.nn.Parameter(torch.eye(97)), None, 1.0, None)
        sums = student(
            batch,
            LossTerms("jsd", temperature=1.3, sft_ratio=0.4, options={"beta": 0.5}),
            torch.randn(3, 97, generator=torch.Generator().manual_seed(2)),
            teacher,
        )
        sums[0].backward()
        results.append([*sums, *(p.grad for p in model.parameters())])
    for split_gradient, full_gradient in zip(*results, strict=True):
        torch.testing.assert_close(split_gradient, full_gradient, rtol=1e-4, atol=1e-6)


def test_unknown_family_is_named() -> None:
    model = make_model("llama", {})
    model.config.model_type = "mystery"
    with pytest.raises(
        ModelError, match=r"'mystery' are not supported: use one of .*llama.*set loss.fused=false"
    ):
        output_head(model)


def test_every_known_family_supports_per_sample_attention() -> None:
    assert {family for family, _ in FAMILIES} == set(LOGIT_SCALES) == set(attention.FAMILIES)
    for family in LOGIT_SCALES:
        config = AutoConfig.for_model(family)
        assert MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend
        attention.check_attention(PER_SAMPLE, config)
    bloom = AutoConfig.for_model("bloom")
    with pytest.raises(
        ModelError,
        match="not tested with models of the family 'bloom'.*set their attn_implementation=eager",
    ):
        attention.check_attention(PER_SAMPLE, bloom)
    attention.check_attention("eager", bloom)


def test_attention_sinks_are_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="attention sinks.*set its attn_implementation=eager"):
        attention.per_sample(None, query, query, query, None, s_aux=torch.zeros(2))
