"""The loop. It reads top-down; what it does at step s follows from the plan, the seed and s alone."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import LossConfig, TrainConfig
from pocl_ds.curriculum.micro_batches import deal, share_by_tokens
from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.sampler import Position, Sampler
from pocl_ds.curriculum.schedules import learning_rate
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.generated import Sequences
from pocl_ds.data.retokenize import Translator
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.engines.engine import Engine, seed_step
from pocl_ds.errors import RESUME, Interrupted
from pocl_ds.losses.fused_head import LossSums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.rollouts.policies import Asked, Policy
from pocl_ds.rollouts.rollout import Cost, Rollout
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import MetricsWriter, Progress, Spikes, read_metrics
from pocl_ds.teachers.teacher import Teacher
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.layout import Layout
from pocl_ds.training.non_finite import NonFinite
from pocl_ds.training.watchdog import Watchdog
from pocl_ds.workflow.run_dir import package_versions

log = logging.getLogger("pocl_ds")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TrainingData:
    """What the loop walks over: order[i] is the row of the i-th easiest sample."""

    split: EncodedSplit
    order: NDArray[np.int64]
    validation: EncodedSplit | None
    pad_id: int
    translate: Translator | None = None  # for a teacher with another tokenizer
    taught: EncodedSplit | None = None  # the training samples with responses that the teacher wrote


class StopFlag:
    """Remembers a signal; a second Ctrl-C ends at once. Handlers stand only inside the `with`
    block.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)


class Trainer:
    """Drives one student through one plan. Every rank runs the same loop."""

    def __init__(
        self,
        directory: Path,
        *,
        plan: Plan,
        sampler: Sampler,
        data: TrainingData,
        engine: Engine,
        teacher: Teacher | None,
        loss: LossConfig,
        train: TrainConfig,
        seed: int,
        fingerprint: str,
        label: str,
        layout: Layout,
        policy: Policy,
        rollout: Rollout | None,
    ) -> None:
        self.directory, self.plan, self.data = directory, plan, data
        self.engine, self.teacher, self.loss, self.train, self.seed, self.label = (
            engine,
            teacher,
            loss,
            train,
            seed,
            label,
        )
        self.sampler, self.layout, self.fingerprint, self.policy, self.rollout = (
            sampler,
            layout,
            fingerprint,
            policy,
            rollout,
        )
        self.checkpoints = Checkpoints(
            directory / "checkpoints", train.checkpoint, fingerprint=fingerprint
        )
        self.non_finite = NonFinite(directory, allowed=train.max_non_finite_steps)
        self.device = distributed.device()
        self.first_step = 0  # of this process: where it resumed
        self.validated = by_hash(
            data.validation.ids if data.validation else (), train.validate_max_samples
        )  # rows

    def run(self) -> None:
        """Train from the newest checkpoint to the end of the plan. Raises Interrupted after a
        signal, everything saved.
        """
        done, remembered = self.checkpoints.load(self.engine)
        self.first_step = done
        if remembered:
            self.policy.restore(remembered)
        if done:
            log.info("%s: going on after step %d of %d", self.label, done, self.plan.total_steps)
        writer, spikes = self._writer(done), Spikes()
        self.non_finite.skipped = distributed.from_rank_zero(
            len(read_metrics(writer.path, "skipped")) if writer else 0
        )
        total, saving = self.plan.total_steps, self.train.checkpoint
        if len(self.validated) and self.data.validation:
            log.info(
                "%s: validation looks at %d of %d samples, chosen by the hash of their ids",
                self.label,
                len(self.validated),
                len(self.data.validation),
            )
        distributed.agree(
            {
                "fingerprint": self.fingerprint,
                "first step": done,
                "steps": total,
                "packed": self.layout.packed,
                "train": self.train.model_dump_json(),
                **package_versions(),
            }
        )
        with (
            contextlib.closing(writer) if writer else contextlib.nullcontext(),
            contextlib.closing(self.rollout) if self.rollout else contextlib.nullcontext(),
            StopFlag() as stop,
            Watchdog(self.directory / "logs", self.train.hang_timeout_seconds) as self.watchdog,
            Progress(total, "steps", self.label, done=done) as progress,
        ):
            if done and self.rollout:
                self.rollout.restore(self.checkpoints.folder(done))
            if not done and self.policy.adaptive:  # later runs have it in their checkpoint
                self._validate(writer, stage=0, done=0)
            for step in range(done, total):
                self.watchdog.beat()
                position = self.sampler.at(step)
                if (
                    self.train.lr_restart == "per_stage"
                    and position.stage
                    and position.step_in_stage == 0
                ):
                    self.engine.restart_optimizer()
                record, stopping = self._step(position, stop)
                self._write(writer, record)
                trained = record["kind"] == "step"
                if trained and (times := spikes.seen(record["loss"], position.stage)) is not None:
                    log.warning(
                        "%s: the loss of step %d is %.1f times its recent median (%.4f)",
                        self.label,
                        step + 1,
                        times,
                        record["loss"],
                    )
                facts = (
                    {"loss": record["loss"], "tokens/s": record["tokens_per_second"]}
                    if trained
                    else {}
                )
                progress.advance(1, stage=f"{position.stage + 1}/{len(self.plan.stages)}", **facts)
                stage_ends = position.step_in_stage + 1 == self.plan.stages[position.stage].steps
                due = (
                    self.train.validate_every_n_steps is not None
                    and (step + 1) % self.train.validate_every_n_steps == 0
                )
                found = (
                    self._validate(writer, stage=position.stage, done=step + 1)
                    if stage_ends or due
                    else None
                )
                last = stopping or step + 1 == total
                if (
                    last
                    or (step + 1) % saving.every_n_steps == 0
                    or (stage_ends and saving.keep_best)
                ):
                    self.watchdog.beat()
                    writer_has = self.rollout.snapshot(step + 1) if self.rollout else None
                    self.checkpoints.save(
                        step + 1,
                        self.engine,
                        last_chance=last,
                        validation_loss=found,
                        remembered=self.policy.state(),
                        more=writer_has,
                    )
                if stopping and step + 1 < total:
                    number = stop.signal or signal.SIGTERM
                    raise Interrupted(
                        f"stopped by {signal.Signals(number).name} after step {step + 1} of "
                        f"{total}: everything up to "
                        "there is saved, the same command goes on from there",
                        exit_code=128 + number if number == signal.SIGINT else RESUME,
                    )

    def _step(self, position: Position, stop: StopFlag) -> tuple[dict[str, Any], bool]:
        """One optimizer step over the global batch. The denominator is its loss tokens, over all
        ranks and micro-batches.

        Returns its record, and whether any rank was asked to stop: both come with the step's one
        reduction.
        """
        start = time.monotonic()
        stage = self.plan.stages[position.stage]
        split, rows = self._sequences(
            position, np.asarray(self.data.order[self.sampler.batch(position.step)])
        )
        lengths = np.asarray(split.total_tokens[rows], np.int64)
        normaliser = int(split.loss_tokens[rows].sum())
        micro_batches = self._deal(lengths)
        terms = LossTerms(
            self.loss.name,
            stage.temperature,
            stage.sft_ratio,
            self.loss.scale_by_temperature_squared,
            dict(self.loss.options),
        )
        distributed.agree(
            {
                "step": position.step,
                "stage": position.stage,
                "micro-batches": len(micro_batches),
                "tokens": int(lengths.sum()),
                "loss tokens": normaliser,
                "teacher": self.teacher is not None,
                "temperature": stage.temperature,
            }
        )
        if self.teacher is not None:
            self.teacher.require(split.name, rows[np.concatenate(micro_batches)])
        sums, totals = torch.zeros(3, dtype=torch.float64, device=self.device), []
        for micro, members in enumerate(micro_batches):
            seed_step(self.seed, position.step, micro)
            batch = self._batch(split, rows[members]).to(self.device)
            total, kd_sum, ce_sum = self._forward(batch, terms)
            self.engine.backward(total, normaliser=normaliser, last=micro + 1 == len(micro_batches))
            totals.append(total.detach())
            sums += torch.stack([total.detach(), kd_sum, ce_sum])
        flags = sums.new_tensor([stop.signal is not None, self.checkpoints.writing])
        *reduced, stopping, writing = distributed.all_sum(torch.cat([sums, flags])).tolist()
        if not writing:
            self.checkpoints.settle()  # what was saved in the background is whole on all ranks
        loss, kd, ce = (value / normaliser for value in reduced)
        rate = learning_rate(
            *self._schedule_position(position),
            lr=self.train.lr,
            min_lr=self.train.min_lr,
            warmup=self.train.warmup_steps,
        )
        norm = self.engine.step(rate)
        pieces = [
            (split.ids[rows[members]], total)
            for members, total in zip(micro_batches, totals, strict=True)
        ]
        if skipped := self.non_finite.check(loss, norm, position, pieces):
            return skipped, stopping > 0
        seconds = time.monotonic() - start
        return {
            "kind": "step",
            "step": position.step + 1,
            "stage": position.stage,
            "epoch": position.epoch,
            "loss": loss,
            "kd": kd,
            "ce": ce,
            "temperature": stage.temperature,
            "sft_ratio": stage.sft_ratio,
            "lr": rate,
            "grad_norm": norm,
            "tokens": normaliser,
            "tokens_per_second": int(lengths.sum()) / seconds,
            "seconds": seconds,
            "sample_ids_digest": _digest(split.ids[rows]),
            **self._rollout_facts(split, seconds),
            **distributed.memory(),
        }, stopping > 0

    def _sequences(
        self, position: Position, rows: NDArray[np.int64]
    ) -> tuple[Sequences, NDArray[np.int64]]:
        """What a step trains on: the curriculum's rows of the data, or responses to their prompts
        that the policy has written.
        """
        stage = self.plan.stages[position.stage]
        return self.policy.sequences(
            Asked(
                position,
                self.plan.total_steps,
                self.data.split,
                rows,
                lambda: np.asarray(self.data.order[stage.start : stage.stop]),
                self.data.taught,
            )
        )

    def _rollout_facts(self, split: Sequences, seconds: float) -> dict[str, Any]:
        """For the record of a step, where the student may write: what it trained on, and what
        writing took.
        """
        if self.rollout is None:
            return {}
        cost, self.rollout.cost = self.rollout.cost, Cost()
        rate = cost.tokens / cost.seconds if cost.seconds else 0.0
        return {
            "on_policy": split is not self.data.split,
            "rollout_seconds": cost.seconds,
            "rollout_refresh_seconds": cost.refresh_seconds,
            "rollout_tokens": cost.tokens,
            "staleness": cost.staleness,
            "rollout_share": cost.seconds / seconds,
            "rollout_tokens_per_second": rate,
        }

    def _deal(self, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """This rank's micro-batches of a batch, as indices into it."""
        return deal(
            lengths,
            ranks=distributed.world_size(),
            micro_batch_size=self.train.micro_batch_size,
            micro_batch_tokens=self.train.micro_batch_tokens,
            packed=self.layout.packed,
        )[distributed.rank()]

    def _batch(self, split: Sequences, rows: NDArray[np.int64]) -> Batch:
        batch = collate(split, rows, self.data.pad_id, packed=self.layout.packed)
        return self.data.translate(split, batch) if self.data.translate else batch

    def _forward(self, batch: Batch, terms: LossTerms) -> LossSums:
        if self.teacher is None:
            plain: LossSums = self.engine(batch, terms)
            return plain
        hidden = self.teacher.states(batch)
        # The head is gathered after the body ran: a tied head is the body's embedding, which ZeRO-3
        # releases there.
        with self.teacher.head() as head:
            sums: LossSums = self.engine(batch, terms, hidden, head)
        return sums

    def _schedule_position(self, position: Position) -> tuple[int, int]:
        if self.train.lr_restart == "per_stage":
            return position.step_in_stage, self.plan.stages[position.stage].steps
        return position.step, self.plan.total_steps

    def _validate(self, writer: MetricsWriter | None, *, stage: int, done: int) -> float | None:
        """Write the validation loss after `done` steps down and tell the policy of it; None where
        no sample is looked at.
        """
        record = self._validation(stage, done)
        if record is None:
            return None
        self._write(writer, record)
        loss = float(record["validation_loss"])
        self.policy.validated(loss)
        return loss

    @torch.no_grad()
    def _validation(self, stage: int, done: int) -> dict[str, Any] | None:
        """Loss and divergence a token at temperature = 1 on the chosen validation samples; every rank makes
        as many forwards.
        """
        split, chosen = self.data.validation, self.validated
        if split is None or not len(chosen):
            return None
        lengths = np.asarray(split.total_tokens[chosen], np.int64)
        budget = self.train.micro_batch_tokens or self.train.micro_batch_size * int(lengths.max())
        mine = [
            chosen[members]
            for members in share_by_tokens(
                lengths,
                ranks=distributed.world_size(),
                tokens=max(budget, int(lengths.max())),
                packed=self.layout.packed,
            )[distributed.rank()]
        ]
        terms = LossTerms(self.loss.name, 1.0, 0.0, options=dict(self.loss.options))
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.teacher is not None:
            self.teacher.require(split.name, np.concatenate(mine))
        self.engine.module.eval()
        for rows in mine:  # a rank without a sample runs a token that does not count
            self.watchdog.beat()
            batch = self._batch(split, rows).to(self.device)
            _, kd_sum, ce_sum = self._forward(batch, terms)
            sums += torch.stack([kd_sum, ce_sum, kd_sum.new_tensor(batch.labels.numel())])
        self.engine.module.train()
        kd, ce, tokens = distributed.all_sum(sums).tolist()
        log.info(
            "%s: stage %d, step %d: validation loss %.4f, divergence %.4f a token",
            self.label,
            stage + 1,
            done,
            ce / tokens,
            kd / tokens,
        )
        return {
            "kind": "validation",
            "step": done,
            "stage": stage,
            "samples": len(chosen),
            "of": len(split),
            "validation_loss": ce / tokens,
            "validation_kd": kd / tokens,
            "validation_ce": ce / tokens,
        }

    def _writer(self, step: int) -> MetricsWriter | None:
        if distributed.rank():
            return None
        tracking = self.train.tracking
        return MetricsWriter(
            self.directory,
            step=step,
            tensorboard=tracking.tensorboard,
            wandb=tracking.wandb,
            wandb_project=tracking.wandb_project,
            name=self.label,
        )

    @staticmethod
    def _write(writer: MetricsWriter | None, record: dict[str, Any] | None) -> None:
        if writer and record:
            writer.write(record)


def by_hash(ids: Sequence[bytes] | NDArray[np.bytes_], limit: int) -> NDArray[np.int64]:
    """Rows of at most `limit` ids, those whose sha256 comes first, ascending: a file sorted by
    source gives of all kinds, and every run on the same data the same ones.
    """
    first = heapq.nsmallest(
        limit, ((hashlib.sha256(bytes(one)).digest(), row) for row, one in enumerate(ids))
    )
    return np.sort(np.array([row for _, row in first], np.int64))


def _digest(ids: NDArray[np.bytes_]) -> str:
    """Short digest of a batch's sample ids in order: equal runs show equal digests."""
    return hashlib.sha256(b"\n".join(ids.tolist())).hexdigest()[:16]
