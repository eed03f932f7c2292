"""Ranks of test_sequence_parallel: each has a part of a packed row, for every family, and compares
hidden states and gradients with those of the complete row on one rank.

    launch/train.sh --ranks R --module sequence_worker LONGROPE DYNAMIC OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model_families import FAMILIES, in_float64, make_model
from torch import Tensor

from pocl_ds.data.batches import Batch
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import hidden_states
from pocl_ds.models.load import load_model
from pocl_ds.runtime import distributed, sequence_parallel

# No number of ranks divides the tokens; samples cross the borders of parts, and one is longer than
# the 64 tokens from which the frequencies of two models depend on length.
LENGTHS = (9, 1, 70, 3, 18)
SHORT = (9, 1, 20, 3, 18)  # for models with 64 positions


def packed_row(lengths: tuple[int, ...]) -> Batch:
    """A row whose samples have loss tokens after their first two tokens."""
    source = torch.Generator().manual_seed(1)
    total = sum(lengths)
    ids = torch.randint(3, 90, (1, total), generator=source)
    columns = torch.cat([torch.arange(length) for length in lengths])
    samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    is_label = columns >= 2
    return Batch(
        input_ids=ids,
        attention_mask=None,
        position_ids=columns[None],
        lengths=lengths,
        positions=torch.arange(total)[is_label] - 1,
        labels=ids[0, is_label],
        sample_of_token=samples[is_label],
        rows=tuple(range(len(lengths))),
        split="train",
    )


def models(paths: list[str]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Name, model and lengths of its samples."""
    for family, extra in FAMILIES:
        model = make_model(family, extra)
        model.set_attn_implementation(PER_SAMPLE)
        yield family, model, SHORT
    for path in paths:
        yield Path(path).name, load_model(path, attention=PER_SAMPLE), LENGTHS


def run(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states at loss positions, and the gradient of a function of them as one vector."""
    hidden = batch.at_loss_positions(hidden_states(model, *batch.inputs))
    direction = torch.linspace(-1, 1, hidden.shape[1], dtype=torch.float64)
    weights = torch.linspace(-1, 1, 97, dtype=torch.float64)[batch.labels]
    model.zero_grad()
    ((hidden @ direction).tanh() * weights).sum().backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in model.base_model.parameters()
    ]
    return hidden.detach(), torch.cat([g.flatten() for g in gradients])


def main(longrope: str, dynamic: str, out: str) -> None:
    """Write the largest error of hidden states and of gradients for each family and size of a
    group, relative to the largest value.
    """
    start_deepspeed()
    errors: list[dict[str, Any]] = []
    for name, model, lengths in models([longrope, dynamic]):
        model = in_float64(model)
        row = packed_row(lengths)
        sequence_parallel.start(1)
        expected_hidden, expected = run(model, row)
        sizes: dict[int, list[float]] = {}
        for size in (2, 4):
            if distributed.world_size() % size or model.config.num_attention_heads % size:
                continue
            sequence_parallel.start(size)
            shard = row.sequence_shard(sequence_parallel.part(), size)
            hidden, gradient = run(model, shard)
            gradient = distributed.all_sum(gradient) / sequence_parallel.data_parallel_size()
            own = shard.loss_token_range
            assert own is not None
            sizes[size] = [
                float((hidden - expected_hidden[own]).abs().max() / expected_hidden.abs().max()),
                float((gradient - expected).abs().max() / expected.abs().max()),
            ]
        errors.append({"family": name, "errors": sizes})
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(errors))
    distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
