"""The responses on which loss and KL are computed: the test split and benchmarks' references."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import EvaluateConfig, GenerationConfig
from pocl_ds.curriculum.micro_batches import token_budget_batches
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.conversation import Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.split_writer import write_tokenized_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, DataError
from pocl_ds.evaluation.benchmarks import TEST_SPLIT
from pocl_ds.models.token_checks import SHARE_A_TOKENIZER, check_split
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.distributed import device
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


class HeldOutSet:
    """Rows of a tokenized split. Iteration gives the same batches of similar lengths every time.

    Args:
        benchmark: name of the benchmark, None for the test split.
        rows: the rows of the split that count.
        generation: limits the tokens and sequences of a batch.

    Raises:
        DataError: the rows have no token that a loss is computed for.
    """

    def __init__(
        self,
        benchmark: str | None,
        split: TokenizedSplit,
        rows: Sequence[int],
        generation: GenerationConfig,
    ) -> None:
        self.benchmark, self.split = benchmark, split
        self.label = "the test split" if benchmark is None else f"benchmark {benchmark}"
        self.rows: NDArray[np.int64] = np.array(rows, np.int64)
        self.loss_tokens = int(np.maximum(split.loss_tokens[self.rows], 0).sum())
        if not self.loss_tokens:
            raise DataError(
                f"{self.label} has no tokens to compute a loss of: raise data.test_fraction, set "
                "data.test, or set evaluate.held_out_loss=false"
            )
        self._batches = token_budget_batches(
            split.total_tokens[self.rows],
            max_tokens=generation.max_num_batched_tokens,
            max_samples=generation.max_num_seqs,
        )

    def __iter__(self) -> Iterator[Batch]:
        for members in self._batches:
            yield collate(self.split, self.rows[members]).to(device())

    def check_token_ids(self, ids: VocabMap, tokenizer: Any, rows: Mapping[str, int]) -> None:
        """Check that teacher and student share every id of the responses, and can read every id of
        the prompts: see `check_split`.

        Raises:
            ModelError: an id is not shared; the message names the sample.
        """
        check_split(
            self.split,
            ids,
            tokenizer,
            rows,
            label=f"{self.label}: ",
            members=self.rows,
            remedy=SHARE_A_TOKENIZER,
        )


def read_held_out_sets(
    run: RunDirectory,
    config: EvaluateConfig,
    tokenizer: SampleTokenizer,
    benchmarks: Mapping[str, Sequence[Sample]],
    folder: Path,
) -> list[HeldOutSet]:
    """The test split, if it has samples, and each benchmark with one row per reference.

    Args:
        folder: where the benchmarks' tokens are written.

    Raises:
        ArtifactError: the run has no finished data.
        DataError: a set has no token that a loss is computed for.
    """
    if read_manifest(run.data) is None:
        raise ArtifactError(f"{run.data} has no finished data: run `pocl preprocess` first")
    sets = list[HeldOutSet]()
    test_split = TokenizedSplit.open(run.data, TEST_SPLIT)
    if len(test_split):
        rows: Sequence[int] = select_by_hash(test_split.ids, config.max_samples)
        sets.append(HeldOutSet(None, test_split, rows, config.generation))
    for number, (name, samples) in enumerate(benchmarks.items()):
        split = _tokenize_references(name, samples, tokenizer, folder, str(number))
        rows = range(len(split))
        sets.append(HeldOutSet(name, split, rows, config.generation))
    return sets


def _tokenize_references(
    benchmark: str,
    samples: Sequence[Sample],
    tokenizer: SampleTokenizer,
    folder: Path,
    split: str,
) -> TokenizedSplit:
    single = (
        sample.with_reference(reference) for sample in samples for reference in sample.references
    )
    counts = write_tokenized_split(single, tokenizer, folder, split, texts=False)
    if counts.truncated:
        log.warning(
            "benchmark %s: %d of %d references or their prompts are cut for loss and KL: raise "
            "prompt.max_length or prompt.max_prompt_tokens",
            benchmark,
            counts.truncated,
            counts.samples,
        )
    return TokenizedSplit.open(folder, split)
