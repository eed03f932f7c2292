"""The test cluster of tests/slurm, as tests use it."""

from __future__ import annotations

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
    """The cluster, by its own commands."""

    def __init__(self) -> None:
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("POCL_", "SLURM_"))
        }
        self.run: Path | None = None  # the one that was submitted last
        self.environment["SLURM_CONF"] = str(BASE / "slurm.conf")

    def script(self, *words: str) -> None:
        """A word to cluster.sh."""
        subprocess.run(["bash", str(SCRIPT), *words], check=True, timeout=180)

    def call(self, *words: str, check: bool = True) -> str:
        """A SLURM command."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def pocl(
        self,
        *words: str,
        check: bool = True,
        user: str | None = None,
        python: str = sys.executable,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """`pocl WORDS...` on the login node."""
        if words[0] == "submit":
            self.run = Path(words[words.index("--run-dir") + 1])
        command = [python, "-m", "pocl_ds.cli.main", *words]
        if user:
            command = ["runuser", "-u", user, "--", *command]
        where = {**self.environment, **environment}
        done = subprocess.run(
            command, cwd=ROOT, env=where, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
        return done

    def job(self, run: Path, name: str) -> str:
        """The id that a job of a run has now."""
        return (run / "cluster" / "jobs" / f"{name}.ids").read_text().split()[-1]

    def state(self, job: str) -> str:
        """A job's state in the scheduler's word; of an array, of its first task."""
        found = re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", job, check=False))
        return found.group(1) if found else "GONE"

    def hurry(self) -> None:
        """Requeued jobs wait two minutes for their credentials to expire: not here."""
        for line in self.call(
            "squeue", "--noheader", "--states=PENDING", "--format=%A %r"
        ).splitlines():
            job, reason = line.split(maxsplit=1)
            if reason == "BeginTime":
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def newest_logs(self) -> str:
        """The ends of what the last submitted run's jobs and ranks said last."""
        logs = (
            sorted((self.run / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
            if self.run
            else []
        )
        return "".join(f"\n==> {path}\n{path.read_text()[-1000:]}" for path in logs[-4:])

    def until(self, condition: Callable[[], object], what: str, seconds: float = 400) -> None:
        """Wait, while requeued jobs are hurried on."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"waited {seconds:.0f} s for "
                    f"{what}:\n{self.call('squeue', '-a')}{self.newest_logs()}"
                )
            self.hurry()
            time.sleep(0.3)
