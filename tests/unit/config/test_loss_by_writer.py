"""Divergences by who wrote the responses of a step."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import Recipe

MIXTURE = {"name": "mixture", "shares": {"data": 0.3, "student": 0.4, "teacher": 0.3}}


def make_recipe(loss: dict[str, Any], policy: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "data": {"source": "train.jsonl"},
            "teacher": {"model": "org/teacher"},
            "student": {"model": "org/student"},
            "curriculum": {"sft_ratio": [0, 0]},
            "policy": policy,
            "loss": loss,
        }
    )


def test_a_writer_without_a_divergence_of_its_own_gets_the_common_one() -> None:
    by_writer = {"student": {"name": "srkl", "options": {"skew": 0.2}}}
    loss = make_recipe({"name": "skl", "by_writer": by_writer}, MIXTURE).loss
    named = {writer: loss.of_writer(writer) for writer in ("data", "student", "teacher")}
    assert {writer: value.name for writer, value in named.items()} == {
        "data": "skl",
        "student": "srkl",
        "teacher": "skl",
    }
    assert named["student"].options == {"skew": 0.2}


@pytest.mark.parametrize(
    ("loss", "policy", "message"),
    [
        ({"by_writer": {"teacher": {"name": "skl"}}}, {"name": "gkd"}, "no responses of the teach"),
        ({"by_writer": {"student": {"name": "skl"}}}, {"name": "off"}, "no responses of the stud"),
        (
            {"by_writer": {"student": {"name": "skl"}}},
            {"name": "mixture", "shares": {"data": 0.5, "student": 0, "teacher": 0.5}},
            "no responses of the student",
        ),
        ({"by_writer": {"student": {"name": "sft"}}}, MIXTURE, "and sft is none"),
        ({"name": "uld", "by_writer": {"student": {"name": "skl"}}}, MIXTURE, "and uld is none"),
        ({"by_writer": {"student": {"name": "sk"}}}, MIXTURE, "there is no loss 'sk'"),
        ({"by_writer": {"data": {"name": "skl"}}}, MIXTURE, "'student' or 'teacher'"),
        (
            {"by_writer": {"student": {"name": "skl", "options": {"skew": 2}}}},
            MIXTURE,
            "loss.by_writer.student.options of skl: skew=2 must be between 0 and 1",
        ),
        (
            {"by_writer": {"student": {"name": "skl", "options": {"skew": True}}}},
            MIXTURE,
            "loss.by_writer.student.options.skew=True of skl must be a number",
        ),
    ],
)
def test_what_no_step_can_use_is_refused(
    loss: dict[str, Any], policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(loss, policy)
