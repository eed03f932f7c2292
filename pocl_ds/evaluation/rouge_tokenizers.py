"""Which tokenizer of ROUGE-L a benchmark's answers are compared with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pocl_ds.config import EvaluateConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.reference_sample import sample_training_references
from pocl_ds.evaluation.benchmarks import TEST_SPLIT
from pocl_ds.metrics.rouge import has_tokens
from pocl_ds.metrics.rouge_tokenizer import AUTO, ROUGE_SCORE, choose_rouge_tokenizer
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

UNITS = {"unicode_words": "words of every script", "characters": "characters"}


def benchmark_rouge_tokenizers(
    run: RunDirectory,
    config: EvaluateConfig,
    samples: Mapping[str, Sequence[Sample]],
    rouge_tokenizer: str,
) -> dict[str, str]:
    """The tokenizer of each benchmark.

    `auto` uses that of the scores for the run's own test split, and chooses by the references of
    any other benchmark. Warns about references that the tokenizer does not see.
    """
    chosen = {}
    for name, items in samples.items():
        tokenizer = rouge_tokenizer
        if tokenizer == AUTO:
            is_test_split = config.benchmarks[name].source == TEST_SPLIT
            choice = choose_rouge_tokenizer(
                sample_training_references(run)
                if is_test_split
                else [text for item in items for text in item.references]
            )
            log.info("benchmark %s: ROUGE-L uses the tokenizer %s", name, choice)
            tokenizer = choice.name
        chosen[name] = tokenizer
        if unseen := count_unseen(items, tokenizer):
            log.warning(
                "benchmark %s: the references of %d of %d items have no token of "
                "score.rouge_tokenizer=%s, so their ROUGE-L is 0 for every answer",
                name,
                unseen,
                len(items),
                tokenizer,
            )
    return chosen


def count_unseen(samples: Sequence[Sample], rouge_tokenizer: str) -> int:
    """Number of samples without a reference that has a token."""
    return sum(
        not any(has_tokens(text, rouge_tokenizer) for text in sample.references)
        for sample in samples
    )


def tokenizer_footnote(rouge_tokenizer: str) -> str | None:
    """A footnote of ROUGE-L over other tokens than those of rouge-score, as published numbers."""
    if rouge_tokenizer == ROUGE_SCORE:
        return None
    return f"ROUGE-L compares {UNITS[rouge_tokenizer]} (score.rouge_tokenizer={rouge_tokenizer})"
