"""The responses on which loss and KL are computed: the test split and benchmarks' references."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import EvaluateConfig, GenerationConfig, PromptConfig
from pocl_ds.curriculum.micro_batches import token_budget_batches
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.sample_tokenizer import SampleTokenizer, SpecialTokensInText
from pocl_ds.data.split_writer import TokenizationCounts, write_tokenized_split
from pocl_ds.data.teacher_prompts import TeacherPrompts
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, DataError
from pocl_ds.evaluation.benchmarks import TEST_SPLIT
from pocl_ds.evaluation.evaluated_models import TEACHER, ModelLoader
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
        teacher_prompts: the same rows as the teacher reads them, if it has its own prompts.

    Raises:
        DataError: the rows have no token that a loss is computed for.
    """

    def __init__(
        self,
        benchmark: str | None,
        split: TokenizedSplit,
        rows: Sequence[int],
        generation: GenerationConfig,
        teacher_prompts: TokenizedSplit | None = None,
    ) -> None:
        self.benchmark, self.split, self.teacher_prompts = benchmark, split, teacher_prompts
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
        for batch in self._collated():
            yield batch.to(device())

    def teacher_batches(self, ids: VocabMap) -> Iterator[Batch]:
        """The same batches in the teacher's ids, with its own prompts where it has them."""
        own_prompts = None
        if self.teacher_prompts is not None:
            own_prompts = TeacherPrompts(
                {self.split.name: self.teacher_prompts}, ids.teacher_inputs, packed=False
            )
        for batch in self._collated():
            if own_prompts is None:
                batch = batch.to(device())
                yield replace(batch, input_ids=ids.teacher_inputs(batch.input_ids))
            else:
                own = own_prompts(self.split, batch).teacher_batch
                assert own is not None
                yield own.to(device())

    def _collated(self) -> Iterator[Batch]:
        """The batches on the host."""
        for members in self._batches:
            yield collate(self.split, self.rows[members])

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


@dataclass(frozen=True)
class HeldOutReader:
    """Reads the test split, if it has samples, and each benchmark with one row per reference."""

    run: RunDirectory
    config: EvaluateConfig
    prompt: PromptConfig
    benchmarks: Mapping[str, Sequence[Sample]]
    special_tokens_in_text: SpecialTokensInText

    def read(
        self, models: ModelLoader, ids: VocabMap, folder: Path, *, own_prompts: bool
    ) -> list[HeldOutSet]:
        """Read and check all sets. Tokens of benchmarks and of the teacher are written to `folder`.

        own_prompts: the teacher reads prompts of its own template.

        Raises:
            ArtifactError: the run has no finished data.
            DataError: a set has no token that a loss is computed for.
            ModelError: see `HeldOutSet.check_token_ids`.
        """
        if read_manifest(self.run.data) is None:
            raise ArtifactError(
                f"{self.run.data} has no finished data: run `pocl preprocess` first"
            )
        reader = (models.students or [TEACHER])[0]
        tokenizer = self._sample_tokenizer(models, reader)
        teacher = None
        if own_prompts and TEACHER in models.paths and models.students:
            teacher = self._sample_tokenizer(models, TEACHER)
        sets = list[HeldOutSet]()
        test_split = TokenizedSplit.open(self.run.data, TEST_SPLIT)
        if len(test_split):
            rows: Sequence[int] = select_by_hash(test_split.ids, self.config.max_samples)
            prompts = None
            if teacher:
                samples = read_sample_file(self.run.data / f"{TEST_SPLIT}.jsonl")
                prompts = _write_split(samples, teacher, folder, f"{TEST_SPLIT}.teacher")[0]
            sets.append(HeldOutSet(None, test_split, rows, self.config.generation, prompts))
        for number, (name, items) in enumerate(self.benchmarks.items()):
            split, counts = _write_split(_with_references(items), tokenizer, folder, str(number))
            _warn_of_cut_references(name, counts)
            prompts = None
            if teacher:
                prompts = _write_split(
                    _with_references(items), teacher, folder, f"{number}.teacher"
                )[0]
            rows = range(len(split))
            sets.append(HeldOutSet(name, split, rows, self.config.generation, prompts))
        vocabulary_rows = models.rows_by_reader(ids)
        for held_out in sets:
            held_out.check_token_ids(ids, tokenizer.tokenizer, vocabulary_rows)
        return sets

    def _sample_tokenizer(self, models: ModelLoader, name: str) -> SampleTokenizer:
        """Tokenizes as for data/test with a model's tokenizer and template, and drops no sample."""
        return SampleTokenizer(
            models.tokenizer(name),
            self.prompt,
            special_tokens_in_text=self.special_tokens_in_text,
            keep_all=True,
        )


def _with_references(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Each sample once per reference, of which alone the loss is measured."""
    for sample in samples:
        for reference in sample.references:
            yield sample.with_reference(reference).with_last_turn_trained()


def _write_split(
    samples: Iterable[Sample], tokenizer: SampleTokenizer, folder: Path, split: str
) -> tuple[TokenizedSplit, TokenizationCounts]:
    counts = write_tokenized_split(samples, tokenizer, folder, split, texts=False)
    return TokenizedSplit.open(folder, split), counts


def _warn_of_cut_references(benchmark: str, counts: TokenizationCounts) -> None:
    if counts.truncated:
        log.warning(
            "benchmark %s: %d of %d references or their prompts are cut for loss and KL: raise "
            "prompt.max_length or prompt.max_prompt_tokens",
            benchmark,
            counts.truncated,
            counts.samples,
        )
