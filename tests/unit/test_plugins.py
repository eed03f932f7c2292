"""A plugin adds a divergence, a token rule, a policy, a ranking strategy, a metric, a rule for
sample weights and a measure of difficulty.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import registry
from pocl_ds.config.recipe_file import check_recipe, load_recipe
from pocl_ds.curriculum import sample_scores, sample_weights
from pocl_ds.curriculum.ranking import STRATEGIES, rank_by_difficulty
from pocl_ds.difficulty import plugin_metrics
from pocl_ds.errors import RecipeError
from pocl_ds.losses import divergences, token_rules
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts import policies

MODULE = """
from pocl_ds import plugins
from pocl_ds.losses import TokenFactors
from pocl_ds.rollouts.policies import OffPolicy

@plugins.divergence("squares", weight=0.5, beta=1.0)
def squares(log_p, log_q, *, weight, beta):
    return beta * weight * (log_p.exp() - log_q.exp()).square().sum(-1)

@plugins.token_rule("unsure", gain=1.0)
def unsure(signals, *, gain):
    return TokenFactors(weight=gain * (1 - signals.student_label_prob))

@plugins.metric("words")
def words(samples):
    return [len(response.split()) for response in samples.responses]

@plugins.strategy("by_id")
def by_id(scores):
    return sorted(range(len(scores.ids)), key=lambda row: scores.ids[row])

@plugins.sample_weights("half", weight=0.5)
def half(scores, *, weight):
    return [1 if place < 0.5 else weight for place in scores["place"]]

@plugins.difficulty("gap")
def gap(scores):
    return scores["cross_entropy"] - scores["teacher_cross_entropy"]

@plugins.policy("twice", on_policy=False)
class Twice(OffPolicy):
    def __init__(self, config, generate, seed):
        self.times = config.options["times"]

    def select_batch(self, request):
        return request.dataset, request.rows[:1].repeat(len(request.rows))
"""

REGISTRIES: tuple[Any, ...] = (
    registry.LOSSES,
    registry.TOKEN_RULES,
    registry.POLICIES,
    registry.STRATEGIES,
    registry.METRICS,
    divergences.DIVERGENCES,
    token_rules.TOKEN_RULES,
    policies.POLICIES,
    STRATEGIES,
    plugin_metrics.METRICS,
    registry.SAMPLE_WEIGHTS,
    registry.DIFFICULTIES,
    sample_weights.RULES,
    sample_scores.DIFFICULTIES,
)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable plugin; what it registers is removed afterwards."""
    (tmp_path / "my_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    originals = [copy.copy(table) for table in REGISTRIES]
    yield "my_methods"
    sys.modules.pop("my_methods", None)
    for registered, original in zip(REGISTRIES, originals, strict=True):
        registered.clear()
        (registered.update if isinstance(registered, dict) else registered.extend)(original)


def recipe(plugin: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "data": {"source": "d.jsonl"},
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "plugins": [plugin],
        **changes,
    }


def test_a_recipe_uses_all_kinds(plugin: str) -> None:
    parsed = check_recipe(
        recipe(
            plugin,
            loss={
                "name": "squares",
                "options": {"weight": 0.5, "beta": 4.0},
                "token_rule": {"name": "unsure", "options": {"gain": 2.0}},
            },
            ranking={"strategy": "words"},
            policy={"name": "twice", "options": {"times": 2}},
            score={"metrics": ["words"]},
        )
    )
    assert not parsed.policy.on_policy

    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    heads = [OutputHead(torch.nn.Parameter(draw(20, 4)), None, 1.0, None) for _ in range(2)]
    hidden, teacher_hidden = draw(5, 4).requires_grad_(), draw(5, 4)
    # The divergence is a loss of the fused head, with its gradient, and the rule weighs it.
    rule = parsed.loss.token_rule
    assert rule is not None
    sums = loss_sums(
        hidden,
        heads[0],
        torch.arange(5),
        LossTerms(
            "squares",
            options=parsed.loss.options,
            token_rule=token_rules.TokenRule.of(rule.name, rule.options),
        ),
        vocab=VocabMap(20),
        teacher_hidden=teacher_hidden,
        teacher_head=heads[1],
    )
    p, q = (
        torch.softmax(teacher_hidden @ heads[1].weight.T, -1),
        torch.softmax(hidden @ heads[0].weight.T, -1),
    )
    value = 2.0 * (p - q).square().sum(-1)
    weight = 2.0 * (1 - q.detach()[torch.arange(5), torch.arange(5)])
    expected = (weight * value).sum()
    assert float(sums[0]) == pytest.approx(float(expected))
    assert float(sums[1]) == pytest.approx(float(value.sum()))
    (gradient,) = torch.autograd.grad(sums[0], hidden)
    assert torch.allclose(gradient, torch.autograd.grad(expected, hidden)[0])

    # The policy trains on one row of each batch.
    policy = policies.POLICIES["twice"](parsed.policy, None, 0)
    rows: Any = np.array([4, 5, 6])
    request = policies.BatchRequest(None, 1, None, rows, lambda: np.empty(0, np.int64))  # type: ignore[arg-type]
    assert policy.select_batch(request)[1].tolist() == [4, 4, 4] and policy.state_dict() == {}

    # The metric ranks, and so does the strategy.
    values = plugin_metrics.metric_values(
        "words",
        plugin_metrics.ScoredSamples(list("xyz"), [""] * 3, ["a b c", "a", "a b"], [["x"]] * 3, []),
    )
    metrics = {"words": np.array(values, float)}
    ranking = rank_by_difficulty(
        [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], ["x", "y", "z"], strategy="words", metrics=metrics
    )
    assert ranking.ordered_ids == ["y", "z", "x"]
    assert rank_by_difficulty(
        [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], ["z", "x", "y"], strategy="by_id"
    ).ordered_ids == [
        "x",
        "y",
        "z",
    ]


def test_a_second_recipe_may_use_the_same_plugin(
    plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recipe(recipe(plugin, loss={"name": "squares"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\ndata: {source: d.jsonl}\nteacher: {model: t}\nstudent: {model: s}\n"
        f"plugins: [{plugin}]\nloss: {{name: squares}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipe.yaml", ["loss.options.weight=0.1"]).loss.options == {"weight": 0.1}


def test_errors_of_plugins_are_one_sentence(plugin: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"plugins: module nowhere cannot be imported .* PYTHONPATH"
    ):
        check_recipe(recipe("nowhere"))
    with pytest.raises(RecipeError, match="there is no policy 'twice'"):
        check_recipe({**recipe(plugin), "plugins": [], "policy": {"name": "twice"}})
    check_recipe(recipe(plugin))
    with pytest.raises(
        RecipeError,
        match=r"ranking\.strategy=words is a metric that is not computed: add it to score\.metrics",
    ):
        check_recipe(recipe(plugin, ranking={"strategy": "words"}))
    (tmp_path / "clashing.py").write_text(
        "from pocl_ds import plugins\nplugins.divergence('fkl')(lambda log_p, log_q: 0)\n"
    )
    with pytest.raises(RecipeError, match="there is a divergence 'fkl' already"):
        check_recipe(recipe("clashing"))
    for kind, name in (("metric", "fusion"), ("strategy", "words"), ("metric", "length")):
        (tmp_path / f"clashing_{kind}_{name}.py").write_text(
            f"from pocl_ds import plugins\nplugins.{kind}('{name}')(print)\n"
        )
        with pytest.raises(RecipeError, match=f"ranking.strategy={name} exists already"):
            check_recipe(recipe(f"clashing_{kind}_{name}"))
    STRATEGIES["by_id"] = lambda scores: np.zeros(len(scores.ids), np.int64)
    with pytest.raises(RecipeError, match="does not name every sample once"):
        rank_by_difficulty([0.1, 0.2], [1.0, 2.0], ["x", "y"], strategy="by_id")


def test_sample_weights_and_a_measure_of_difficulty(plugin: str) -> None:
    parsed = check_recipe(
        recipe(
            plugin,
            curriculum={
                "sample_weights": {"name": "half", "options": {"weight": 0.25}},
                "rescoring": {"difficulty": "gap"},
            },
        )
    )
    rule, rescoring = parsed.curriculum.sample_weights, parsed.curriculum.rescoring
    assert rule is not None and rescoring is not None
    columns = {
        "place": np.array([0.0, 1.0]),
        "cross_entropy": np.array([3.0, 2.0]),
        "teacher_cross_entropy": np.array([1.0, 1.5]),
    }
    scores = sample_scores.SampleScores(["a", "b"], columns)
    weights = sample_weights.weigh_samples(scores, rule.name, rule.options)
    assert weights.tolist() == [1.0, 0.25]
    order = sample_scores.order_by_difficulty(scores, rescoring.difficulty)
    assert order.tolist() == [1, 0]
