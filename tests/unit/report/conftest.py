"""Fixtures for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import ATTACK, SyntheticRun


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticRun:
    """An empty run directory, into which results can be written."""
    return SyntheticRun(tmp_path / "run")


@pytest.fixture
def attack() -> str:
    """Text that would run a script on a page that does not escape it."""
    return ATTACK
