"""The step `score`: how well the initial student answers each training sample.

Work is divided into shards. A shard is a range of rows of data/train. Its score file and manifest
appear complete or not at all, so an interrupted run repeats only unfinished shards, and shards can
run as separate jobs. Scores are keyed by sample id.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PromptConfig, ScoreConfig
from pocl_ds.curriculum.ranking import tied_fraction
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.reference_sample import sample_training_references
from pocl_ds.data.thought_spans import ThoughtFinder, answer_of
from pocl_ds.data.tokenized import TokenizedSplit, shard_rows
from pocl_ds.difficulty.plugin_metrics import ScoredSamples, metric_values
from pocl_ds.difficulty.shards import (
    discard_other_divisions,
    discard_stale,
    shard_file,
    shard_manifest,
    unfinished_shards,
)
from pocl_ds.difficulty.ties import ZeroCounts, count_zeros, tie_warning
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.generation.backends import longest_sequence, open_generator
from pocl_ds.generation.end_of_turn import recorded_end_ids
from pocl_ds.generation.invariance import check_generator, choose_rows, transformers_reference
from pocl_ds.generation.protocol import Generator, ProgressCallback, SamplingParams
from pocl_ds.metrics.rouge import rouge_l_many
from pocl_ds.metrics.rouge_tokenizer import AUTO, choose_rouge_tokenizer
from pocl_ds.models.batch_invariance import LogProbs
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import load_tokenizer
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

STEP = "score"
MIN_SAMPLES_PER_CHUNK = 256  # in memory together
# Prompts per chunk, as a multiple of max_num_seqs: the engine is underused at the end of a chunk.
ROUNDS_PER_CHUNK = 4


def score_training_samples(
    run: RunDirectory,
    config: ScoreConfig,
    prompt: PromptConfig,
    *,
    model_path: str,
    fingerprint: str,
    shard: int | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> None:
    """Score the unfinished shards, or one of them, with one engine.

    `rouge_l` compares the student's response with the references (docs/method.md, eq. 1).
    `cross_entropy` is its mean negative log-likelihood of the tokens that train (eq. 2).

    Raises RecipeError if the shard does not exist, or a plugin's metric gives no numbers;
    ArtifactError, DataError, ModelError or ResourceError if data or model cannot be used.
    """
    # Find the shards to score.
    _check_shard(shard, config.shards)
    discard_stale(run, fingerprint)
    pending = [
        s for s in unfinished_shards(run, config, fingerprint) if shard is None or s == shard
    ]
    if not pending:
        return
    split = TokenizedSplit.open(run.data, "train")
    if len(split) < config.shards:
        raise RecipeError(
            f"score.shards={config.shards} is more than the {len(split)} training samples: make "
            "fewer shards"
        )
    rouge_tokenizer = _choose_tokenizer(run, config)

    # A few log-probabilities to compare the engine with, before vLLM is opened.
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code, revision=revision)
    rows, reference = choose_rows(split, config.generation, seed=0), None
    if rows and config.generation.backend != "transformers":
        reference = transformers_reference(
            model_path, split, rows, trust_remote_code=trust_remote_code, revision=revision
        )

    # Load the student, and score shard by shard.
    generator = open_generator(
        model_path,
        config.generation,
        tokenizer,
        max_length=min(
            max(prompt.max_length, prompt.max_prompt_tokens + config.max_new_tokens),
            longest_sequence(split, config.max_new_tokens),
        ),
        threads=threads,
        trust_remote_code=trust_remote_code,
        revision=revision,
        alternative="score.generation.backend=transformers",
        end_of_turn_ids=recorded_end_ids(run),
    )
    try:
        invariance = _check_student(config, split, generator, rows, reference)
        scorer = _ShardScorer(run, config, split, rouge_tokenizer, generator, tokenizer, invariance)
        total = sum(len(shard_rows(len(split), number, config.shards)) for number in pending)
        with Progress(total, "samples", STEP) as progress:
            for number in pending:
                scorer.score_shard(number, fingerprint, progress)
        scorer.warn_about_ties()
    finally:
        generator.close()
    if not unfinished_shards(run, config, fingerprint):
        discard_other_divisions(run, config.shards)


def _check_shard(shard: int | None, count: int) -> None:
    if shard is not None and not 0 <= shard < count:
        raise RecipeError(
            f"shard {shard} does not exist: score.shards={count}, choose 0 to {count - 1}"
        )


def _check_student(
    config: ScoreConfig,
    split: TokenizedSplit,
    generator: Generator,
    rows: list[int],
    reference: tuple[str, LogProbs] | None,
) -> dict[str, Any]:
    """Check on a few samples that scores depend neither on the batch nor on the backend."""
    backend = config.generation.backend
    remedy = "set score.generation.max_num_seqs=1"
    if backend != "transformers":
        remedy = "set score.generation.backend=transformers"
    return check_generator(
        f"score: the student in {backend}",
        generator,
        split,
        rows,
        dtype=resolve_dtype(config.generation.dtype),
        remedy=remedy,
        reference=reference,
    )


def _choose_tokenizer(run: RunDirectory, config: ScoreConfig) -> str:
    """The tokenizer of ROUGE-L. `auto` depends on the training data alone, so all shards agree."""
    if config.rouge_tokenizer != AUTO:
        return config.rouge_tokenizer
    choice = choose_rouge_tokenizer(sample_training_references(run))
    log.info("score: ROUGE-L uses the tokenizer %s", choice)
    return choice.name


class _ShardScorer:
    """Scores shards with one generator, and counts ties over all of them."""

    def __init__(
        self,
        run: RunDirectory,
        config: ScoreConfig,
        split: TokenizedSplit,
        rouge_tokenizer: str,
        generator: Generator,
        tokenizer: Any,
        invariance: dict[str, Any],  # what `check_generator` found
    ) -> None:
        self.run, self.config, self.split = run, config, split
        self.rouge_tokenizer = rouge_tokenizer
        self.generator, self.invariance = generator, invariance
        self._thoughts = ThoughtFinder(tokenizer)
        # Samples whose value another sample of the same shard has too.
        self.num_tied = {"rouge_l": 0.0, "cross_entropy": 0.0}
        self.num_scored = 0
        self.zeros = ZeroCounts()

    def score_shard(self, shard: int, fingerprint: str, progress: Progress) -> None:
        """Write the scores of one shard, then its manifest."""
        shards = self.config.shards
        path = shard_file(self.run, shard, shards)
        manifest = shard_manifest(self.run, shard, shards)
        # A manifest of an unfinished shard belongs to a damaged file.
        (self.run.scores / manifest).unlink(missing_ok=True)
        rows = shard_rows(len(self.split), shard, shards)
        start, tokens = time.monotonic(), self.generator.processed_tokens
        samples, self.shard_zeros = self._samples(rows), ZeroCounts()
        self.unfinished_thoughts = 0
        metrics: dict[str, list[float]] = {"rouge_l": [], "cross_entropy": []}
        means: dict[str, float] = {}  # of the chunks so far, for the progress line

        def report(finished: int) -> None:
            progress.advance(finished, **means)

        # Score chunk by chunk.
        with atomic_write(path) as stream:
            size = max(
                MIN_SAMPLES_PER_CHUNK, ROUNDS_PER_CHUNK * self.config.generation.max_num_seqs
            )
            for chunk_start in range(rows.start, rows.stop, size):
                chunk = range(chunk_start, min(chunk_start + size, rows.stop))
                chunk_samples = list(itertools.islice(samples, len(chunk)))
                self._score_chunk(chunk, chunk_samples, stream, metrics, report)
                means |= {name: sum(values) / len(values) for name, values in metrics.items()}
                report(0)

        seconds = max(time.monotonic() - start, 1e-9)
        tokens = self.generator.processed_tokens - tokens
        tied_fractions = {name: round(tied_fraction(values), 4) for name, values in metrics.items()}
        info: dict[str, Any] = {
            "shard": shard,
            "shards": shards,
            "samples": len(rows),
            "backend": self.config.generation.backend,
            "seconds": round(seconds, 3),
            "samples_per_second": round(len(rows) / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "tied_fraction": tied_fractions,
            "rouge_tokenizer": self.rouge_tokenizer,
            "rouge_l_zeros": self.shard_zeros.to_info(),
            "span": self.config.span,
            "unfinished_thoughts": self.unfinished_thoughts,
            "batch_invariance": self.invariance,
        }
        if self.unfinished_thoughts:
            log.warning(
                "score: %d of %d responses do not end their thought within score.max_new_tokens=%d "
                "and have no answer, so that their ROUGE-L is 0: raise it",
                self.unfinished_thoughts,
                len(rows),
                self.config.max_new_tokens,
            )
        self.zeros += self.shard_zeros
        self.num_scored += len(rows)
        for name, fraction in tied_fractions.items():
            self.num_tied[name] += fraction * len(rows)
        write_manifest(self.run.scores, STEP, fingerprint, info=info, files=[path], name=manifest)

    def _score_chunk(
        self,
        rows: range,
        samples: list[Sample],
        stream: IO[Any],
        metrics: dict[str, list[float]],
        report: ProgressCallback,
    ) -> None:
        """Append the scores of some rows to the stream and to `metrics`.

        samples: of each row. report: receives the number of responses that were
        generated since the last call.
        """
        if len(samples) != len(rows):
            raise ArtifactError(
                f"{self.run.data}/train.jsonl has fewer lines than train.ids.npy: run `pocl "
                "preprocess` again"
            )
        # Generate a response to each prompt, and score the reference.
        responses, log_probs = self._run_model(rows, report)
        ids = [sample.id for sample in samples]
        references = [list(sample.references) for sample in samples]
        scored = responses
        if self.config.span == "answer":
            scored = self._answers(rows, responses)
            references = [
                [answer_of(text, prompt_opens_thought=False)[0] for text in texts]
                for texts in references
            ]
        rouge = rouge_l_many(scored, references, rouge_tokenizer=self.rouge_tokenizer).tolist()
        self.shard_zeros += count_zeros(rouge, scored, references, self.rouge_tokenizer)
        prompts = ["".join(m.content for m in s.messages_with_input[-2:-1]) for s in samples]
        scored_samples = ScoredSamples(ids, prompts, scored, references, log_probs)
        plugin_metrics = {name: metric_values(name, scored_samples) for name in self.config.metrics}

        # Write one record per sample.
        for i, sample_id in enumerate(ids):
            if not len(log_probs[i]):
                raise DataError(
                    f"sample {sample_id} has no response token to score: remove it from the data, "
                    "or count the EOS (score.count_eos=true)"
                )
            cross_entropy = -float(np.mean(log_probs[i], dtype=np.float64))
            metrics["rouge_l"].append(rouge[i])
            metrics["cross_entropy"].append(cross_entropy)
            record: dict[str, Any] = {"id": sample_id, "rouge_l": rouge[i]}
            record |= {"cross_entropy": cross_entropy, "tokens": len(log_probs[i])}
            if plugin_metrics:
                record["metrics"] = {name: values[i] for name, values in plugin_metrics.items()}
            record["response"] = responses[i]
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _answers(self, rows: range, responses: list[str]) -> list[str]:
        """The answers of responses, without their thoughts. Counts thoughts without an end."""
        answers = []
        for row, response in zip(rows, responses, strict=True):
            opens = self._thoughts.prompt_opens(
                self.split.tokens(row)[: int(self.split.prompt_tokens[row])]
            )
            answer, has_end = answer_of(response, prompt_opens_thought=opens)
            self.unfinished_thoughts += not has_end
            answers.append(answer)
        return answers

    def _run_model(
        self, rows: range, report: ProgressCallback
    ) -> tuple[list[str], list[NDArray[np.float32]]]:
        """Responses to the prompts of some rows, and log-probabilities of their trained tokens."""
        sequences = [[int(token) for token in self.split.tokens(row)] for row in rows]
        prompt_tokens = [int(self.split.prompt_tokens[row]) for row in rows]
        sampling = SamplingParams(
            self.config.temperature,
            self.config.top_p,
            self.config.max_new_tokens,
            seed=0,
            first_index=rows.start,
        )
        prompts = [ids[:length] for ids, length in zip(sequences, prompt_tokens, strict=True)]
        responses = self.generator.generate(prompts, sampling, report)
        # A sample counts as finished once its response exists, so this only refreshes the display.
        masks = [self._scored_tokens(row) for row in rows]
        starts = [int(np.argmax(mask)) if mask.any() else len(mask) for mask in masks]
        log_probs = self.generator.log_probs(sequences, starts, lambda _: report(0))
        return responses, [
            values[mask[start:]]
            for values, mask, start in zip(log_probs, masks, starts, strict=True)
        ]

    def _scored_tokens(self, row: int) -> NDArray[np.bool_]:
        """Which tokens of a sample enter its cross-entropy: those that train, [total_tokens]."""
        mask = np.array(self.split.loss_mask(row))
        mask[0] = False  # no hidden state is before it
        if self.config.span == "answer":
            prompt_tokens = int(self.split.prompt_tokens[row])
            start = self._thoughts.answer_start(self.split.tokens(row)[prompt_tokens:]) or 0
            mask[prompt_tokens : prompt_tokens + start] = False
        if not self.config.count_eos:
            mask &= ~np.isin(self.split.tokens(row), self.generator.stop_token_ids)
        return mask

    def _samples(self, rows: range) -> Iterator[Sample]:
        """The sample of each row. Raises ArtifactError if data/train's files disagree."""
        path = self.run.data / "train.jsonl"
        samples = itertools.islice(read_sample_file(path), rows.start, rows.stop)
        for row, sample in zip(rows, samples, strict=False):
            if bytes(self.split.ids[row]) != sample.id.encode():
                raise ArtifactError(
                    f"{path} line {row + 1} and train.ids.npy name different samples: run `pocl "
                    "preprocess` again"
                )
            yield sample

    def warn_about_ties(self) -> None:
        """Warn about a metric if so many values within shards tie that its ranks mean little."""
        for name, num_tied in self.num_tied.items():
            message = tie_warning(
                name,
                num_tied / self.num_scored,
                self.num_scored,
                self.zeros,
                self.rouge_tokenizer,
            )
            if message:
                log.warning("score: %s", message)
