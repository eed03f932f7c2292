"""A teacher with its own ranks in a process that has none."""

from __future__ import annotations

import pytest

from pocl_ds.errors import RecipeError
from pocl_ds.training.remote_loading import teacher_client


def test_a_command_without_ranks_for_the_teacher_says_so() -> None:
    with pytest.raises(RecipeError, match="this command starts none: set teacher.placement=with_s"):
        teacher_client()
