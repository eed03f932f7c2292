"""Checks of a recipe against its models and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocl_ds.config import Recipe
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.model_checks import check_domains
from pocl_ds.workflow.run_dir import RunDirectory


def test_a_teacher_of_a_domain_that_does_not_occur_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    labels = SplitLabels(("unused", "math", "chat"), np.array([1, 1, 2], np.uint16))
    labels.write(run.data, "train", "domains")

    def teacher(*names: str) -> Any:
        routes = {name: {"model": "org/other"} for name in names}
        data = {"source": "a.jsonl", "fields": {"domain": "kind"}}
        tree = {"name": "x", "data": data, "teacher": {"model": "t", "by_domain": routes}}
        return Recipe.model_validate({**tree, "student": {"model": "s"}}).teacher

    check_domains(run, teacher("law"))  # before `preprocess` has finished
    write_manifest(run.data, "preprocess", "f" * 64)
    check_domains(run, None)
    check_domains(run, teacher("math", "chat"))
    with pytest.raises(RecipeError, match=r"the domain 'law' .*: math 2, chat 1\): correct"):
        check_domains(run, teacher("math", "law"))
