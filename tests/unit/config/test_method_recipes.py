"""The rule of each recipe in launch/recipes/methods/, on numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.curriculum.plan import mean_sample_visits
from pocl_ds.curriculum.plan_step import plan_from_config
from pocl_ds.curriculum.sample_scores import SampleScores, order_by_difficulty, places
from pocl_ds.curriculum.sample_weights import weigh_samples
from pocl_ds.losses.sampled_logits import SampledCodec
from pocl_ds.losses.token_rules import TOKEN_RULES, TokenRule
from pocl_ds.losses.token_signals import SignalValues
from pocl_ds.resources import RECIPES, shipped_names
from pocl_ds.runtime.hashing import token_keys

METHODS = [name for name in shipped_names(RECIPES) if name.startswith("methods/")]


def recipe(name: str) -> Recipe:
    return load_recipe(f"methods/{name}")


@pytest.mark.parametrize("name", METHODS)
def test_methods_visit_samples_as_often_as_pocl(name: str) -> None:
    curriculum = load_recipe(name).curriculum
    visits = mean_sample_visits(
        curriculum.num_subsets, curriculum.epochs_per_stage, curriculum.scheduler
    )
    assert visits == pytest.approx(20, rel=0.02)


def test_adakd_cools_difficult_tokens() -> None:
    rule = recipe("adakd").loss.token_rule
    assert rule is not None
    zero = torch.zeros(3)
    signals = SignalValues(
        teacher_entropy=zero,
        student_entropy=zero,
        hellinger=torch.tensor([0.0, 0.5, 1.0]),
        teacher_label_prob=zero,
        student_label_prob=zero,
        agreement=zero,
        position=zero,
    )
    options = TokenRule.of(rule.name, rule.options).options
    factors = TOKEN_RULES[rule.name](signals, **options)
    # exp(-0.5 (d^2 - 0.25) / (d^2 + 0.25)) at distances 0, 0.5 and 1.
    expected = [math.exp(0.5), 1.0, math.exp(-0.3)]
    assert factors.temperature is not None
    assert factors.temperature.tolist() == pytest.approx(expected)


def test_paced_weighs_what_is_half_mastered() -> None:
    rule = recipe("paced").curriculum.sample_weights
    assert rule is not None
    scores = SampleScores(["a", "b", "c"], {"rouge_l": np.array([0.0, 0.5, 0.8])})
    weights = weigh_samples(scores, rule.name, rule.options)
    assert weights.tolist() == pytest.approx([0, 0.25, 0.16])


def test_da_kd_trains_on_the_hardest_by_the_loss_ratio_and_a_spread_of_others() -> None:
    curriculum = recipe("da-kd").curriculum
    rescoring, rule = curriculum.rescoring, curriculum.sample_weights
    assert rescoring is not None and rule is not None and curriculum.scheduler == "all_samples"
    # Ratios 8, 7, ..., 1: row 7 is the easiest.
    columns = {
        "cross_entropy": np.arange(8.0, 0, -1),
        "teacher_cross_entropy": np.ones(8),
    }
    ids = [f"s{i}" for i in range(8)]
    order = order_by_difficulty(SampleScores(ids, columns), rescoring.difficulty)
    assert order.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    weights = weigh_samples(
        SampleScores(ids, {**columns, "place": places(order)}), rule.name, rule.options
    )
    # Half of 8: rows 0 and 1 are the hardest, and of the six others the second and the fifth.
    assert np.flatnonzero(weights).tolist() == [0, 1, 3, 6]


def test_srd_leaves_the_hardest_quarter_out() -> None:
    curriculum = recipe("srd").curriculum
    rule = curriculum.sample_weights
    assert rule is not None
    place = np.linspace(0, 1, 9)
    weights = weigh_samples(
        SampleScores([f"s{i}" for i in range(9)], {"place": place}), rule.name, rule.options
    )
    assert weights.tolist() == [1] * 7 + [0] * 2
    # Stages of nearly equal length, which add a quarter of the selected samples each.
    plan = plan_from_config(np.arange(8000), curriculum, batch_size=10)
    assert [stage.steps for stage in plan.stages] == [4000, 4000, 4200, 4000]


def test_later_stages_have_stronger_teachers() -> None:
    teacher = recipe("staged-teachers").teacher
    assert teacher is not None
    stages = [teacher.by_stage.get(stage, teacher).model for stage in (1, 2, 3, 4)]
    assert [name.rpartition("/")[2] for name in stages] == [
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "gpt2-xl",
    ]


def test_distillm_2_has_a_divergence_by_writer() -> None:
    parsed = recipe("distillm-2")
    loss = parsed.loss
    assert [loss.of_writer(writer).name for writer in ("teacher", "student")] == ["skl", "srkl"]
    assert loss.of_writer("student").options == loss.of_writer("teacher").options == {"skew": 0.1}
    shares = parsed.policy.shares
    assert (shares.data, shares.student, shares.teacher) == (0, 0.5, 0.5)


def test_random_sampling_counts_draws() -> None:
    """At temperature 1 an id's estimated probability is the share of the draws that it is."""
    parsed = recipe("random-sampling-kd")
    assert parsed.teacher is not None and parsed.teacher.mode == "cached_sampled"
    assert parsed.curriculum.temperature == (1.0, 1.0) and parsed.loss.name == "fkl"
    codec = SampledCodec(parsed.teacher_cache.num_samples, 4, (1.0,))
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    keys = token_keys(0, [b"sample"], [1])
    ids, parts, _ = codec.decode(codec.encode(logits, keys), 1.0)
    estimate = torch.zeros(1, 4).scatter_add_(-1, ids, parts)
    # Stratified draws differ from the expectation of 25, 12.5, 6.25 and 6.25 by less than one.
    assert (50 * estimate).sum() == pytest.approx(50)
    assert (50 * estimate - torch.tensor([25, 12.5, 6.25, 6.25])).abs().max() < 1
