"""Random seeds of a training step."""

from __future__ import annotations

import random

import numpy as np
import torch

from pocl_ds.runtime import distributed


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed dropout as a function of seed, step, micro-batch and rank, so that a checkpoint needs no
    random state.
    """
    entropy = [seed, step, micro_batch, distributed.rank()]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
    random.seed(int(words[1]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
