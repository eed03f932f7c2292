"""The difficulty ranking of a stage by the student that enters it (`curriculum.rescoring`).

The start of a stage is the only place where the order of samples and their weights change. All
ranks score the samples together, in parts that are written as they finish, after a checkpoint of
the weights that score them: an interrupted ranking repeats only the missing parts. The result is a
folder `stages/stage-02/` of the training's directory with the new order and the scores; a resumed
run reads it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pocl_ds.config import LossConfig, RescoringConfig, SampleWeightsConfig
from pocl_ds.config.registry import MEASURED_SCORES
from pocl_ds.curriculum.plan_step import weights_line
from pocl_ds.curriculum.ranking import hash_ids
from pocl_ds.curriculum.sample_scores import SampleScores, order_by_difficulty, places
from pocl_ds.curriculum.sample_weights import weigh_samples
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.curriculum.stage_files import ORDER, SCORES, WEIGHTS, load_stage, stage_directory
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.sample_losses import SampleTerms
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.runtime.progress import Progress
from pocl_ds.teachers.teacher import verify_damage
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.workflow.files import atomic_write, save_array
from pocl_ds.workflow.manifest import (
    finished_manifest,
    read_part,
    write_manifest,
)

log = logging.getLogger("pocl_ds")

STEP = "stage-ranking"


class StageRanking:
    """Ranks the training samples with the current student. All ranks call every method together.

    scores: what was known before training. runs_teacher: whether the teacher's scores are measured
    too. fingerprint: of the training, which its results carry.
    """

    def __init__(
        self,
        config: RescoringConfig,
        weights: SampleWeightsConfig | None,
        scores: SampleScores,
        sampler: Sampler,
        models: TrainingModels,
        data: TrainingData,
        loss: LossConfig,
        monitor: TrainingMonitor,
        *,
        runs_teacher: bool,
        fingerprint: str,
    ) -> None:
        self.config, self.weights, self.scores = config, weights, scores
        self.sampler, self.models, self.data = sampler, models, data
        self.loss, self.monitor = loss, monitor
        self.runs_teacher, self.fingerprint = runs_teacher, fingerprint

    def directory(self, stage: int) -> Path:
        """Where the ranking of a stage, counted from 0, is written."""
        return stage_directory(self.monitor.directory, stage)

    def resume(self, position: SamplerPosition) -> None:
        """Read the ranking of the stage that a step continues. Raises ArtifactError without it."""
        if position.step_in_stage == 0 or position.stage + 1 < self.config.from_stage:
            return
        directory = self.directory(position.stage)
        if finished_manifest(directory, self.fingerprint) is None:
            raise ArtifactError(
                f"{directory} is missing or of another training, and stage {position.stage + 1} "
                "was ranked by its student: restore it, or remove the checkpoints after "
                f"step {position.step - position.step_in_stage}"
            )
        self._use(position.stage)

    def begin_stage(self, position: SamplerPosition) -> None:
        """Score and rank the samples for the stage that begins, unless that is done already.

        Raises Interrupted after a signal, with finished parts saved, RecipeError for a measure or
        rule that gives no numbers, and ArtifactError for damaged outputs of a cached teacher.
        """
        stage, directory = position.stage, self.directory(position.stage)
        if finished_manifest(directory, self.fingerprint) is None:
            stopwatch = distributed.Stopwatch()
            scores = self._last_scores(stage)
            rows = self._rows_to_score(stage, scores)
            measured = self._score(position, rows)
            with distributed.raise_on_all_ranks("rank the samples"):
                if distributed.rank() == 0:
                    self._write(position, scores, rows, measured, stopwatch.lap())
            distributed.barrier()
        self._use(stage)

    def _use(self, stage: int) -> None:
        """Let the sampler draw from the stage's own order."""
        plan = self.sampler.plan
        self.sampler.replace_stage(load_stage(plan, self.monitor.directory, stage))

    def _last_scores(self, stage: int) -> SampleScores:
        """The newest scores before a stage: of the stage before it, or those before training."""
        columns = dict(self.scores.columns)
        path = self.directory(stage - 1) / SCORES
        if stage + 1 > self.config.from_stage:
            table = pq.read_table(path)
            columns |= {name: table[name].to_numpy() for name in table.column_names if name != "id"}
        return SampleScores(self.scores.ids, columns, stage, self.scores.seed)

    def _rows_to_score(self, stage: int, scores: SampleScores) -> NDArray[np.int64]:
        """The rows that are scored again, ascending: all at first, then a share by a hash."""
        count = self.config.samples_to_score(len(scores.ids), stage)
        if count == len(scores.ids):
            return np.arange(count)
        keys = hash_ids(scores.ids, (self.scores.seed + (stage << 32)) % 2**64)
        return np.sort(np.argsort(keys, kind="stable")[:count])

    def _score(
        self, position: SamplerPosition, rows: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float64]]:
        """What the student measures of these rows, in nats per loss token, by name: each [rows]."""
        directory, shards = self.directory(position.stage), min(self.config.shards, len(rows))
        parts, label = np.array_split(rows, shards), f"rank stage {position.stage + 1}"
        names = [f"shard-{shard:05d}-of-{shards:05d}" for shard in range(shards)]
        finished = distributed.broadcast_object([self._is_finished(directory, n) for n in names])
        done = sum(len(part) for part, flag in zip(parts, finished, strict=True) if flag)
        log.info("%s: the student scores %d samples in %d parts", label, len(rows) - done, shards)
        with Progress(len(rows), "samples", label, done=done) as progress:
            for part, name, flag in zip(parts, names, finished, strict=True):
                if flag:
                    continue
                self._raise_if_stopping(position)
                table = self._score_part(position.stage, part, progress)
                with distributed.raise_on_all_ranks("write the scores of a stage"):
                    if distributed.rank() == 0:
                        path = directory / f"{name}.npy"
                        with atomic_write(path, "wb") as stream:
                            save_array(stream, table)
                        write_manifest(
                            directory,
                            STEP,
                            self.fingerprint,
                            files=[path],
                            name=f"{name}.manifest.json",
                        )
        distributed.barrier()
        table = np.concatenate([np.load(directory / f"{name}.npy") for name in names])
        columns = MEASURED_SCORES if self.runs_teacher else MEASURED_SCORES[:1]
        return {name: table[:, number] for number, name in enumerate(columns)}

    @torch.no_grad()
    def _score_part(
        self, stage: int, rows: NDArray[np.int64], progress: Progress
    ) -> NDArray[np.float64]:
        """The columns of MEASURED_SCORES for some rows: [rows, 3]."""
        train, models = self.data.train, self.models
        sample_teachers = self.data.sample_teachers(train, rows)
        numbers = models.teacher_numbers(stage, sample_teachers, rows)
        costs = self.data.batch_costs(train, rows, numbers)
        assigned = self.data.even_batches(costs, sample_teachers)
        batches = [rows[members] for members in assigned.members]
        if self.runs_teacher:
            verify_damage(models.teacher.find_damage(train.name, np.concatenate(batches)))
        terms = SampleTerms(self.loss.name, dict(self.loss.options))
        if not self.runs_teacher:
            terms = SampleTerms("sft")

        # Every rank fills in its own rows; the sum over ranks is the table.
        table = torch.zeros(len(rows), 3, dtype=torch.float64, device=distributed.device())
        models.engine.module.eval()
        for batch in self.data.batches(
            train, batches, assigned.teachers, runs_teacher=self.runs_teacher
        ):
            self.monitor.report_alive()
            if self.runs_teacher:
                teacher = models.teacher_of(batch)
                outputs = teacher.outputs(batch)
                with teacher.head() as head:
                    losses = models.engine.forward(batch, terms, outputs, head)
            else:
                losses = models.engine.forward(batch, terms)
            if batch.rows:
                table[np.searchsorted(rows, batch.rows)] = torch.stack(losses, -1)
            progress.advance(len(batch.rows) * sequence_parallel.data_parallel_size())
        models.engine.module.train()
        sums: NDArray[np.float64] = distributed.all_sum(table).cpu().numpy()
        return sums / np.asarray(train.loss_tokens[rows], np.float64)[:, None]

    def _write(
        self,
        position: SamplerPosition,
        scores: SampleScores,
        rows: NDArray[np.int64],
        measured: dict[str, NDArray[np.float64]],
        seconds: float,
    ) -> None:
        """Rank and weigh the samples, and write the result; rank 0 calls it."""
        stage, directory = position.stage, self.directory(position.stage)
        # Rank the samples by the newest scores.
        columns = dict(scores.columns)
        for name, values in measured.items():
            columns[name] = np.array(columns.get(name, np.full(len(scores.ids), np.nan)))
            columns[name][rows] = values
        scores = SampleScores(scores.ids, columns, stage, scores.seed)
        order = order_by_difficulty(scores, self.config.difficulty, reverse=self.config.reverse)
        correlation = float(np.corrcoef(places(order), columns["place"])[0, 1])
        columns["place"] = places(order)

        # Weigh them, and write order, weights, scores and the manifest.
        weights = None
        (directory / WEIGHTS).unlink(missing_ok=True)  # of another training in this directory
        if self.weights:
            weights = weigh_samples(scores, self.weights.name, self.weights.options)
            log.info("stage %d: %s", stage + 1, weights_line(weights, self.weights.name))
            with atomic_write(directory / WEIGHTS, "wb") as stream:
                save_array(stream, weights)
        self.sampler.plan.with_order(stage, order, weights)  # whether it fills a batch
        with atomic_write(directory / ORDER, "wb") as stream:
            save_array(stream, order)
        ids = pa.array(np.asarray(scores.ids), pa.binary()).cast(pa.string())
        with atomic_write(directory / SCORES, "wb") as stream:
            pq.write_table(pa.table({"id": ids, **columns}), stream)
        record: dict[str, Any] = {
            "kind": "stage_ranking",
            "step": position.step,
            "stage": stage,
            "difficulty": self.config.difficulty,
            "samples": len(rows),
            "left_out": 0 if weights is None else int((weights == 0).sum()),
            "rank_correlation": correlation,
            "seconds": seconds,
        }
        log.info(
            "stage %d: ranked by %s of the current student in %.1f s; rank correlation with the "
            "order before %.3f",
            stage + 1,
            self.config.difficulty,
            seconds,
            correlation,
        )
        files = [directory / name for name in (ORDER, SCORES, WEIGHTS)]
        write_manifest(
            directory,
            STEP,
            self.fingerprint,
            info=record,
            files=[path for path in files if path.is_file()],
        )
        self.monitor.write(record)

    def _is_finished(self, directory: Path, name: str) -> bool:
        manifest = read_part(directory, f"{name}.manifest.json")
        return manifest is not None and manifest.fingerprint == self.fingerprint

    def _raise_if_stopping(self, position: SamplerPosition) -> None:
        """Raise Interrupted on all ranks if a signal reached any of them."""
        stopping = torch.tensor(
            [self.monitor.stop.number is not None], dtype=torch.int32, device=distributed.device()
        )
        if distributed.all_sum(stopping).item():
            raise self.monitor.interruption(position.step, self.sampler.plan.total_steps)
