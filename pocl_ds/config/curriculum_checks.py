"""Checks of the ranking, the sample weights and the rescoring of a recipe, across its sections.

Each raises ValueError with one sentence that names the fields and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocl_ds.config.registry import (
    CROSS_TOKENIZER_LOSSES,
    FILE_STRATEGY,
    STRATEGIES_WITHOUT_ROUGE_L,
    TEACHER_SCORES,
    UNSCORED_STRATEGIES,
)

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.config.curriculum import RescoringConfig, SampleWeightsConfig
    from pocl_ds.config.loss import LossConfig
    from pocl_ds.config.models import TeacherConfig


def check_curriculum(recipe: Recipe) -> None:
    """Raise ValueError if what ranks and weighs the samples contradicts another field."""
    _check_ranking(recipe)
    _check_sample_weights(recipe)
    _check_rescoring(recipe)


def _check_ranking(recipe: Recipe) -> None:
    """The strategy and where its scores come from."""
    strategy, scores = recipe.ranking.strategy, recipe.ranking.scores
    if strategy == FILE_STRATEGY and scores is None:
        raise ValueError(
            "ranking.strategy=difficulty reads the column `difficulty` of a file: name it in "
            "ranking.scores"
        )
    if strategy in UNSCORED_STRATEGIES and scores is not None:
        raise ValueError(
            f"ranking.scores={scores} is not used by ranking.strategy={strategy}: remove one of "
            "them"
        )


def _check_sample_weights(recipe: Recipe) -> None:
    """The scores that the weights of samples come from."""
    rule, rescoring = recipe.curriculum.sample_weights, recipe.curriculum.rescoring
    if rule is None:
        return
    field = f"curriculum.sample_weights.name={rule.name}"
    if rule.reads(*TEACHER_SCORES) and (rescoring is None or rescoring.from_stage > 1):
        raise ValueError(
            f"{field} reads the divergence from the teacher, which the student measures when a "
            "stage begins: set curriculum.rescoring.from_stage=1"
        )
    if rule.reads("rouge_l") and recipe.ranking.strategy in STRATEGIES_WITHOUT_ROUGE_L:
        raise ValueError(
            f"{field} reads ROUGE-L, which ranking.strategy={recipe.ranking.strategy} does not: "
            "choose another strategy, such as rouge_l"
        )


def _check_rescoring(recipe: Recipe) -> None:
    """What the current student can measure, and what else ranks the samples."""
    rescoring, rule = recipe.curriculum.rescoring, recipe.curriculum.sample_weights
    if rescoring is None:
        return
    field = f"curriculum.rescoring.difficulty={rescoring.difficulty}"
    problem = _distribution_problem(recipe.loss, recipe.teacher)
    readers = [(field, rescoring.reads(*TEACHER_SCORES))]
    if rule:
        readers.append((f"curriculum.sample_weights.name={rule.name}", rule.reads(*TEACHER_SCORES)))
    for reader, reads_teacher in readers:
        if problem and reads_teacher:
            raise ValueError(
                f"{reader} needs the distributions of teacher and student over one vocabulary, "
                f"which {problem}"
            )
    if rescoring.reads("rouge_l") and recipe.ranking.strategy in STRATEGIES_WITHOUT_ROUGE_L:
        raise ValueError(
            f"{field} reads ROUGE-L, which ranking.strategy={recipe.ranking.strategy} does not: "
            "choose another strategy, such as fusion"
        )
    reads_scores = rescoring.may_read("rouge_l") or (rule is not None and rule.may_read("rouge_l"))
    if rescoring.from_stage == 1 and recipe.scores_samples and not reads_scores:
        raise ValueError(
            f"{field} with from_stage=1 ranks the samples before any training, so "
            f"ranking.strategy={recipe.ranking.strategy} has no effect: set it to random, or "
            "from_stage=2"
        )


def rescoring_runs_teacher(
    rescoring: RescoringConfig,
    weights: SampleWeightsConfig | None,
    loss: LossConfig,
    teacher: TeacherConfig | None,
) -> bool:
    """Whether the teacher runs too when the student scores the samples again: something may read
    its scores, and it can give them.
    """
    readers = [rescoring, weights] if weights else [rescoring]
    may_read = any(reader.may_read(*TEACHER_SCORES) for reader in readers)
    return may_read and _distribution_problem(loss, teacher) is None


def _distribution_problem(loss: LossConfig, teacher: TeacherConfig | None) -> str | None:
    """What keeps teacher and student from being compared over one vocabulary; None if nothing."""
    if teacher is None or loss.name == "sft" or loss.name in CROSS_TOKENIZER_LOSSES:
        return f"loss.name={loss.name} does not compare: choose a divergence"
    if teacher.mode not in ("online", "cached_hidden_states", "auto"):
        return f"teacher.mode={teacher.mode} does not cache: set it to online"
    return None
