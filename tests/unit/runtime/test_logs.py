"""The package's log: stderr and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_ds.errors import DataError
from pocl_ds.runtime.logs import log, log_to_file, setup_logging


def test_a_log_file_that_cannot_be_written_gives_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not a traceback per line, as Python's logging prints; and stderr still has every line."""
    setup_logging()
    with log_to_file(Path("/dev/full")):
        for number in range(3):
            log.info("line %d", number)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    warning = (
        "/dev/full cannot be written (No space left on device): it lacks the lines from here on"
    )
    assert lines == ["line 0", warning, "line 1", "line 2"]


def test_a_log_file_has_what_its_block_logs(tmp_path: Path) -> None:
    """Of two runs in one process each has its own log."""
    setup_logging()
    for name in ("a", "b"):
        with log_to_file(tmp_path / name):
            log.info("line of %s", name)
    assert [(tmp_path / name).read_text().split(" ", 3)[3] for name in ("a", "b")] == [
        "line of a\n",
        "line of b\n",
    ]


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(DataError("a.jsonl:3: no"), False), (KeyError("x"), True)]
)
def test_a_log_file_has_the_error_that_ends_its_block(
    tmp_path: Path, error: Exception, has_traceback: bool
) -> None:
    setup_logging()
    with pytest.raises(type(error)), log_to_file(tmp_path / "log"):
        raise error
    text = (tmp_path / "log").read_text()
    assert f"ERROR {error}\n" in text and ("Traceback" in text) == has_traceback


def test_other_ranks_log_warnings_with_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(3, world_size=4)
    log.info("a line")
    log.warning("a warning")
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "[rank 3] a warning"
    ]
