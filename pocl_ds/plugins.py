"""Decorators that register divergences, token rules, metrics, ranking strategies, sample weights,
measures of difficulty and policies.

A recipe lists the modules that use them in `plugins`.

    from pocl_ds import plugins
    from pocl_ds.losses import TokenFactors

    # loss.name=squares, loss.options.weight
    @plugins.divergence("squares", weight=0.5)
    def squares(log_p, log_q, *, weight):
        return weight * (log_p.exp() - log_q.exp()).square().sum(-1)

    # loss.token_rule.name=wrong_answers: tokens whose label the student finds improbable
    @plugins.token_rule("wrong_answers", below=0.5)
    def wrong_answers(signals, *, below):
        return TokenFactors(weight=(signals.student_label_prob < below).float())

    # score.metrics=[commas] and ranking.strategy=commas: a smaller number is easier
    @plugins.metric("commas")
    def commas(samples):
        return [texts[0].count(",") for texts in samples.references]

    # ranking.strategy=shortest_id_first
    @plugins.strategy("shortest_id_first")
    def shortest_id_first(scores):
        return sorted(range(len(scores.ids)), key=lambda row: len(scores.ids[row]))

    # curriculum.sample_weights.name=half, curriculum.sample_weights.options.weight
    @plugins.sample_weights("half", weight=0.5)
    def half(scores, *, weight):
        return [1 if place < 0.5 else weight for place in scores["place"]]

    # curriculum.rescoring.difficulty=gap: ranks the samples again when a stage begins
    @plugins.difficulty("gap")
    def gap(scores):
        return scores["cross_entropy"] - scores["teacher_cross_entropy"]

    # policy.name=first_only, policy.options
    @plugins.policy("first_only", on_policy=False)
    class FirstOnly(rollouts.policies.OffPolicy): ...

Every process that reads the recipe imports the module, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pocl_ds.config import registry
from pocl_ds.errors import RecipeError

Registered = TypeVar("Registered", bound=Callable[..., Any])


def divergence(name: str, **options: float | bool) -> Callable[[Registered], Registered]:
    """Register a divergence for `loss.name`.

    The function maps log-probabilities of the teacher and of the student, both [tokens, ids], and
    the options as keywords, to [tokens]. options: their names and defaults. Raises RecipeError for
    a name that is in use.
    """
    from pocl_ds.losses.divergences import DIVERGENCES

    return _register(
        "divergence", name, DIVERGENCES, lambda: registry.LOSSES.__setitem__(name, options)
    )


def token_rule(name: str, **options: float | bool) -> Callable[[Registered], Registered]:
    """Register a rule for `loss.token_rule.name`.

    The function maps `losses.TokenSignals` of n tokens, and the options as keywords, to
    `TokenFactors`: a factor of the temperature, greater than 0, and a weight of the divergence, at
    least 0, each [n] or None. They are constants for the gradient. options: their names and
    defaults. Raises RecipeError for a name that is in use.
    """
    from pocl_ds.losses.token_rules import TOKEN_RULES

    return _register(
        "token rule", name, TOKEN_RULES, lambda: registry.TOKEN_RULES.__setitem__(name, options)
    )


def policy(name: str, *, on_policy: bool) -> Callable[[Registered], Registered]:
    """Register a policy for `policy.name`.

    It is a class with the methods of `rollouts.policies.Policy`, created from (PolicyConfig,
    generate, seed). on_policy: whether it calls `generate`, which lets the student generate
    responses. Raises RecipeError for a name that is in use.
    """
    from pocl_ds.rollouts.policies import POLICIES

    return _register(
        "policy", name, POLICIES, lambda: registry.POLICIES.__setitem__(name, on_policy)
    )


def strategy(name: str) -> Callable[[Registered], Registered]:
    """Register a strategy for `ranking.strategy`.

    The function maps `curriculum.ranking.DifficultyScores` to a permutation of the rows, easiest
    first. Raises RecipeError for a name that is in use.
    """
    from pocl_ds.curriculum.ranking import STRATEGIES

    return _register(
        "ranking strategy",
        name,
        STRATEGIES,
        lambda: registry.STRATEGIES.append(name),
        [*registry.METRICS, *registry.OTHER_STRATEGIES],
    )


def metric(name: str) -> Callable[[Registered], Registered]:
    """Register a difficulty metric for `score.metrics`, which is a ranking strategy too.

    The function maps `difficulty.plugin_metrics.ScoredSamples` (prompts, the student's responses,
    references and their log-probabilities) to one number per sample; a smaller one is easier.
    Raises RecipeError for a name that is in use.
    """
    from pocl_ds.difficulty.plugin_metrics import METRICS

    return _register(
        "metric",
        name,
        METRICS,
        lambda: registry.METRICS.append(name),
        [*registry.STRATEGIES, *registry.OTHER_STRATEGIES],
    )


def difficulty(name: str) -> Callable[[Registered], Registered]:
    """Register a measure of difficulty for `curriculum.rescoring.difficulty`.

    The function maps `curriculum.sample_scores.SampleScores` to one number per sample; a smaller
    one is easier. It may read any score, so that the teacher runs too if it can give its scores.
    Raises RecipeError for a name that is in use.
    """
    from pocl_ds.curriculum.sample_scores import DIFFICULTIES

    return _register(
        "measure of difficulty",
        name,
        DIFFICULTIES,
        lambda: registry.DIFFICULTIES.__setitem__(name, None),
    )


def sample_weights(name: str, **options: float) -> Callable[[Registered], Registered]:
    """Register a rule for `curriculum.sample_weights`.

    The function maps `curriculum.sample_scores.SampleScores`, and the options as keywords, to one
    weight per sample: at least 0, and 0 leaves the sample out. options: their names and defaults.
    Raises RecipeError for a name that is in use.
    """
    from pocl_ds.curriculum.sample_weights import RULES

    return _register(
        "rule for sample weights",
        name,
        RULES,
        lambda: registry.SAMPLE_WEIGHTS.__setitem__(name, options),
    )


def _register(
    kind: str,
    name: str,
    functions: dict[str, Any],
    add_name: Callable[[], None],
    other_names: Collection[str] = (),
) -> Callable[[Registered], Registered]:
    """The decorator that adds a function to `functions` under `name`.

    other_names: names of another kind that share the recipe field.
    """

    def register(function: Registered) -> Registered:
        existing = functions.get(name)
        if name in other_names:
            raise RecipeError(
                f"plugins: ranking.strategy={name} exists already: give your {kind} another name"
            )
        if existing is None:
            functions[name] = function
            add_name()
        # The same module may be imported again under a second name.
        elif getattr(existing, "__module__", None) != function.__module__:
            raise RecipeError(
                f"plugins: there is a {kind} {name!r} already: give yours another name"
            )
        return function

    return register
