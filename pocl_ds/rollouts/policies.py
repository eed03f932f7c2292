"""Policies select the responses that the next optimizer step trains on.

All ranks call the policy once per step, with the rows that the curriculum selects. The prompts are
those of the rows; the policy selects the source of the responses: the data, the student or the
teacher. Random draws depend only on seed and step, and the state of a policy is part of the
checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PolicyConfig
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import GeneratedBatch, TokenizedDataset

log = logging.getLogger("pocl_ds")

Rows = NDArray[np.int64]
# Generates the student's responses to the prompts of some rows. All ranks call it together.
GenerateResponses = Callable[[Rows, SamplerPosition], GeneratedBatch]


@dataclass(frozen=True)
class BatchRequest:
    """What a policy needs to know to select the batch of one optimizer step."""

    position: SamplerPosition
    total_steps: int
    dataset: TokenizedDataset
    rows: Rows  # of the dataset, selected by the curriculum
    stage_rows: Callable[[], Rows]  # all rows of the current stage
    # The rows of the dataset with the teacher's responses, if the recipe generates them.
    teacher_responses: TokenizedDataset | None = None


class Policy(Protocol):
    """See the module docstring. All ranks call every method with the same arguments."""

    @property
    def adaptive(self) -> bool:
        """Whether the policy depends on the validation loss. If so, the trainer also validates
        before the first step.
        """

    @property
    def stateless(self) -> bool:
        """Whether a batch depends on its request alone. If so, the trainer selects batches ahead of
        time, in another thread.
        """

    def select_batch(self, request: BatchRequest) -> tuple[TokenizedDataset, Rows]:
        """Select what the step trains on: a dataset and as many of its rows as were requested."""

    def will_generate(self, request: BatchRequest) -> bool:
        """Whether the student will generate responses for the step after the current one. With
        `policy.staleness: 1` they are generated while the current step trains. If `select_batch`
        then needs responses that were not expected, it waits for them.
        """

    def observe_validation_loss(self, loss: float) -> None:
        """Record the validation loss, in nats per token."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class OffPolicy:
    """Trains on the responses of the dataset."""

    adaptive = False

    @property
    def stateless(self) -> bool:
        """See `Policy`. A subclass that selects batches itself says so for itself."""
        return type(self).select_batch is OffPolicy.select_batch

    def select_batch(self, request: BatchRequest) -> tuple[TokenizedDataset, Rows]:
        """See `Policy`."""
        return request.dataset, request.rows

    def will_generate(self, request: BatchRequest) -> bool:
        """See `Policy`."""
        return False

    def observe_validation_loss(self, loss: float) -> None:
        """See `Policy`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""


class GKD(OffPolicy):
    """With probability `lmbda`, trains a step on the student's responses (Agarwal et al.,
    arXiv 2306.13649; docs/method.md, eq. 24).
    """

    def __init__(self, config: PolicyConfig, generate: GenerateResponses, seed: int) -> None:
        self.config, self.generate, self.seed = config, generate, seed

    def select_batch(self, request: BatchRequest) -> tuple[TokenizedDataset, Rows]:
        """See `Policy`."""
        if not self.will_generate(request):
            return request.dataset, request.rows
        generated = self.generate(request.rows, request.position)
        return generated, np.arange(len(generated))

    def will_generate(self, request: BatchRequest) -> bool:
        """See `Policy`."""
        return uniform_draw(self.seed, request.position.step, 0) < self.config.lmbda


class ResponseMixture(OffPolicy):
    """Trains a step on the data's, the student's or the teacher's responses, with the probabilities
    in `policy.shares`.
    """

    def __init__(self, config: PolicyConfig, generate: GenerateResponses, seed: int) -> None:
        self.shares, self.generate, self.seed = config.shares, generate, seed

    @property
    def stateless(self) -> bool:
        """See `Policy`."""
        return self.shares.student == 0

    def select_batch(self, request: BatchRequest) -> tuple[TokenizedDataset, Rows]:
        """See `Policy`."""
        source = self._draw_source(request)
        if source == "student":
            generated = self.generate(request.rows, request.position)
            return generated, np.arange(len(generated))
        if source == "teacher" and request.teacher_responses is not None:
            return request.teacher_responses, request.rows
        return request.dataset, request.rows

    def will_generate(self, request: BatchRequest) -> bool:
        """See `Policy`."""
        return self._draw_source(request) == "student"

    def _draw_source(self, request: BatchRequest) -> str:
        edges = np.cumsum([self.shares.data, self.shares.student, self.shares.teacher])
        draw = uniform_draw(self.seed, request.position.step, 0)
        source = int(np.searchsorted(edges / edges[-1], draw, side="right"))
        return ("data", "student", "teacher")[source]


@dataclass
class DistiLLM:
    """Adaptive off-policy training with a replay buffer (Ko et al., arXiv 2402.03898;
    docs/method.md, eq. 25).

    phi starts at 0 and grows whenever the validation loss has risen. With probability phi a step
    trains on the student's responses. With probability phi (1 - step / total_steps), and until the
    buffer is full, they are generated for the step; otherwise they come from the buffer. One random
    number decides both, as in the authors' release.
    """

    config: PolicyConfig
    generate: GenerateResponses
    seed: int
    phi: float = 0.0
    reference_loss: float | None = None  # the validation loss that the next one is compared with
    buffer: GeneratedBatch | None = field(default=None, repr=False)
    adaptive = True
    stateless = False

    def select_batch(self, request: BatchRequest) -> tuple[TokenizedDataset, Rows]:
        """See `Policy`."""
        # Train on the dataset's responses with probability 1 - phi.
        step, count = request.position.step, len(request.rows)
        if uniform_draw(self.seed, step, 0) >= self.phi:
            return request.dataset, request.rows

        # Generate new responses, and add them to the buffer.
        if self.will_generate(request):
            generated = self.generate(request.rows, request.position)
            self._add_to_buffer(generated)
            return generated, np.arange(len(generated))

        # Or replay responses to the stage's prompts from the buffer.
        assert self.buffer is not None
        generator = np.random.default_rng([self.seed, step, 1])
        candidates = self._buffer_rows_of_stage(request)
        replayed = self.buffer.select(np.sort(generator.choice(candidates, count, replace=False)))
        return replayed, np.arange(len(replayed))

    def will_generate(self, request: BatchRequest) -> bool:
        """See `Policy`. A validation between this call and the step only raises phi, which never
        turns a step with new responses into another one.
        """
        step, draw = request.position.step, uniform_draw(self.seed, request.position.step, 0)
        if draw >= self.phi:
            return False
        if self.buffer is None or len(self.buffer) < self.config.replay_buffer_size:
            return True
        if draw < self.phi * (1 - step / request.total_steps):
            return True
        return len(self._buffer_rows_of_stage(request)) < len(request.rows)

    def observe_validation_loss(self, loss: float) -> None:
        """See `Policy`. The reference is the loss before the first step, and later the most recent
        loss that counted as a rise. So a loss that stays high counts once, as in the authors'
        release.
        """
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self.config.loss_tolerance:
            self.phi = min(1.0, self.phi + self.config.phi_step)
            log.info(
                "the validation loss rose from %.4f to %.4f: from now on %.0f%% of the steps train "
                "on the student's responses",
                self.reference_loss,
                loss,
                100 * self.phi,
            )
            self.reference_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        state: dict[str, Any] = {"phi": self.phi, "reference_loss": self.reference_loss}
        if self.buffer is not None:
            state["rows"] = self.buffer.rows.tolist()
            state["ids"] = [sample_id.decode() for sample_id in self.buffer.ids]
            state["prompt_tokens"] = self.buffer.prompt_tokens.tolist()
            state["sequences"] = [sequence.tolist() for sequence in self.buffer.sequences]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        self.phi, self.reference_loss = state["phi"], state["reference_loss"]
        if "rows" in state:
            self.buffer = GeneratedBatch(
                np.array(state["rows"], np.int64),
                np.array([sample_id.encode() for sample_id in state["ids"]], "S"),
                np.array(state["prompt_tokens"], np.int64),
                [np.array(sequence, np.uint32) for sequence in state["sequences"]],
            )

    def _buffer_rows_of_stage(self, request: BatchRequest) -> Rows:
        """Rows of the buffer whose prompts belong to the current stage: replayed responses follow
        the curriculum too.
        """
        if self.buffer is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.isin(self.buffer.rows, request.stage_rows()))

    def _add_to_buffer(self, generated: GeneratedBatch) -> None:
        """Add responses to the buffer, and keep its newest `replay_buffer_size`."""
        joined = generated if self.buffer is None else self.buffer.concatenate(generated)
        start = max(0, len(joined) - self.config.replay_buffer_size)
        self.buffer = joined.select(np.arange(start, len(joined)))


# Policies by their name in the recipe; each is constructed from (config, generate, seed).
POLICIES: dict[str, Callable[..., Policy]] = {
    "off": lambda config, generate, seed: OffPolicy(),
    # The teacher's responses, generated before training, are the dataset.
    "seqkd": lambda config, generate, seed: OffPolicy(),
    "gkd": GKD,
    "mixture": ResponseMixture,
    "distillm": DistiLLM,
}


def uniform_draw(seed: int, step: int, stream: int) -> float:
    """A random number in [0, 1) that depends only on the arguments: the same on all ranks, and
    after a resume.
    """
    return float(np.random.default_rng([seed, step, stream]).random())
