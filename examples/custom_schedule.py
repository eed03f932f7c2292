"""A custom temperature schedule: a cosine over the stages instead of the paper's line.

A plan is plain data: replace the temperature or the SFT ratio of its stages, and the sampler walks
the same batches.

    python examples/custom_schedule.py
"""

from __future__ import annotations

import dataclasses
import math

from pocl_ds.curriculum import Plan, Sampler, build_plan, rank_by_difficulty


def cosine_temperature(plan: Plan, *, start: float, end: float) -> Plan:
    """The plan with temperatures that follow half a cosine from `start` to `end`."""
    last_index = max(len(plan.stages) - 1, 1)
    stages = [
        dataclasses.replace(
            stage,
            temperature=start
            + (end - start) * (1 - math.cos(math.pi * stage.index / last_index)) / 2,
        )
        for stage in plan.stages
    ]
    return dataclasses.replace(plan, stages=stages)


def main() -> None:
    # Scores of 64 samples: the longer the answer, the harder.
    ranking = rank_by_difficulty(
        rouge_l=[1 - i / 64 for i in range(64)], cross_entropy=[1 + i / 16 for i in range(64)]
    )
    linear = build_plan(ranking.order, num_subsets=5, epochs_per_stage=2, batch_size=8)
    cosine = cosine_temperature(linear, start=1.0, end=2.0)

    print("stage  samples  optimizer steps  linear  cosine")
    for line, curve in zip(linear.stages, cosine.stages, strict=True):
        print(
            f"{line.index + 1:5d}  {line.num_samples:7d}  {line.steps:15d}  "
            f"{line.temperature:6.3f}  {curve.temperature:6.3f}"
        )

    # The batches do not depend on the schedule.
    samplers = Sampler(linear, seed=0), Sampler(cosine, seed=0)
    steps = range(linear.total_steps)
    equal = all((samplers[0].batch(step) == samplers[1].batch(step)).all() for step in steps)
    print("same batches in both plans:", equal)


if __name__ == "__main__":
    main()
