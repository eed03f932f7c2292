"""Seeds and decoding, which both backends share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.errors import ResourceError
from pocl_ds.generation import backends
from pocl_ds.generation.protocol import SamplingParams, decode_response, find_stop_token_ids


@given(st.integers(0, 2**40), st.integers(0, 10**7), st.integers(0, 10**4))
def test_request_seeds_do_not_depend_on_chunks(seed: int, first_index: int, index: int) -> None:
    workload = SamplingParams(1.0, 1.0, 8, seed)
    chunk = SamplingParams(1.0, 1.0, 8, seed, first_index=first_index)
    assert chunk.request_seed(index) == workload.request_seed(first_index + index)
    assert 0 <= chunk.request_seed(index) < 2**63


def test_seeds_differ_by_prompt_and_by_seed() -> None:
    seeds = {
        SamplingParams(1.0, 1.0, 8, seed).request_seed(index)
        for seed in (10, 20, 30, 40, 50)
        for index in range(2000)
    }
    assert len(seeds) == 10_000


def test_stop_ids_join_tokenizer_and_model() -> None:
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert find_stop_token_ids(tokenizer, None) == [7]
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == [7]
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=3)) == [3, 7]
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[7, 9])) == [7, 9]


def test_text_ends_before_the_first_stop_id() -> None:
    tokenizer = tiny_models.make_tokenizer()
    ids = tokenizer("one two").input_ids
    assert decode_response(tokenizer, [*ids, 0, *ids], [0]) == "one two"
    assert decode_response(tokenizer, ids, [0]) == "one two"
    assert decode_response(tokenizer, [0], [0]) == ""
    assert decode_response(tokenizer, [1, *ids], [0]) == "one two"  # a special token leaves no text


def test_a_missing_vllm_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.check_backend("transformers", "x")
    with pytest.raises(
        ResourceError,
        match=r"vllm is not installed.*choose the slower policy\.rollout_backend=transformers$",
    ):
        backends.check_backend("vllm", "policy.rollout_backend=transformers")
