"""The curriculum: difficulty ranking, plan, schedules and sampler, as pure functions.

Everything here works with plain lists and numpy arrays, without a run directory and without torch:

    from pocl_ds.curriculum import Sampler, build_plan, rank_by_difficulty

    ranking = rank_by_difficulty(rouge_l=[0.9, 0.1, 0.5, 0.4], cross_entropy=[1.0, 3.0, 0.5, 2.0])
    plan = build_plan(ranking.order, num_subsets=2, epochs_per_stage=1, batch_size=2)
    sampler = Sampler(plan, seed=0)
    for step in range(plan.total_steps):
        stage = plan.stages[sampler.position(step).stage]
        rows = sampler.batch(step)  # train on these samples at stage.temperature
"""

from pocl_ds.curriculum.data_sampler import CurriculumSampler
from pocl_ds.curriculum.micro_batches import (
    assign_micro_batches,
    load_imbalance,
    token_budget_batches,
)
from pocl_ds.curriculum.plan import Plan, Stage, build_plan, single_stage_plan
from pocl_ds.curriculum.ranking import DifficultyRanking, rank_by_difficulty, tied_fraction
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.curriculum.schedules import learning_rate, stage_values

__all__ = [
    "CurriculumSampler",
    "DifficultyRanking",
    "Plan",
    "Sampler",
    "SamplerPosition",
    "Stage",
    "assign_micro_batches",
    "build_plan",
    "learning_rate",
    "load_imbalance",
    "rank_by_difficulty",
    "single_stage_plan",
    "stage_values",
    "tied_fraction",
    "token_budget_batches",
]
