"""The training loop. Step s depends only on the plan, the seed and s."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import LossConfig
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.runtime import distributed
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.non_finite import NonFiniteSteps
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.seeding import seed_micro_batch
from pocl_ds.training.validation import Validator
from pocl_ds.workflow.manifest import package_versions

log = logging.getLogger("pocl_ds")


class StepResult(NamedTuple):
    """The metrics of an optimizer step, and whether a signal asked any rank to stop."""

    record: dict[str, Any]
    stopping: bool


class Trainer:
    """Trains one student through one plan. Every rank runs the same loop.

    models: student and teacher. data: samples and their batches. schedule: stages, learning
    rate and intervals. loss: section `loss` of the recipe. responses: responses that a step trains
    on. checkpoints: saving and loading of state. monitor: metrics, progress, signals.
    """

    def __init__(
        self,
        models: TrainingModels,
        data: TrainingData,
        schedule: TrainingSchedule,
        loss: LossConfig,
        responses: ResponseSource,
        checkpoints: Checkpoints,
        monitor: TrainingMonitor,
    ) -> None:
        self.models, self.data, self.schedule, self.loss = models, data, schedule, loss
        self.responses, self.checkpoints, self.monitor = responses, checkpoints, monitor
        train = schedule.train
        self.validator = Validator(
            models, data, loss, monitor, max_samples=train.validate_max_samples
        )
        self.non_finite = NonFiniteSteps(monitor.directory, allowed=train.max_non_finite_steps)
        self.first_step = 0  # optimizer steps before this process resumed

    def run(self) -> None:
        """Train from the newest checkpoint to the end of the plan.

        Raises Interrupted after a signal, with everything saved, and NumericalError if a loss or
        gradient is not finite more often than the recipe allows.
        """
        schedule, monitor = self.schedule, self.monitor
        total = schedule.total_steps

        # Resume from the newest checkpoint, and check that all ranks do.
        done, policy_state = self.checkpoints.load(self.models.engine)
        self.first_step = done
        if policy_state:
            self.responses.policy.load_state_dict(policy_state)
        if done:
            log.info("%s: resuming after step %d of %d", monitor.label, done, total)
        self._assert_same_training()

        with (
            contextlib.closing(self.responses),
            monitor.running(first_step=done, total_steps=total),
        ):
            self.non_finite.skipped = monitor.skipped_steps()
            self.validator.log_selection()
            if done:
                self.responses.restore(self.checkpoints.step_directory(done))
            elif self.responses.policy.adaptive:
                # An adaptive policy compares later losses with that of the untrained student.
                self._validate(stage=0, step=0)

            for step in range(done, total):
                monitor.report_alive()
                position = schedule.sampler.position(step)
                if schedule.restarts_optimizer(position):
                    self.models.engine.restart_optimizer()

                record, stopping = self.train_step(position)
                monitor.log_step(record, num_stages=len(schedule.plan.stages))

                validation_loss = None
                if schedule.validates_after(position):
                    validation_loss = self._validate(stage=position.stage, step=step + 1)

                if stopping or schedule.saves_after(position):
                    is_final = stopping or step + 1 == total
                    self._save(step + 1, validation_loss, is_final=is_final)

                if stopping and step + 1 < total:
                    raise monitor.interruption(step + 1, total)

    def train_step(self, position: SamplerPosition) -> StepResult:
        """One optimizer step over the global batch. All ranks call it together."""
        start = time.monotonic()
        models, terms = self.models, self._loss_terms(position)

        # Select the global batch, and this rank's micro-batches of it. The loss is a mean over the
        # loss tokens of the whole batch, which every rank can count.
        dataset, rows = self.responses.select_batch(position, self.schedule, self.data)
        lengths = np.asarray(dataset.total_tokens[rows], np.int64)
        loss_tokens = int(dataset.loss_tokens[rows].sum())
        micro_batches = [rows[members] for members in self.data.micro_batches(lengths)]

        # Ranks that do different things would hang; detect it before the first forward.
        self._assert_same_step(position, len(micro_batches), int(lengths.sum()), loss_tokens)
        models.teacher.verify(dataset.name, np.concatenate(micro_batches))

        # Forward and backward, one micro-batch at a time. The teacher's head is gathered after its
        # body has run: a tied head is the body's embedding, which ZeRO-3 releases at that point.
        sums, totals = torch.zeros(3, dtype=torch.float64, device=distributed.device()), []
        for number, micro_batch in enumerate(micro_batches):
            seed_micro_batch(self.schedule.seed, position.step, number)
            batch = self.data.batch(dataset, micro_batch)
            teacher_outputs = models.teacher.outputs(batch)
            with models.teacher.head() as teacher_head:
                total, kd, ce = models.engine.forward(batch, terms, teacher_outputs, teacher_head)
            del teacher_outputs  # backward does not need them
            is_last = number + 1 == len(micro_batches)
            models.engine.backward(total, normalizer=loss_tokens, is_last=is_last)
            totals.append(total.detach())
            sums += torch.stack([total.detach(), kd, ce])

        # Sum the losses over ranks; the same reduction decides whether all ranks stop.
        sums, stopping = self._reduce(sums)
        loss, kd_loss, sft_loss = (float(value) / loss_tokens for value in sums)

        # Clip the gradients and update the weights. A step that is not finite changes nothing.
        lr = self.schedule.learning_rate(position)
        grad_norm = models.engine.step(lr)
        pieces = [
            (dataset.ids[micro_batch], total)
            for micro_batch, total in zip(micro_batches, totals, strict=True)
        ]
        if skipped := self.non_finite.check(loss, grad_norm, position, pieces):
            return StepResult(skipped, stopping)

        record = self._record(
            position,
            dataset,
            rows,
            seconds=time.monotonic() - start,
            loss=loss,
            kd_loss=kd_loss,
            sft_loss=sft_loss,
            lr=lr,
            grad_norm=grad_norm,
        )
        return StepResult(record, stopping)

    def _loss_terms(self, position: SamplerPosition) -> LossTerms:
        """The loss of a step, with the temperature and SFT ratio of its stage."""
        stage = self.schedule.stage(position)
        return LossTerms(
            self.loss.name,
            stage.temperature,
            stage.sft_ratio,
            self.loss.scale_by_temperature_squared,
            dict(self.loss.options),
        )

    def _record(
        self,
        position: SamplerPosition,
        dataset: TokenizedDataset,
        rows: NDArray[np.int64],
        *,
        seconds: float,
        **values: float,
    ) -> dict[str, Any]:
        """The metrics of a step. Losses are in nats per token."""
        stage = self.schedule.stage(position)
        on_policy = dataset is not self.data.train
        return {
            "kind": "step",
            "step": position.step + 1,
            "stage": position.stage,
            "epoch": position.epoch,
            **values,
            "temperature": stage.temperature,
            "sft_ratio": stage.sft_ratio,
            "loss_tokens": int(dataset.loss_tokens[rows].sum()),
            "tokens_per_second": int(np.sum(dataset.total_tokens[rows], dtype=np.int64)) / seconds,
            "seconds": seconds,
            "sample_ids_digest": _digest(dataset.ids[rows]),
            **self.responses.metrics(on_policy=on_policy, step_seconds=seconds),
            **distributed.memory_metrics(),
        }

    def _reduce(self, sums: Tensor) -> tuple[Tensor, bool]:
        """Sum over ranks, and whether a signal reached any of them. A background save that all
        ranks have finished is completed here.
        """
        flags = [self.monitor.stop.number is not None, self.checkpoints.is_writing]
        reduced = distributed.all_sum(torch.cat([sums, sums.new_tensor(flags)])).cpu()
        stopping, writing = (bool(flag) for flag in reduced[-2:])
        if not writing:
            self.checkpoints.finalize_async_save()
        return reduced[:-2], stopping

    def _validate(self, *, stage: int, step: int) -> float | None:
        """Log the validation loss after `step` optimizer steps and pass it to the policy; None if
        there is no validation sample.
        """
        record = self.validator.run(stage=stage, step=step)
        if record is None:
            return None
        self.monitor.write(record)
        loss = float(record["validation_loss"])
        self.responses.policy.observe_validation_loss(loss)
        return loss

    def _save(self, step: int, validation_loss: float | None, *, is_final: bool) -> None:
        self.monitor.report_alive()
        self.checkpoints.save(
            step,
            self.models.engine,
            is_final=is_final,
            validation_loss=validation_loss,
            policy_state=self.responses.policy.state_dict(),
            write_extra_files=self.responses.snapshot(step),
        )

    def _assert_same_training(self) -> None:
        distributed.assert_ranks_agree(
            {
                "fingerprint": self.checkpoints.fingerprint,
                "first step": self.first_step,
                "steps": self.schedule.total_steps,
                "packed": self.data.layout.packed,
                "train": self.schedule.train.model_dump_json(),
                **package_versions(),
            }
        )

    def _assert_same_step(
        self, position: SamplerPosition, micro_batches: int, tokens: int, loss_tokens: int
    ) -> None:
        distributed.assert_ranks_agree(
            {
                "step": position.step,
                "stage": position.stage,
                "micro-batches": micro_batches,
                "tokens": tokens,
                "loss tokens": loss_tokens,
                "teacher": self.models.has_teacher,
                "temperature": self.schedule.stage(position).temperature,
            }
        )


def _digest(ids: NDArray[np.bytes_]) -> str:
    """A short digest of a batch's sample ids in order: equal runs show equal digests."""
    return hashlib.sha256(b"\n".join(ids.tolist())).hexdigest()[:16]
