"""Part `conformance`: the tests of tests/gpu, a row each as soon as it ends."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from pocl_ds.bench.gpu.rows import NotAvailable, RowWriter, require_package
from pocl_ds.resources import ROOT
from pocl_ds.runtime import distributed

TESTS = ROOT / "tests" / "gpu"
# Lets the tests that need no GPU for their arithmetic run on a CPU, in a dry run.
CPU_VARIABLE = "POCL_GPU_TESTS_ON_CPU"


class RowReporter:
    """A plugin of pytest that writes the outcome of each test."""

    def __init__(self, rows: RowWriter) -> None:
        self.rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a row for a test that ran, was skipped, or failed before it ran."""
        if report.when != "call" and report.passed:
            return
        row = {"name": report.nodeid.rpartition("::")[2], "duration": report.duration}
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            row["skipped"] = str(reason).removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["error"] = str(crash.message if crash else report.longrepr).splitlines()[0]
        self.rows.write({**row, "outcome": report.outcome})


def main(rows: RowWriter) -> int:
    """Run the tests. Returns 1 if one of them failed."""
    try:
        require_package("pytest")
        if not TESTS.is_dir():
            raise NotAvailable("an installed package has no tests: use a checkout")
    except NotAvailable as reason:
        rows.write({"name": "tests/gpu", "skipped": str(reason)})
        return 0
    if distributed.device_type() == "cpu":
        os.environ[CPU_VARIABLE] = "1"
    pytest = importlib.import_module("pytest")
    code = pytest.main(
        ["-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), str(TESTS)],
        plugins=[RowReporter(rows)],
    )
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main(RowWriter(Path(sys.argv[1]))))
