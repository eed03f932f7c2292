"""The sources of section `data`: one or several, their names, and those of held-out data."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pocl_ds.config.data import DataConfig, SourceConfig
from pocl_ds.config.recipe_file import check_recipe, dump_recipe
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.steps import fingerprints

TWO = [{"source": "a.jsonl"}, {"source": "org/b", "weight": 0.5}]


def recipe(**data: Any) -> dict[str, Any]:
    return {"name": "x", "data": data, "teacher": {"model": "t"}, "student": {"model": "s"}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "recipe field data: data.source is missing: add it, or data.sources with several"),
        (
            {"source": "a", "sources": TWO},
            "recipe field data: data.source and data.sources are both set: remove one of them",
        ),
        (
            {"source": []},
            "recipe field data.source=[]: name a file, a folder, a pattern, a Hub dataset, or a "
            "list of files",
        ),
        (
            {"source": " "},
            "recipe field data.source=' ': name a file, a folder, a pattern, a Hub dataset, or a "
            "list of files",
        ),
        (
            {"source": ["a", 1]},
            "recipe field data.source=['a', 1]: name a file, a folder, a pattern, a Hub dataset, "
            "or a list of files",
        ),
        (
            {"sources": [{"source": "a", "weight": 2}]},
            "recipe field data.sources.0.weight=2: a weight is above 0 and at most 1, since no "
            "sample is used twice: lower the weights of the other sources instead",
        ),
        (
            {"sources": [{"source": "x/a.jsonl"}, {"source": "y/a.csv.gz"}]},
            "recipe field data: data.sources has two sources of the name 'a': give each a name",
        ),
        (
            {"sources": TWO, "fields": {"output": "x"}},
            "recipe field data: data.fields has no effect beside data.sources: set fields in each "
            "of them",
        ),
        (
            {"sources": TWO, "hub_test_split": "test"},
            "recipe field data: data.hub_test_split=test is a split of data.source, and the recipe "
            "has data.sources: name its dataset as data.test",
        ),
        (
            {"source": "org/a", "hub_validation_split": "train"},
            "recipe field data: data.hub_validation_split and data.hub_split are both 'train': "
            "name another split for validation",
        ),
    ],
)
def test_contradictions(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe(**data))
    assert str(caught.value) == message


@pytest.mark.parametrize("weight", [0, -0.5, 1.01, float("nan"), True])
def test_weights_outside_of_0_to_1(weight: Any) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(source="a", weight=weight)


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("data/my.set.jsonl.gz", "my.set"),
        ("A.JSON", "A"),
        ("org/name", "org/name"),
        ("./folder/", "folder"),
        ("/data/train-*.parquet", "train"),
        ("/data/*.parquet", "data"),
        (["x/a.csv", "x/b.csv"], "a"),
        ("documentation", "documentation"),
        ("stories", "stories"),
    ],
)
def test_names_of_sources(source: Any, label: str) -> None:
    assert SourceConfig(source=source).label == label
    assert SourceConfig(source=source, name="other").label == "other"


def test_one_source_has_the_fields_of_the_section() -> None:
    data = DataConfig(source="org/a", fields={"output": "x"}, hub_revision="r", hub_split="s")
    expected = SourceConfig(source="org/a", fields={"output": "x"}, hub_revision="r", hub_split="s")
    assert data.training_sources == (expected,)
    assert data.held_out_source("test") is None
    assert len(DataConfig.model_validate({"sources": TWO}).training_sources) == 2


def test_held_out_data_come_from_a_split_or_another_source() -> None:
    data = DataConfig(
        source="org/a", hub_validation_split="dev", test="org/b", hub_test_split="eval"
    )
    validation, test = data.held_out_source("validation"), data.held_out_source("test")
    assert validation is not None and test is not None
    assert (validation.source, validation.hub_split) == ("org/a", "dev")
    assert (test.source, test.hub_split) == ("org/b", "eval")


def test_recipes_with_several_sources_are_read_back() -> None:
    first = check_recipe(recipe(sources=TWO, validation=["v.csv", "w.csv"]))
    assert check_recipe(parse_yaml(dump_recipe(first))) == first


def test_fingerprint_depends_on_every_source_and_not_on_streaming() -> None:
    def fingerprint(**data: Any) -> str:
        return fingerprints(check_recipe(recipe(**data)))["preprocess"]

    assert fingerprint(sources=TWO) != fingerprint(sources=[TWO[0], {**TWO[1], "weight": 0.4}])
    assert fingerprint(source=["a", "b"]) != fingerprint(source=["b", "a"])
    assert fingerprint(source="org/a") == fingerprint(source="org/a", streaming=True)
