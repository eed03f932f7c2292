"""A module of the user's own adds a divergence, a policy, a strategy and a metric, each one
function and one line.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import registry
from pocl_ds.config.recipe_file import check_recipe, load_recipe
from pocl_ds.difficulty import rank, score
from pocl_ds.errors import RecipeError
from pocl_ds.losses import divergences
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import Head
from pocl_ds.models.vocab import Ids
from pocl_ds.rollouts import policies

MODULE = """
from pocl_ds import plugins
from pocl_ds.rollouts.policies import Off

@plugins.divergence("squares", weight=0.5, beta=1.0)
def squares(log_p, log_q, *, weight, beta):
    return beta * weight * (log_p.exp() - log_q.exp()).square().sum(-1)

@plugins.metric("words")
def words(responses, references, log_probs):
    return [len(response.split()) for response in responses]

@plugins.strategy("by_id")
def by_id(scored):
    return sorted(range(len(scored.ids)), key=lambda place: scored.ids[place])

@plugins.policy("twice", on_policy=False)
class Twice(Off):
    def __init__(self, config, write, seed):
        self.times = config.options["times"]

    def sequences(self, asked):
        return asked.split, asked.rows[:1].repeat(len(asked.rows))
"""

REGISTRIES: tuple[Any, ...] = (
    registry.LOSSES,
    registry.POLICIES,
    registry.STRATEGIES,
    registry.METRICS,
    divergences.FUNCTIONS,
    policies.POLICIES,
    rank.STRATEGIES,
    score.METRICS,
)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its name, importable; what it registers is forgotten afterwards."""
    (tmp_path / "my_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [copy.copy(registry) for registry in REGISTRIES]
    yield "my_methods"
    sys.modules.pop("my_methods", None)
    for registered, kept in zip(REGISTRIES, before, strict=True):
        registered.clear()
        (registered.update if isinstance(registered, dict) else registered.extend)(kept)


def recipe(plugin: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "plugins": [plugin],
        **changes,
    }


def test_a_recipe_uses_all_four(plugin: str) -> None:
    found = check_recipe(
        recipe(
            plugin,
            loss={"name": "squares", "options": {"weight": 0.5, "beta": 4.0}},
            rank={"strategy": "words"},
            policy={"name": "twice", "options": {"times": 2}},
            score={"metrics": ["words"]},
        )
    )
    assert not found.policy.on_policy

    source = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    heads = [Head(torch.nn.Parameter(draw(20, 4)), None, 1.0, None) for _ in range(2)]
    hidden, teacher_hidden = draw(5, 4).requires_grad_(), draw(5, 4)
    sums = loss_sums(
        hidden,
        heads[0],
        torch.arange(5),
        LossTerms("squares", options=found.loss.options),
        ids=Ids(20),
        teacher_hidden=teacher_hidden,
        teacher_head=heads[1],
    )
    p, q = (
        torch.softmax(teacher_hidden @ heads[1].weight.T, -1),
        torch.softmax(hidden @ heads[0].weight.T, -1),
    )
    expected = 2.0 * (p - q).square().sum()
    assert float(sums[1]) == pytest.approx(float(expected))
    (gradient,) = torch.autograd.grad(sums[0], hidden)
    assert torch.allclose(gradient, torch.autograd.grad(expected, hidden)[0])

    made = policies.POLICIES["twice"](found.policy, None, 0)
    asked = policies.Asked(None, 1, None, np.array([4, 5, 6]), lambda: np.empty(0, np.int64))  # type: ignore[arg-type]
    assert made.sequences(asked)[1].tolist() == [4, 4, 4] and made.state() == {}

    values = score.METRICS["words"](["a b c", "a", "a b"], [["x"]] * 3, [])
    metrics = {"words": np.array(values, float)}
    order = rank.fuse(
        ["x", "y", "z"], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], strategy="words", metrics=metrics
    )
    assert order.order == ["y", "z", "x"]
    assert rank.fuse(["z", "x", "y"], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], strategy="by_id").order == [
        "x",
        "y",
        "z",
    ]


def test_a_second_recipe_of_the_same_plugin_is_fine(
    plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recipe(recipe(plugin, loss={"name": "squares"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: x\nteacher: {{model: t}}\nstudent: {{model: s}}\nplugins: [{plugin}]\nloss: "
        f"{{name: squares}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipe.yaml", ["loss.options.weight=0.1"]).loss.options == {"weight": 0.1}


def test_what_is_wrong_is_said(plugin: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"plugins: module nowhere cannot be imported .* PYTHONPATH"
    ):
        check_recipe(recipe("nowhere"))
    with pytest.raises(RecipeError, match="there is no policy 'twice'"):
        check_recipe({**recipe(plugin), "plugins": [], "policy": {"name": "twice"}})
    check_recipe(recipe(plugin))
    with pytest.raises(
        RecipeError, match=r"ranking\.strategy=words is not scored: name it in score\.metrics"
    ):
        check_recipe(recipe(plugin, rank={"strategy": "words"}))
    (tmp_path / "clashing.py").write_text(
        "from pocl_ds import plugins\nplugins.divergence('fkl')(lambda log_p, log_q: 0)\n"
    )
    with pytest.raises(RecipeError, match="there is a divergence 'fkl' already"):
        check_recipe(recipe("clashing"))
    for kind, name in (("metric", "fusion"), ("strategy", "words")):
        (tmp_path / f"clashing_{kind}.py").write_text(
            f"from pocl_ds import plugins\nplugins.{kind}('{name}')(print)\n"
        )
        with pytest.raises(RecipeError, match=f"ranking.strategy={name} has a meaning already"):
            check_recipe(recipe(f"clashing_{kind}"))
    rank.STRATEGIES["by_id"] = lambda scored: np.zeros(len(scored.ids), np.int64)
    with pytest.raises(RecipeError, match="does not name every sample once"):
        rank.fuse(["x", "y"], [0.1, 0.2], [1.0, 2.0], strategy="by_id")
