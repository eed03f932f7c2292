"""Models whose rotary frequencies depend on length give a sample the numbers that it has alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.transformers_backend import TransformersGenerator
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer
from pocl_ds.models.log_probs import pad_sequences
from pocl_ds.models.rope import LengthDependence, length_dependence

BOUNDARY = 64  # of both models, in tokens
LENGTHS = (150, 30, 64, 65, 100, 40)
MODELS = pytest.mark.parametrize("name", ["longrope", "dynamic_ntk"])


@pytest.fixture
def folder(name: str, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{name}")
    return path


def sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[int(token) for token in draw.integers(2, 300, length)] for length in LENGTHS]


@cache
def alone(folder: Path) -> list[NDArray[np.float64]]:
    """Log-probabilities of each sequence by itself, in float64 and by a model that saw no other."""
    results = []
    for sequence in sequences():
        model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        with torch.no_grad():
            log_p = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        results.append(log_p[:-1].gather(1, torch.tensor(sequence)[1:, None])[:, 0].numpy())
    return results


def assert_as_alone(results: list[Any], folder: Path) -> None:
    for result, expected in zip(results, alone(folder), strict=True):
        np.testing.assert_allclose(result, expected, atol=2e-5)


def log_probs(model: Any, hidden: torch.Tensor, sequence: list[int]) -> NDArray[np.float32]:
    """Log-probabilities of a sequence after its first token, from its hidden states [T, d]."""
    log_p = output_head(model).logits(hidden[:-1]).log_softmax(-1)
    array: NDArray[np.float32] = log_p.gather(1, torch.tensor(sequence)[1:, None])[:, 0].numpy()
    return array


@MODELS
@torch.no_grad()
def test_padded_rows(folder: Path) -> None:
    model = load_model(str(folder))
    ids, mask = pad_sequences(sequences(), torch.device("cpu"))
    hidden = hidden_states(model, ids, mask)
    rows = zip(hidden, sequences(), strict=True)
    assert_as_alone([log_probs(model, row[: len(own)], own) for row, own in rows], folder)


@MODELS
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (1, 2, 5)])
@torch.no_grad()
def test_packed_rows(folder: Path, chosen: tuple[int, ...]) -> None:
    model, samples = load_model(str(folder), attention=PER_SAMPLE), sequences()
    lengths = tuple(len(samples[index]) for index in chosen)
    ids = torch.tensor([[token for index in chosen for token in samples[index]]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    parts = hidden_states(model, ids, None, positions, lengths)[0].split(lengths)
    for index, part in zip(chosen, parts, strict=True):
        expected = alone(folder)[index]
        np.testing.assert_allclose(log_probs(model, part, samples[index]), expected, atol=2e-5)


@MODELS
def test_gradients_are_the_sum_of_those_of_samples(folder: Path) -> None:
    model, gradients = load_model(str(folder)), []
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    for groups in ([sequences()], [[sequence] for sequence in sequences()]):
        model.zero_grad()
        for group in groups:
            ids, mask = pad_sequences(group, torch.device("cpu"))
            (hidden_states(model, ids, mask) * mask[..., None]).square().sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@MODELS
def test_scoring(folder: Path) -> None:
    """A second call, after the longest sequence, gives the same."""
    generator = open_transformers(folder)
    for _ in range(2):
        assert_as_alone(generator.log_probs(sequences(), [1] * len(LENGTHS)), folder)


@MODELS
@torch.no_grad()
def test_generation_beyond_the_boundary(folder: Path) -> None:
    """Every token of a batch is the one that a new forward pass over its prefix alone predicts."""
    generator, count = open_transformers(folder), 12
    long_ones = [sequence for sequence in sequences() if len(sequence) > 70]
    prompts = [sequence[:length] for sequence in long_ones for length in (20, 58, 60, 63, 64, 70)]
    responses = generator.generate_ids(prompts, SamplingParams(0.0, 1.0, count, 0))
    for prompt, response in zip(prompts, responses, strict=True):
        prefix = list(prompt)
        for token in response:
            model = load_model(str(folder)) if len(prefix) > BOUNDARY else generator.model
            hidden = hidden_states(model, torch.tensor([prefix]), torch.ones(1, len(prefix)).long())
            assert int(output_head(model).logits(hidden[0, -1:]).argmax()) == token
            prefix.append(token)


@MODELS
def test_samples_beyond_the_boundary_do_not_depend_on_their_batch(folder: Path) -> None:
    generator, sampling = open_transformers(folder), SamplingParams(1.0, 0.9, 12, 5)
    prompts = [sequence[:length] for sequence in sequences()[:1] for length in (60, 60, 63, 20, 70)]
    together = generator.generate_ids(prompts, sampling)
    for index, prompt in enumerate(prompts):
        one = SamplingParams(1.0, 0.9, 12, 5, first_index=index)
        assert generator.generate_ids([prompt], one) == [together[index]]


def open_transformers(folder: Path) -> TransformersGenerator:
    return TransformersGenerator(
        str(folder), GenerationConfig(), load_tokenizer(str(folder)), max_length=200
    )


def test_progress_of_responses_beyond_the_boundary(tiny_longrope: Path) -> None:
    generator = open_transformers(tiny_longrope)
    finished: list[int] = []
    prompts = [sequence[:60] for sequence in sequences() if len(sequence) >= 60]
    generator.generate_ids(prompts, SamplingParams(1.0, 1.0, 30, 1), finished.append)
    assert sum(finished) == len(prompts)
    assert min(finished) >= 0


def test_mixture_of_experts_with_scales_by_length() -> None:
    """Phi-3.5-MoE scales its embeddings by length too."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 16,
    }
    config = PhimoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = PhimoeForCausalLM(config).eval()
    samples = [[int(token) for token in torch.randint(97, (length,))] for length in (40, 10)]
    ids, mask = pad_sequences(samples, torch.device("cpu"))
    with torch.no_grad():
        logits = hidden_states(model, ids, mask, split=False)
        for row, sample in zip(logits, samples, strict=True):
            expected = model(torch.tensor([sample])).logits[0]
            torch.testing.assert_close(row[: len(sample)], expected, rtol=1e-4, atol=1e-4)


def test_layers_with_different_frequencies() -> None:
    """Gemma 3 has a rotary embedding for each type of layer."""
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=32,
        sliding_window=64,
        initializer_range=0.3,
        layer_types=list(rope),
        rope_parameters=rope,
    )
    assert length_dependence(config) == LengthDependence("dynamic", 32)
    torch.manual_seed(0)
    state = Gemma3ForCausalLM(config).state_dict()
    samples = [[int(token) for token in torch.randint(97, (size,))] for size in (60, 10, 40, 24)]
    ids, mask = pad_sequences(samples, torch.device("cpu"))
    together, *alone = (Gemma3ForCausalLM(config).eval() for _ in range(1 + len(samples)))
    for model in (together, *alone):
        model.load_state_dict(state)
    with torch.no_grad():
        logits = hidden_states(together, ids, mask, split=False)
        for row, sample, model in zip(logits, samples, alone, strict=True):
            expected = model(torch.tensor([sample])).logits[0]
            torch.testing.assert_close(row[: len(sample)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("longrope", LengthDependence("longrope", 64)),
        ("dynamic_ntk", LengthDependence("dynamic", 64)),
        ("llama", None),
        ("gpt2", None),
    ],
)
def test_length_dependence(folder: Path, expected: LengthDependence | None) -> None:
    assert length_dependence(load_model_config(str(folder))) == expected


def test_groups_of_equal_frequencies() -> None:
    lengths = (1, 64, 65, 66)
    assert [LengthDependence("longrope", 64).group(length) for length in lengths] == [0, 0, 1, 1]
    assert [LengthDependence("dynamic", 64).group(length) for length in lengths] == [0, 0, 65, 66]


def test_layers_of_both_kinds_have_a_group_for_each_length() -> None:
    config = Gemma3TextConfig(
        max_position_embeddings=32,
        rope_parameters={
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
            "sliding_attention": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 128,
                "long_factor": [4.0] * 128,
                "original_max_position_embeddings": 16,
            },
        },
    )
    assert length_dependence(config) == LengthDependence("dynamic", 16)


def test_a_model_keeps_no_hook(tiny_longrope: Path) -> None:
    model: Any = load_model(str(tiny_longrope))
    with torch.no_grad():
        hidden_states(model, torch.tensor([[3, 4]]), torch.ones(1, 2).long())
    assert not model.model.rotary_emb._forward_hooks
