"""The recipe field loss.token_rule: names, options, and what a rule cannot work with."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import Recipe, TokenRuleConfig
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError


def make_recipe(rule: Any, teacher: dict[str, Any] | None = None, **loss: Any) -> Recipe:
    return check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl"},
            "teacher": {"model": "org/teacher", **(teacher or {})},
            "student": {"model": "org/student"},
            "loss": {"token_rule": rule, **loss},
        }
    )


def test_a_recipe_has_one_rule_or_none() -> None:
    rule = make_recipe({"name": "adakd", "options": {"threshold": 0.3}}).loss.token_rule
    assert rule == TokenRuleConfig(name="adakd", options={"threshold": 0.3})
    assert make_recipe(None).loss.token_rule is None
    for mode in ("cached_hidden_states", "auto"):
        assert make_recipe({"name": "adakd"}, {"mode": mode}).loss.token_rule is not None


@pytest.mark.parametrize(
    ("rule", "teacher", "loss", "message"),
    [
        ({"name": "adaked"}, {}, {}, "there is no token rule 'adaked': did you mean adakd"),
        ({}, {}, {}, "loss.token_rule.name"),
        ({"name": "adakd", "options": {"scale": 1}}, {}, {}, "adakd has no option 'scale'"),
        (
            {"name": "adakd", "options": {"center": 2}},
            {},
            {},
            "loss.token_rule.options of adakd: center=2 must be between 0.001 and 1",
        ),
        (
            {"name": "adakd", "options": {"strength": True}},
            {},
            {},
            "loss.token_rule.options.strength=True of adakd must be a number",
        ),
        ({"name": "adakd"}, {}, {"name": "uld"}, "and loss.name=uld does not: remove loss.token_"),
        ({"name": "adakd"}, {}, {"name": "alm"}, "and loss.name=alm does not: remove loss.token_"),
        (
            {"name": "adakd"},
            {"mode": "cached_topk"},
            {},
            "teacher.mode=cached_topk caches it at those of the stages: set it to cached_hid",
        ),
    ],
)
def test_what_a_rule_cannot_do_is_refused(
    rule: dict[str, Any], teacher: dict[str, Any], loss: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(rule, teacher, **loss)


def test_plain_sft_has_no_rule() -> None:
    tree: dict[str, Any] = {"name": "x", "data": {"source": "d.jsonl"}, "student": {"model": "s"}}
    tree["loss"] = {"name": "sft", "token_rule": {"name": "adakd"}}
    with pytest.raises(RecipeError, match="loss.name=sft does not: remove loss.token_rule"):
        check_recipe(tree)
