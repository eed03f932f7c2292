"""Scores with a model in memory, by the public names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.errors import DataError
from pocl_ds.scoring import SampleScore, cross_entropy, rouge_l, score_samples

RECORDS = [
    {"instruction": "Say one.", "output": "one"},
    {"instruction": "Add.", "input": "1 and 2", "output": ["three", "it is 3"]},
    {"instruction": "Say nothing in many words, again and again.", "output": "so be it " * 9},
]


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2).train()


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_gpt2)


def test_cross_entropy_is_the_mean_over_response_tokens(model: Any) -> None:
    sequences, prompt_tokens = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 0]], [1, 4]
    values = cross_entropy(model, sequences, prompt_tokens, max_batch_tokens=6)
    model.eval()
    for ids, start, value in zip(sequences, prompt_tokens, values, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -np.mean([float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids))])
        assert value == pytest.approx(expected, rel=1e-5)
    together = cross_entropy(model, sequences, prompt_tokens)
    assert together == pytest.approx(values, rel=1e-5)


def test_samples_are_scored_in_their_order_and_the_model_is_restored(
    model: Any, tokenizer: Any
) -> None:
    model.train()
    decoding = model.generation_config
    scores = score_samples(model, tokenizer, RECORDS, max_new_tokens=8, max_batch_tokens=400)
    assert model.training and model.generation_config is decoding
    assert [type(score) for score in scores] == [SampleScore] * 3
    assert len({score.id for score in scores}) == 3
    for score, record in zip(scores, RECORDS, strict=True):
        references = record["output"] if isinstance(record["output"], list) else [record["output"]]
        assert score.rouge_l == rouge_l(score.response, references)
        assert score.tokens == len(tokenizer(references[0])["input_ids"]) + 1  # and EOS
        assert 0 < score.cross_entropy < 20
    alone = score_samples(model, tokenizer, RECORDS[2:], max_new_tokens=8)
    assert alone[0].response == scores[2].response
    assert alone[0].cross_entropy == pytest.approx(scores[2].cross_entropy, rel=1e-5)


def test_messages_and_templates(model: Any, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}]
    plain = score_samples(
        model, tokenizer, [{"messages": turns}], template="plain", max_new_tokens=2
    )
    alpaca = score_samples(model, tokenizer, RECORDS[:1], max_new_tokens=2)
    assert plain[0].tokens == alpaca[0].tokens
    assert plain[0].cross_entropy != alpaca[0].cross_entropy


def test_errors_name_the_sample(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="sample 1 has 2 prompt tokens of 2 in all"):
        cross_entropy(model, [[1, 2], [3, 4]], [1, 2])
    with pytest.raises(DataError, match="records, number 1: there is no field 'output'"):
        score_samples(model, tokenizer, [{"instruction": "Say one."}])


def test_the_tokenizer_of_rouge_l_follows_the_references(model: Any, tokenizer: Any) -> None:
    records = [{"instruction": "Say it.", "output": "北京是中国的首都。"}]
    (score,) = score_samples(model, tokenizer, records, max_new_tokens=4)
    expected = rouge_l(score.response, ["北京是中国的首都。"], rouge_tokenizer="characters")
    assert score.rouge_l == expected
    assert rouge_l("北京是首都", ["北京是首都"], rouge_tokenizer="auto") == 1.0
