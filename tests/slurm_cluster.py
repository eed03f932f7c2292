"""The test cluster of tests/slurm as a Python object."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from command_line import ROOT

SCRIPT = Path(__file__).parent / "slurm" / "cluster.sh"
BASE = Path("/var/lib/pocl-slurm")


class Cluster:
    """The cluster, through the commands of SLURM and `pocl`."""

    def __init__(self) -> None:
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("POCL_", "SLURM_"))
        }
        self.run: Path | None = None  # the run that was submitted last
        self.environment["SLURM_CONF"] = str(BASE / "slurm.conf")

    def script(self, *words: str) -> None:
        """Run a command of cluster.sh."""
        subprocess.run(["bash", str(SCRIPT), *words], check=True, timeout=180)

    def call(self, *words: str, check: bool = True) -> str:
        """Run a SLURM command and return its output."""
        process = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or process.returncode == 0, process.stderr
        return process.stdout

    def pocl(
        self,
        *words: str,
        check: bool = True,
        user: str | None = None,
        python: str = sys.executable,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `pocl WORDS...` on the login node."""
        if words[0] == "submit":
            self.run = Path(words[words.index("--run-dir") + 1])
        command = [python, "-m", "pocl_ds.cli.main", *words]
        if user:
            command = ["runuser", "-u", user, "--", *command]
        variables = {**self.environment, **environment}
        process = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
        )
        assert not check or process.returncode == 0, process.stderr[-2000:] + process.stdout[-2000:]
        return process

    def job(self, run: Path, name: str) -> str:
        """The current id of a run's job."""
        return (run / "cluster" / "jobs" / f"{name}.ids").read_text().split()[-1]

    def state(self, job: str) -> str:
        """A job's state as SLURM names it; for an array, that of its first task."""
        state = re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", job, check=False))
        return state.group(1) if state else "GONE"

    def start_requeued(self) -> None:
        """Start requeued jobs now. SLURM would let them wait two minutes for new credentials."""
        for line in self.call(
            "squeue", "--noheader", "--states=PENDING", "--format=%A %r"
        ).splitlines():
            job, reason = line.split(maxsplit=1)
            if reason == "BeginTime":
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def has_failed(self) -> bool:
        """Whether the newest attempt of a job of the last submitted run failed for good."""
        files = self.run.glob("cluster/attempts/*.jsonl") if self.run else []
        lines = [path.read_text().splitlines() for path in files]
        return any(json.loads(line[-1])["outcome"] == "failed" for line in lines if line)

    def newest_logs(self) -> str:
        """The ends of the newest logs of the last submitted run."""
        logs = (
            sorted((self.run / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
            if self.run
            else []
        )
        return "".join(f"\n==> {path}\n{path.read_text()[-1000:]}" for path in logs[-4:])

    def until(self, condition: Callable[[], object], what: str, seconds: float = 400) -> None:
        """Wait for a condition, and start requeued jobs meanwhile. Raises AssertionError, soon if a
        job of the newest run has failed for good: what is awaited can then only be its aftermath.
        """
        start = time.monotonic()
        failed_since = math.inf
        while not condition():
            now = time.monotonic()
            failed_since = min(failed_since, now) if self.has_failed() else math.inf
            if now - start > seconds or now - failed_since > 60:
                raise AssertionError(
                    f"waited {now - start:.0f} s for "
                    f"{what}:\n{self.call('squeue', '-a')}{self.newest_logs()}"
                )
            self.start_requeued()
            time.sleep(0.3)
