"""Loss on the validation samples during training."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import LossConfig
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.runtime import distributed
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.teachers.teacher import verify_damage
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor

log = logging.getLogger("pocl_ds")

MAX_VALIDATED_DOMAINS = 16  # each domain has separate forward passes


class Validator:
    """Computes the validation loss on at most `max_samples` samples, chosen by the hash of their
    ids: every run on the same data uses the same ones, also from a file that is sorted by source.
    """

    def __init__(
        self,
        models: TrainingModels,
        data: TrainingData,
        loss: LossConfig,
        monitor: TrainingMonitor,
        *,
        max_samples: int,
    ) -> None:
        self.models, self.data, self.loss, self.monitor = models, data, loss, monitor
        ids = data.validation.ids if data.validation else ()
        self.rows = np.array(select_by_hash(ids, max_samples), np.int64)
        self.rows_by_domain = _by_domain(self.rows, data.validation_domains)

    def log_selection(self) -> None:
        """Log how many samples are used."""
        if self.data.validation and len(self.rows):
            log.info(
                "%s: validation uses %d of %d samples, chosen by the hash of their ids",
                self.monitor.label,
                len(self.rows),
                len(self.data.validation),
            )

    @torch.no_grad()
    def run(self, *, stage: int, step: int) -> dict[str, Any] | None:
        """The record of a validation after `step` optimizer steps: cross-entropy and divergence in
        nats per token at temperature 1. None if there is no validation sample.
        """
        split = self.data.validation
        if split is None or not len(self.rows):
            return None
        sums = {
            domain: self._sum(split, rows, stage) for domain, rows in self.rows_by_domain.items()
        }
        validation_loss, kd_loss = _means(sum(sums.values(), start=np.zeros(3)))
        by_domain = {domain: _means(domain_sums) for domain, domain_sums in sums.items()}
        log.info(
            "%s: stage=%d step=%d validation_loss=%.4f validation_kd_loss=%.4f",
            self.monitor.label,
            stage + 1,
            step,
            validation_loss,
            kd_loss,
        )
        return {
            "kind": "validation",
            "step": step,
            "stage": stage,
            "samples": len(self.rows),
            "total_samples": len(split),
            "validation_loss": validation_loss,
            "validation_kd_loss": kd_loss,
            **(
                {
                    "validation_loss_by_domain": {d: ce for d, (ce, _) in by_domain.items()},
                    "validation_kd_loss_by_domain": {d: kd for d, (_, kd) in by_domain.items()},
                }
                if len(by_domain) > 1
                else {}
            ),
            **self.models.metrics_of_teachers(stage, self.data.sample_teachers(split, self.rows)),
        }

    def _sum(self, split: TokenizedSplit, rows: NDArray[np.int64], stage: int) -> Floats:
        """Divergence, cross-entropy and tokens, summed over these samples and all ranks: [3]."""
        # Every rank runs the same number of forward passes.
        sample_teachers = self.data.sample_teachers(split, rows)
        numbers = self.models.teacher_numbers(stage, sample_teachers, rows)
        costs = self.data.batch_costs(split, rows, numbers)
        assigned = self.data.even_batches(costs, sample_teachers)
        batches = [rows[members] for members in assigned.members]
        verify_damage(self.models.teacher.find_damage(split.name, np.concatenate(batches)))

        terms = LossTerms(self.loss.name, 1.0, 0.0, options=dict(self.loss.options))
        sums = torch.zeros(3, dtype=torch.float64, device=distributed.device())
        self.models.engine.module.eval()
        for batch in self.data.batches(split, batches, assigned.teachers):
            self.monitor.report_alive()
            teacher = self.models.teacher_of(batch)
            outputs = teacher.outputs(batch)
            with teacher.head() as head:
                _, kd, ce = self.models.engine.forward(batch, terms, outputs, head)
            sums += torch.stack([kd, ce, kd.new_tensor(batch.labels.numel())])
        self.models.engine.module.train()
        return np.array(distributed.all_sum(sums).tolist())


def _by_domain(
    rows: NDArray[np.int64], domains: SplitLabels | None
) -> dict[str, NDArray[np.int64]]:
    """The rows of each domain; all of them as one if there is one domain or there are too many."""
    numbers = domains.numbers[rows] if domains else np.zeros(len(rows))
    present = np.unique(numbers)
    if domains is None or len(present) > MAX_VALIDATED_DOMAINS:
        return {"": rows}
    return {domains.names[int(number)]: rows[numbers == number] for number in present}


def _means(sums: Floats) -> tuple[float, float]:
    """Cross-entropy and divergence in nats per token, of the sums of `Validator._sum`."""
    kd, ce, tokens = sums.tolist()
    return ce / tokens, kd / tokens
