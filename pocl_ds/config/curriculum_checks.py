"""Checks of the ranking, the sample weights and the rescoring of a recipe, across its sections.

Each raises ValueError with one sentence that names the fields and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocl_ds.config.registry import FILE_STRATEGY

if TYPE_CHECKING:
    from pocl_ds.config import Recipe


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
    if strategy == "random" and scores is not None:
        raise ValueError(
            f"ranking.scores={scores} is not used by ranking.strategy=random: remove one of them"
        )


def _check_sample_weights(recipe: Recipe) -> None:
    """The scores that the weights of samples come from."""
    rule, rescoring = recipe.curriculum.sample_weights, recipe.curriculum.rescoring
    if rule is None:
        return
    if rule.name == "loss" and (rescoring is None or rescoring.from_stage > 1):
        raise ValueError(
            "curriculum.sample_weights.name=loss reads the divergence from the teacher, which the "
            "student measures when a stage begins: set curriculum.rescoring.from_stage=1"
        )
    if rule.name == "pass_rate" and recipe.ranking.strategy in ("random", FILE_STRATEGY):
        raise ValueError(
            "curriculum.sample_weights.name=pass_rate reads ROUGE-L, which "
            f"ranking.strategy={recipe.ranking.strategy} does not: choose another strategy, such "
            "as rouge_l"
        )


def _check_rescoring(recipe: Recipe) -> None:
    """What the current student can measure, and what else ranks the samples."""
    rescoring, rule = recipe.curriculum.rescoring, recipe.curriculum.sample_weights
    if rescoring is None:
        return
    field = f"curriculum.rescoring.difficulty={rescoring.difficulty}"
    reads_teacher = rescoring.difficulty in ("kd_loss", "loss_ratio")
    if reads_teacher or (rule is not None and rule.name == "loss"):
        field = field if reads_teacher else "curriculum.sample_weights.name=loss"
        mode = None if recipe.teacher is None else recipe.teacher.mode
        problem = None
        if recipe.teacher is None or recipe.loss.name == "sft" or recipe.cross_tokenizer:
            problem = f"loss.name={recipe.loss.name} does not compare: choose a divergence"
        elif mode not in ("online", "cached_hidden_states", "auto"):
            problem = f"teacher.mode={mode} does not cache: set it to online"
        if problem:
            raise ValueError(
                f"{field} needs the distributions of teacher and student over one vocabulary, "
                f"which {problem}"
            )
    if rescoring.difficulty == "fusion" and recipe.ranking.strategy in ("random", FILE_STRATEGY):
        raise ValueError(
            f"{field} reads ROUGE-L, which ranking.strategy={recipe.ranking.strategy} does not: "
            "choose another strategy, such as fusion"
        )
    reads_scores = rescoring.difficulty not in ("cross_entropy", "kd_loss", "loss_ratio") or (
        rule is not None and rule.name not in ("band", "stratified", "loss")
    )
    if rescoring.from_stage == 1 and recipe.scores_samples and not reads_scores:
        raise ValueError(
            f"{field} with from_stage=1 ranks the samples before any training, so "
            f"ranking.strategy={recipe.ranking.strategy} has no effect: set it to random, or "
            "from_stage=2"
        )
