"""The scoring stage: how well the initial student answers each training sample (METHOD 1.1 to 1.3).

Work is cut into shards. A shard is a range of rows of data/train; its result appears as a whole,
with its manifest, or not at all, so that an interrupted run repeats unfinished shards only, and
shards can run as separate jobs. Scores are keyed by sample id.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PromptConfig, ScoreConfig
from pocl_ds.data.records import read_normalised
from pocl_ds.data.tokenized import EncodedSplit, shard_rows
from pocl_ds.difficulty.rank import DEGENERATE, tied_share
from pocl_ds.difficulty.shards import (
    discard_other_divisions,
    discard_stale,
    shard_file,
    shard_manifest,
    unfinished,
)
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, Sampling
from pocl_ds.metrics.rouge import rouge_l_many
from pocl_ds.models.load import load_tokenizer
from pocl_ds.runtime.tracking import Progress
from pocl_ds.workflow.run_dir import RunDirectory, atomic_write, write_manifest

log = logging.getLogger("pocl_ds")

STAGE = "score"
# Metrics beside ROUGE-L and cross-entropy: from the student's responses, references and the
# references' log-probabilities to one number a sample. None comes with the package.
METRICS: dict[
    str, Callable[[list[str], list[list[str]], list[NDArray[np.float32]]], Sequence[float]]
] = {}
CHUNK = 256  # at least so many samples are held in memory at once, and are the grain of progress
# calls of the engine hold so many times max_num_seqs prompts: at the end of each it runs dry
ROUNDS = 4


def score(
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
    """Score the unfinished shards, or one of them.

    For each sample the student writes one response; `rouge_l` compares it with the references,
    `cross_entropy` is the student's mean negative log-likelihood of the encoded response, in nats
    per token at temperature = 1. One engine serves the whole call. Raises RecipeError for a shard that does
    not exist, ArtifactError, DataError, ModelError, ResourceError.
    """
    if shard is not None and not 0 <= shard < config.shards:
        last = config.shards - 1
        raise RecipeError(
            f"shard {shard} does not exist: score.shards={config.shards}, choose 0 to {last}"
        )
    discard_stale(run, fingerprint)
    todo = [s for s in unfinished(run, config, fingerprint) if shard is None or s == shard]
    if not todo:
        return
    split = EncodedSplit.open(run.data, "train")
    if len(split) < config.shards:
        raise RecipeError(
            f"score.shards={config.shards} is more than the {len(split)} training samples: make "
            f"fewer shards"
        )
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code, revision=revision)
    generator = open_generator(
        model_path,
        config.generation,
        tokenizer,
        max_length=max(prompt.max_length, prompt.max_prompt_tokens + config.max_new_tokens),
        threads=threads,
        trust_remote_code=trust_remote_code,
        revision=revision,
        instead="score.generation.backend=transformers",
    )
    try:
        scorer = _Scorer(run, config, split, generator, int(tokenizer.eos_token_id))
        total = sum(len(shard_rows(len(split), s, config.shards)) for s in todo)
        with Progress(total, "samples", STAGE) as progress:
            for number in todo:
                scorer.shard(number, fingerprint, progress)
        scorer.warn_of_ties()
    finally:
        generator.close()
    if not unfinished(run, config, fingerprint):
        discard_other_divisions(run, config.shards)


class _Scorer:
    """One call's engine and data, for its shards one after another."""

    def __init__(
        self,
        run: RunDirectory,
        config: ScoreConfig,
        split: EncodedSplit,
        generator: Generator,
        eos_id: int,
    ) -> None:
        self.run, self.config, self.split, self.generator, self.eos_id = (
            run,
            config,
            split,
            generator,
            eos_id,
        )
        self.tied = {
            "rouge_l": 0.0,
            "cross_entropy": 0.0,
        }  # samples whose value another of their shard equals
        self.scored = 0

    def shard(self, shard: int, fingerprint: str, progress: Progress) -> None:
        """Score one shard and seal it."""
        shards = self.config.shards
        path, manifest = (
            shard_file(self.run, shard, shards),
            shard_manifest(self.run, shard, shards),
        )
        (self.run.scores / manifest).unlink(
            missing_ok=True
        )  # its file is damaged, else the shard were finished
        rows = shard_rows(len(self.split), shard, shards)
        start, tokens = time.monotonic(), self.generator.tokens
        references = self._references(rows)
        metrics: dict[str, list[float]] = {"rouge_l": [], "cross_entropy": []}
        sums = dict.fromkeys(metrics, 0.0)
        with atomic_write(path) as stream:
            step = max(CHUNK, ROUNDS * self.config.generation.max_num_seqs)
            for first in range(rows.start, rows.stop, step):
                chunk = range(first, min(first + step, rows.stop))
                self._chunk(chunk, list(itertools.islice(references, len(chunk))), stream, metrics)
                for name, values in metrics.items():
                    sums[name] += sum(values[-len(chunk) :])
                progress.advance(
                    len(chunk), **{name: total / len(metrics[name]) for name, total in sums.items()}
                )
        seconds = max(time.monotonic() - start, 1e-9)
        tokens = self.generator.tokens - tokens
        info: dict[str, Any] = {
            "shard": shard,
            "shards": shards,
            "samples": len(rows),
            "backend": self.config.generation.backend,
            "seconds": round(seconds, 3),
            "samples_per_second": round(len(rows) / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "tied_share": {name: round(tied_share(values), 4) for name, values in metrics.items()},
        }
        self.scored += len(rows)
        for name, share in info["tied_share"].items():
            self.tied[name] += share * len(rows)
        write_manifest(self.run.scores, STAGE, fingerprint, info=info, files=[path], name=manifest)

    def _chunk(
        self,
        rows: range,
        samples: list[tuple[str, list[str]]],
        stream: IO[Any],
        metrics: dict[str, list[float]],
    ) -> None:
        """Append the scores of some rows; samples: id and references of each."""
        if len(samples) != len(rows):
            raise ArtifactError(
                f"{self.run.data}/train.jsonl has fewer lines than train.ids.npy: run `pocl preprocess` "
                f"again"
            )
        sequences = [[int(token) for token in self.split.tokens(row)] for row in rows]
        prompt_tokens = [int(self.split.prompt_tokens[row]) for row in rows]
        sampling = Sampling(
            self.config.temperature,
            self.config.top_p,
            self.config.max_new_tokens,
            seed=0,
            first=rows.start,
        )
        prompts = [ids[:length] for ids, length in zip(sequences, prompt_tokens, strict=True)]
        responses = self.generator.generate(prompts, sampling)
        if not self.config.count_eos:  # a truncated response has no EOS to leave out
            sequences = [ids[:-1] if ids[-1] == self.eos_id else ids for ids in sequences]
        log_probs = self.generator.log_probs(sequences, prompt_tokens)
        rouge = rouge_l_many(responses, [references for _, references in samples])
        texts = [references for _, references in samples]
        names = [name for name, _ in samples]
        extra = {
            name: _measured(name, names, responses, texts, log_probs)
            for name in self.config.metrics
        }
        for place, ((sample, _), response, found, overlap) in enumerate(
            zip(samples, responses, log_probs, rouge, strict=True)
        ):
            if not len(found):
                raise DataError(
                    f"sample {sample} has no response token to score: remove it from the data, or "
                    f"count the EOS "
                    "(score.count_eos=true)"
                )
            loss = -float(np.mean(found, dtype=np.float64))
            record = {
                "id": sample,
                "rouge_l": float(overlap),
                "cross_entropy": loss,
                "tokens": len(found),
            }
            if extra:
                record["metrics"] = {name: values[place] for name, values in extra.items()}
            stream.write(json.dumps({**record, "response": response}, ensure_ascii=False) + "\n")
            metrics["rouge_l"].append(float(overlap))
            metrics["cross_entropy"].append(loss)

    def _references(self, rows: range) -> Iterator[tuple[str, list[str]]]:
        """Id and references of each row, read from the normalised samples; ids must agree with the
        encoded split.
        """
        path = self.run.data / "train.jsonl"
        samples = itertools.islice(read_normalised(path), rows.start, rows.stop)
        for row, sample in zip(rows, samples, strict=False):
            if bytes(self.split.ids[row]) != sample.id.encode():
                raise ArtifactError(
                    f"{path} line {row + 1} and train.ids.npy name different samples: run `pocl "
                    f"data` again"
                )
            yield sample.id, list(sample.references)

    def warn_of_ties(self) -> None:
        """Say where a metric of the samples scored here has so many equal values, by shard, that
        its ranks say little.
        """
        for name, tied in self.tied.items():
            if (share := tied / self.scored) > DEGENERATE:
                log.warning(
                    "score: %.0f%% of the values of %s are tied, so ranks by it say little: heal "
                    "the student longer "
                    "(student.heal_steps) or rank by the other metric (ranking.strategy)",
                    100 * share,
                    name,
                )


def _measured(
    metric: str,
    ids: list[str],
    responses: list[str],
    references: list[list[str]],
    log_probs: list[NDArray[np.float32]],
) -> list[float]:
    """What a metric says of some samples. Raises RecipeError, DataError where that is not one
    finite number of each.
    """
    try:
        values = [float(value) for value in METRICS[metric](responses, references, log_probs)]
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the metric {metric!r} gives no numbers ({error}): mend its function"
        ) from error
    if len(values) != len(ids):
        raise RecipeError(
            f"the metric {metric!r} gives {len(values)} numbers for {len(ids)} samples: mend its "
            f"function"
        )
    for sample, value in zip(ids, values, strict=True):
        if not math.isfinite(value):
            raise DataError(
                f"sample {sample} has {metric}={value}, which has no rank: mend the metric's "
                f"function"
            )
    return values
