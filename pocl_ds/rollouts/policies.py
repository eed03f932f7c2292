"""Policies: which sequences does the next step train on? (METHOD 3)

A policy is asked at each step, on all ranks alike, with the rows that the curriculum gives; the
prompts stay those, what may change is who wrote the responses. What it draws follows from seed and
step alone; what it remembers goes into checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PolicyConfig
from pocl_ds.curriculum.sampler import Position
from pocl_ds.data.generated import Sequences, Written

log = logging.getLogger("pocl_ds")

Rows = NDArray[np.int64]
Write = Callable[
    [Rows, Position], Written
]  # the student's responses to the prompts of some rows, by all ranks together


@dataclass(frozen=True)
class Asked:
    """One step's question. rows: of the split, from the curriculum; stage_rows: all rows of the
    stage, for what is kept.
    """

    position: Position
    total_steps: int
    split: Sequences
    rows: Rows
    stage_rows: Callable[[], Rows]
    taught: Sequences | None = None  # the same rows with responses that the teacher wrote


class Policy(Protocol):
    """See the module. Every method is called by all ranks with the same arguments."""

    @property
    def adaptive(self) -> bool:
        """Whether it follows the validation loss: it is then told of that before the first step
        too.
        """

    def sequences(self, asked: Asked) -> tuple[Sequences, Rows]:
        """What the step trains on, and which rows of it: as many as were asked for."""

    def validated(self, loss: float) -> None:
        """Learn of a validation loss."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


class Off:
    """The data's own responses."""

    adaptive = False

    def sequences(self, asked: Asked) -> tuple[Sequences, Rows]:
        """See `Policy`."""
        return asked.split, asked.rows

    def validated(self, loss: float) -> None:
        """See `Policy`."""

    def state(self) -> dict[str, Any]:
        """See `Policy`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Policy`."""


class Gkd(Off):
    """With probability lmbda the student writes a step's responses (Agarwal et al., arXiv
    2306.13649).
    """

    def __init__(self, config: PolicyConfig, write: Write, seed: int) -> None:
        self.config, self.write, self.seed = config, write, seed

    def sequences(self, asked: Asked) -> tuple[Sequences, Rows]:
        """See `Policy`."""
        if draw(self.seed, asked.position.step, 0) >= self.config.lmbda:
            return asked.split, asked.rows
        written = self.write(asked.rows, asked.position)
        return written, np.arange(len(written))


class Mixture(Off):
    """A step's responses are the data's, the student's or the teacher's, with the probabilities of
    policy.shares.
    """

    def __init__(self, config: PolicyConfig, write: Write, seed: int) -> None:
        self.shares, self.write, self.seed = config.shares, write, seed

    def sequences(self, asked: Asked) -> tuple[Sequences, Rows]:
        """See `Policy`."""
        edges = np.cumsum([self.shares.data, self.shares.student, self.shares.teacher])
        source = int(
            np.searchsorted(
                edges / edges[-1], draw(self.seed, asked.position.step, 0), side="right"
            )
        )
        if source == 1:
            written = self.write(asked.rows, asked.position)
            return written, np.arange(len(written))
        if source == 2 and asked.taught is not None:
            return asked.taught, asked.rows
        return asked.split, asked.rows


@dataclass
class Distillm:
    """Adaptive off-policy training with a replay buffer (Ko et al., arXiv 2402.03898).

    phi starts at 0 and grows whenever the validation loss has risen. With probability phi a step
    sees the student's responses: with probability phi (1 - step / total), and while the buffer
    fills, written anew, else drawn from it. One number is held against both, as in the authors'
    release.
    """

    config: PolicyConfig
    write: Write
    seed: int
    phi: float = 0.0
    accepted: float | None = None  # the validation loss that a later one is compared with
    buffer: Written | None = field(default=None, repr=False)
    adaptive = True

    def sequences(self, asked: Asked) -> tuple[Sequences, Rows]:
        """See `Policy`."""
        step = asked.position.step
        drawn = draw(self.seed, step, 0)
        if drawn >= self.phi:
            return asked.split, asked.rows
        kept = self._of_stage(asked)
        full = self.buffer is not None and len(self.buffer) >= self.config.replay_buffer_size
        anew = drawn < self.phi * (1 - step / asked.total_steps)
        if not full or anew or len(kept) < len(asked.rows):
            written = self.write(asked.rows, asked.position)
            self._remember(written)
            return written, np.arange(len(written))
        assert self.buffer is not None
        generator = np.random.default_rng([self.seed, step, 1])
        chosen = self.buffer.picked(np.sort(generator.choice(kept, len(asked.rows), replace=False)))
        return chosen, np.arange(len(chosen))

    def validated(self, loss: float) -> None:
        """See `Policy`. As in the release the loss before the first step is the one to compare
        with, and then each that counted as a rise: one that stays higher counts once.
        """
        if self.accepted is None:
            self.accepted = loss
        elif loss >= self.accepted + self.config.loss_tolerance:
            self.phi = min(1.0, self.phi + self.config.phi_step)
            log.info(
                "the validation loss rose from %.4f to %.4f: from here on the student's responses "
                "have %.0f%% of the steps",
                self.accepted,
                loss,
                100 * self.phi,
            )
            self.accepted = loss

    def state(self) -> dict[str, Any]:
        """See `Policy`."""
        kept: dict[str, Any] = {"phi": self.phi, "accepted": self.accepted}
        if self.buffer is not None:
            kept["rows"] = self.buffer.rows.tolist()
            kept["ids"] = [name.decode() for name in self.buffer.ids]
            kept["prompts"] = self.buffer.prompt_tokens.tolist()
            kept["texts"] = [text.tolist() for text in self.buffer.texts]
        return kept

    def restore(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        self.phi, self.accepted = state["phi"], state["accepted"]
        if "rows" in state:
            self.buffer = Written(
                np.array(state["rows"], np.int64),
                np.array([name.encode() for name in state["ids"]], "S"),
                np.array(state["prompts"], np.int64),
                [np.array(text, np.uint32) for text in state["texts"]],
            )

    def _of_stage(self, asked: Asked) -> Rows:
        """Places in the buffer whose prompts are the stage's: the curriculum holds for what is seen
        again too.
        """
        if self.buffer is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.isin(self.buffer.rows, asked.stage_rows()))

    def _remember(self, written: Written) -> None:
        """The newest `buffer` responses."""
        joined = written if self.buffer is None else self.buffer.joined(written)
        self.buffer = joined.picked(
            np.arange(max(0, len(joined) - self.config.replay_buffer_size), len(joined))
        )


POLICIES: dict[str, Callable[..., Policy]] = {
    "off": lambda config, write, seed: Off(),
    "seqkd": lambda config, write, seed: (
        Off()
    ),  # its responses were written by the teacher, before training
    "gkd": Gkd,
    "mixture": Mixture,
    "distillm": Distillm,
}


def draw(seed: int, step: int, stream: int) -> float:
    """A number in [0, 1) that follows from its arguments alone: the same on all ranks, and after a
    resume.
    """
    return float(np.random.default_rng([seed, step, stream]).random())
