"""Difficulty scores with a model in memory, as the step `score` computes them.

    from pocl_ds.scoring import score_samples

    records = [{"instruction": "Name a color.", "output": "Blue."}]
    scores = score_samples(model, tokenizer, records)
    print(scores[0].rouge_l, scores[0].cross_entropy)

`pocl_ds.curriculum.rank_by_difficulty` orders samples by these scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import GenerationConfig, PromptConfig
from pocl_ds.curriculum.micro_batches import token_budget_batches
from pocl_ds.data.records import samples_from_records
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.errors import DataError
from pocl_ds.metrics.rouge import rouge_l, rouge_l_many

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SampleScore", "cross_entropy", "rouge_l", "score_samples"]


@dataclass(frozen=True)
class SampleScore:
    """The scores of one sample."""

    id: str
    rouge_l: float  # 0 to 1
    cross_entropy: float  # nats per response token
    tokens: int  # response tokens of the reference, EOS included
    response: str  # of the model


def cross_entropy(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    *,
    max_batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Mean negative log-likelihood of the response tokens at temperature 1 (docs/method.md, eq. 2).

    Args:
        model: a transformers causal language model, on any device.
        sequences: token ids of prompt and response of each sample.
        prompt_tokens: length of each prompt, at least 1.
        max_batch_tokens: tokens of a forward pass, padding included.

    Returns:
        Nats per response token, float64 [samples].

    Raises:
        DataError: a sample has no prompt token or no response token.
        ModelError: the model's family is not supported.
    """
    log_probs = _log_probs(model, sequences, prompt_tokens, max_batch_tokens)
    return np.array([-np.mean(values, dtype=np.float64) for values in log_probs], np.float64)


def score_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Mapping[str, Any]],
    *,
    template: str = "alpaca",
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 256,
    max_length: int = 512,
    max_batch_tokens: int = 8192,
    rouge_tokenizer: str = "auto",
) -> list[SampleScore]:
    """Score samples by a model's greedy responses and by its cross-entropy of the references.

    Args:
        model: a transformers causal language model, on any device.
        tokenizer: its tokenizer.
        records: of any format that `data.format` knows, such as `{"instruction", "output"}`,
            `{"prompt", "completion"}` or `{"messages"}`; the output may be a list of references.
        template: `alpaca`, `chat`, `plain`, or a .jinja file.
        max_prompt_tokens: a longer prompt loses earlier turns, then parts of its texts.
        max_new_tokens: of a generated response.
        max_length: tokens of prompt and reference; a longer reference is cut.
        max_batch_tokens: tokens of a batch, padding included.
        rouge_tokenizer: `rouge_score`, `unicode_words`, `characters`, or `auto` to choose the one
            that suits the references.

    Returns:
        One score per record, in the order of the records.

    Raises:
        DataError: a record has no known format, or a text is missing.
        ModelError: the tokenizer has no EOS, a token is beyond the rows of the model's embedding,
            or the model's family is not supported.
    """
    # transformers is loaded only when a model is scored.
    from pocl_ds.models.load import embedding_rows
    from pocl_ds.models.token_checks import check_sequences

    # Tokenize prompts and references.
    numbered_records = (
        (f"records, number {number}", dict(record)) for number, record in enumerate(records, 1)
    )
    samples = list(samples_from_records(numbered_records, "records", "auto", {}))
    prompt = PromptConfig(
        template=template, max_prompt_tokens=max_prompt_tokens, max_length=max_length
    )
    sample_tokenizer = SampleTokenizer(tokenizer, prompt, keep_all=True)
    samples = [sample_tokenizer.clean(sample) for sample in samples]
    tokenized = [sample_tokenizer.tokenize(sample) for sample in samples]
    sequences = [sample.ids for sample in tokenized]
    prompt_tokens = [sample.prompt_tokens for sample in tokenized]

    # Generate responses, and compare them with the references.
    rows = {"the model": embedding_rows(model.config)}
    check_sequences(sequences, tokenizer, rows, "a sample")
    prompts = [ids[:length] for ids, length in zip(sequences, prompt_tokens, strict=True)]
    responses = _generate(model, tokenizer, prompts, max_new_tokens, max_batch_tokens)
    references = [sample.references for sample in samples]
    rouge = rouge_l_many(responses, references, rouge_tokenizer=rouge_tokenizer)
    masks = [np.concatenate([[False], sample.loss_mask[1:]]) for sample in tokenized]
    starts = [int(np.argmax(mask)) for mask in masks]
    log_probs = [
        values[mask[start:]]
        for values, mask, start in zip(
            _log_probs(model, sequences, starts, max_batch_tokens), masks, starts, strict=True
        )
    ]
    return [
        SampleScore(
            id=sample.id,
            rouge_l=float(rouge[i]),
            cross_entropy=-float(np.mean(log_probs[i], dtype=np.float64)),
            tokens=len(log_probs[i]),
            response=responses[i],
        )
        for i, sample in enumerate(samples)
    ]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_batch_tokens: int,
) -> list[str]:
    """Greedy responses as text. Restores the mode and the generation config of the model."""
    from pocl_ds.generation.protocol import SamplingParams
    from pocl_ds.generation.transformers_backend import TransformersGenerator

    training, decoding = model.training, model.generation_config
    generator = TransformersGenerator(
        model,
        GenerationConfig(backend="transformers", max_num_batched_tokens=max_batch_tokens),
        tokenizer,
        max_length=max((len(prompt) for prompt in prompts), default=0) + max_new_tokens,
    )
    try:
        return generator.generate(prompts, SamplingParams(0.0, 1.0, max_new_tokens, seed=0))
    finally:
        generator.close()
        model.generation_config = decoding
        model.train(training)


def _log_probs(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    max_batch_tokens: int,
) -> list[NDArray[np.float32]]:
    """Log-probabilities of the response tokens, without dropout."""
    from pocl_ds.models.log_probs import response_log_probs

    lengths = [len(sequence) for sequence in sequences]
    for row, (length, prompt_length) in enumerate(zip(lengths, prompt_tokens, strict=True)):
        if not 0 < prompt_length < length:
            raise DataError(
                f"sample {row} has {prompt_length} prompt tokens of {length} in all: both prompt "
                "and response need at least one"
            )
    training = model.training
    model.eval()
    try:
        batches = token_budget_batches(lengths, max_tokens=max_batch_tokens)
        return response_log_probs(model, sequences, prompt_tokens, batches)
    finally:
        model.train(training)
