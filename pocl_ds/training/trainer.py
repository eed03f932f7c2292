"""The training loop. Step s depends only on the plan, the seed and s."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_ds.config import LossConfig
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.teachers.teacher import raise_damage, verify_damage
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.non_finite import NonFiniteSteps
from pocl_ds.training.profiling import StepProfiler
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.seeding import seed_micro_batch
from pocl_ds.training.stage_ranking import StageRanking
from pocl_ds.training.step_batches import StepBatches, StepPlan
from pocl_ds.training.step_exchange import StepExchange, StepOutcome
from pocl_ds.training.step_timer import ROLLOUT, StepTimer
from pocl_ds.training.utilization import Utilization
from pocl_ds.training.validation import Validator
from pocl_ds.workflow.manifest import package_versions

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class RunningStep:
    """An optimizer step that was started, and what its metrics need once it is complete."""

    plan: StepPlan
    lr: float
    micro_batch_sums: list[Tensor]  # the loss sum of each micro-batch of this rank
    exchange: StepExchange
    timer: StepTimer
    ahead: StepPlan | None  # of the step that the exchange compares


class Trainer:
    """Trains one student through one plan. Every rank runs the same loop.

    models: student and teacher. data: samples and their batches. schedule: stages, learning
    rate and intervals. loss: section `loss` of the recipe. responses: responses that a step trains
    on. checkpoints: saving and loading of state. monitor: metrics, progress, signals. utilization:
    of the GPU's peak; None without a GPU whose peak is known. stage_ranking: ranks the samples when
    a stage begins; None if the plan's order stays.
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
        utilization: Utilization | None = None,
        stage_ranking: StageRanking | None = None,
    ) -> None:
        self.models, self.data, self.schedule, self.loss = models, data, schedule, loss
        self.responses, self.checkpoints, self.monitor = responses, checkpoints, monitor
        train = schedule.train
        self.validator = Validator(
            models, data, loss, monitor, max_samples=train.validate_max_samples
        )
        rule = loss.token_rule
        self.token_rule = TokenRule.of(rule.name, rule.options) if rule else None
        self.non_finite = NonFiniteSteps(monitor.directory, allowed=train.max_non_finite_steps)
        self.batches = StepBatches(responses, schedule, data, models)
        self.profiler = StepProfiler(monitor.directory / "profile", train.profile_steps)
        self.utilization, self.device = utilization, distributed.device()
        self.stage_ranking = stage_ranking
        # On a GPU the metrics of a step are read while the next one runs, so that the GPU never
        # waits for the host. A rollout waits for it anyway.
        self.reads_late = self.device.type == "cuda" and self.batches.works_ahead
        self.first_step = 0  # optimizer steps before this process resumed
        self.stopping = False  # a signal asked any rank to stop
        self.record: dict[str, Any] = {}  # metrics of the newest finished step
        self._running: RunningStep | None = None

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
            contextlib.closing(self.batches),
            contextlib.closing(self.profiler),
        ):
            self.non_finite.skipped = monitor.skipped_steps()
            self.validator.log_selection()
            if done:
                self.responses.restore(self.checkpoints.step_directory(done))
            elif self.responses.policy.adaptive:
                # An adaptive policy compares later losses with that of the untrained student.
                self._start_stage(0)
                self._validate(stage=0, step=0)

            if self.stage_ranking and done < total:
                self.stage_ranking.resume(schedule.sampler.position(done))

            for step in range(done, total):
                monitor.report_alive()
                position = schedule.sampler.position(step)
                self._start_stage(position.stage)
                if self.stage_ranking and schedule.starts_ranked_stage(position):
                    self.checkpoints.finalize_async_save()
                    self.stage_ranking.begin_stage(position)
                if schedule.restarts_optimizer(position):
                    self.models.engine.restart_optimizer()

                with self.profiler.step(step + 1):
                    self.train_step(position)

                validates, saves = (
                    schedule.validates_after(position),
                    schedule.saves_after(position),
                )
                if validates or saves or self.stopping:
                    self.finish_step()

                validation_loss = None
                if validates:
                    validation_loss = self._validate(stage=position.stage, step=step + 1)

                if saves or self.stopping:
                    is_final = self.stopping or step + 1 == total
                    self._save(step + 1, validation_loss, is_final=is_final)

                if self.stopping and step + 1 < total:
                    raise monitor.interruption(step + 1, total)

    def train_step(self, position: SamplerPosition) -> None:
        """Run one optimizer step over the global batch; `finish_step` gives its metrics. All ranks
        call it together.
        """
        models, timer = self.models, StepTimer(self.device)

        # Select the global batch, and this rank's micro-batches of it. The loss is a mean over the
        # loss tokens of the whole batch, whose weights every rank can add up.
        with timer.measure("data" if self.batches.works_ahead else ROLLOUT):
            plan = self.batches.select(position)
        self._check_new_plans()
        count = len(plan.micro_batches)
        terms = self._loss_terms(plan)

        # Forward and backward, one micro-batch at a time. The teacher's head is gathered after its
        # body has run: a tied head is the body's embedding, which ZeRO-3 releases at that point.
        sums, totals = torch.zeros(3, dtype=torch.float64, device=self.device), []
        batches = self.batches.micro_batches(plan)
        for number in range(count):
            seed_micro_batch(self.schedule.seed, position.step, number)
            with timer.measure("data"):
                batch = next(batches)
            teacher = models.teacher_of(batch)
            with timer.measure("teacher"):
                teacher_outputs = teacher.outputs(batch)
            with timer.measure("student"):
                with teacher.head() as teacher_head:
                    total, kd, ce = models.engine.forward(
                        batch, terms, teacher_outputs, teacher_head
                    )
                del teacher_outputs  # backward does not need them
                is_last = number + 1 == count
                models.engine.backward(total, normalizer=plan.loss_weight, is_last=is_last)
            totals.append(total.detach())
            sums += torch.stack([total.detach(), kd, ce])

        # While the GPU computes, finish the step before: if its loss was not finite, or the ranks
        # differ, the run stops before another update.
        self.finish_step()

        # Clip the gradients and update the weights. A step that is not finite changes nothing.
        lr = self.schedule.learning_rate(position)
        with timer.measure("optimizer"):
            grad_norm = models.engine.step(lr)

        # Sum the losses over ranks, agree on stopping, and compare what a later step trains on:
        # ranks that do different things would hang there.
        ahead = self.batches.plan_ahead(position)
        exchange = StepExchange(
            sums,
            grad_norm,
            stopping=self.monitor.stop.number is not None,
            is_writing=self.checkpoints.is_writing,
            is_damaged=ahead is not None and ahead.damage is not None,
            facts=self._facts(ahead),
        )
        timer.stop()
        self._running = RunningStep(plan, lr, totals, exchange, timer, ahead)
        if not self.reads_late:
            self.finish_step()

    def finish_step(self) -> dict[str, Any]:
        """Wait for the step that was started last, log its metrics and return them. All ranks call
        it together. Does nothing if that step is finished.
        """
        step, self._running = self._running, None
        if step is None:
            return self.record
        step.timer.wait()
        outcome = step.exchange.read()
        self.stopping = self.stopping or outcome.stopping
        # A background save that all ranks have finished is completed here.
        if not outcome.is_writing:
            self.checkpoints.finalize_async_save()

        loss = outcome.total_sum / step.plan.loss_weight
        pieces = [
            (step.plan.dataset.ids[rows], total)
            for rows, total in zip(step.plan.micro_batches, step.micro_batch_sums, strict=True)
        ]
        skipped = self.non_finite.check(loss, outcome.grad_norm, step.plan.position, pieces)
        self.record = skipped or self._record(step, outcome)
        self.monitor.log_step(self.record, num_stages=len(self.schedule.plan.stages))

        if not outcome.ranks_agree:
            distributed.raise_disagreement(self._facts(step.ahead))
        if outcome.is_damaged:
            raise_damage(step.ahead.damage if step.ahead else None)
        return self.record

    def _loss_terms(self, plan: StepPlan) -> LossTerms:
        """The loss of a step: the divergence by who wrote its responses, and the temperature and
        SFT ratio of its stage.
        """
        stage, divergence = self.schedule.stage(plan.position), self.loss.of_writer(plan.writer)
        return LossTerms(
            divergence.name,
            stage.temperature,
            stage.sft_ratio,
            self.loss.scale_by_temperature_squared,
            dict(divergence.options),
            self.token_rule,
        )

    def _record(self, step: RunningStep, outcome: StepOutcome) -> dict[str, Any]:
        """The metrics of a step. Losses are in nats per token."""
        plan, seconds = step.plan, step.timer.seconds
        stage, loss_tokens = self.schedule.stage(plan.position), plan.loss_tokens
        tokens_per_second = int(plan.lengths.sum()) / seconds
        on_policy = plan.dataset is not self.data.train
        record = {
            "kind": "step",
            "step": plan.position.step + 1,
            "stage": plan.position.stage,
            "epoch": plan.position.epoch,
            "loss": outcome.total_sum / plan.loss_weight,
            "kd_loss": outcome.kd_sum / loss_tokens,
            "sft_loss": outcome.sft_sum / loss_tokens,
            "lr": step.lr,
            "grad_norm": outcome.grad_norm,
            "temperature": stage.temperature,
            "sft_ratio": stage.sft_ratio,
            "writer": plan.writer,
            **self.models.metrics_of_teachers(plan.position.stage, plan.sample_teachers),
            "loss_tokens": loss_tokens,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_rank": tokens_per_second / distributed.world_size(),
            "seconds": seconds,
            **step.timer.breakdown(),
            "sample_ids_digest": plan.ids_digest,
            **self.responses.metrics(on_policy=on_policy, step_seconds=seconds),
            **distributed.memory_metrics(),
        }
        if sequence_parallel.data_parallel_size() > 1:
            record["load_imbalance"] = plan.load_imbalance
        if self.utilization:
            record["mfu"] = self.utilization.of_step(
                plan.lengths,
                plan.sample_loss_tokens,
                seconds,
                self.models.teacher_numbers(plan.position.stage, plan.sample_teachers, plan.rows),
            )
        return record

    def _start_stage(self, stage: int) -> None:
        """Load the teacher of a stage, if it has another one than the stage before."""
        self.models.start_stage(stage)
        self.monitor.report_alive()

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
        self.monitor.sync()
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

    def _check_new_plans(self) -> None:
        """Check that all ranks train on the same in steps that no exchange has compared: the first
        ones, and with on-policy data every step.
        """
        plans, self.batches.unchecked = self.batches.unchecked, []
        for plan in plans:
            distributed.assert_ranks_agree(self._facts(plan))
            verify_damage(plan.damage)

    def _facts(self, plan: StepPlan | None) -> dict[str, Any]:
        """What must be equal on all ranks before a step; empty without one."""
        if plan is None:
            return {}
        return {
            **plan.facts(),
            "teacher": self.models.has_teacher,
            "temperature": self.schedule.stage(plan.position).temperature,
        }
