"""What the tests of the report start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import ATTACK, SyntheticRun


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticRun:
    """A run directory that is still empty."""
    return SyntheticRun(tmp_path / "run")


@pytest.fixture
def attack() -> str:
    """Text that would do harm on a page that trusts it."""
    return ATTACK
