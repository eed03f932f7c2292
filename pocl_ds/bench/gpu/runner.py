"""Runs the parts of `pocl bench gpu` one after another, each in a process with a time limit, and
records their results.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pocl_ds.bench.gpu.machine import Machine, is_same_setup
from pocl_ds.bench.gpu.parts import Part
from pocl_ds.bench.gpu.rows import read_rows
from pocl_ds.resources import module_command
from pocl_ds.workflow.files import read_json, write_json

SCHEMA = 1
RESULTS = "results.json"
MARK = "POCL_BENCH_PART"  # environment variable that all processes of a part inherit
KILL_GRACE_SECONDS = 5
DRY_RUN_LIMIT_FACTOR = 10  # CPUs are slower and often shared; dry runs have no limit in total


def part_environment(machine: Machine) -> dict[str, str]:
    """Environment variables of the parts."""
    variables = {
        "POCL_PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_BUILD_OPS": "0",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if machine["dry_run"]:
        # Tiny shapes are slower on several threads.
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables}


def load_results(directory: Path) -> dict[str, Any]:
    """The results in a directory; without any, empty ones."""
    path = directory / RESULTS
    return read_json(path) if path.is_file() else {"schema": SCHEMA, "parts": {}}


def unfinished_parts(
    parts: Sequence[Part], results: Mapping[str, Any], machine: Machine
) -> list[Part]:
    """The parts without a result of this card, these versions and this commit."""

    def is_finished(part: Part) -> bool:
        result = results["parts"].get(part.name)
        return (
            result is not None
            and result["status"] in ("ok", "skipped")
            and is_same_setup(result["machine"], machine)
        )

    return [part for part in parts if not is_finished(part)]


def run_parts(
    parts: Sequence[Part],
    directory: Path,
    machine: Machine,
    out: Callable[[str], None],
) -> dict[str, Any]:
    """Run parts, add each one's result to results.json as soon as it ends, and return all results.

    A part that fails or exceeds its limit leaves the others as they are. Seconds that a part does
    not need are added to the limit of the next one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    results, deadline = load_results(directory), time.monotonic()
    for part in parts:
        deadline += part.limit_seconds * (DRY_RUN_LIMIT_FACTOR if machine["dry_run"] else 1)
        limit = max(1.0, deadline - time.monotonic())
        out(f"{part.name}: at most {limit:.0f} s, log in {directory / part.name}.log")
        result = run_part(part, directory, limit, part_environment(machine))
        results["parts"][part.name] = {**result, "machine": machine}
        write_json(directory / RESULTS, results)
        out(f"{part.name}: {result['status']} after {result['seconds']:.0f} s")
    return results


def run_part(
    part: Part, directory: Path, limit: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run one part: its status, seconds and rows, and why it failed.

    status: ok, skipped (every row is), failed, or timed out.
    """
    rows_path, log = directory / f"{part.name}.rows.jsonl", directory / f"{part.name}.log"
    rows_path.unlink(missing_ok=True)
    start, mark = time.monotonic(), secrets.token_hex(8)
    # Temporary files of a part that is stopped would stay: models with random weights are large.
    scratch = tempfile.TemporaryDirectory(prefix="pocl-bench-", ignore_cleanup_errors=True)
    with scratch, log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*module_command(part.module), str(rows_path), *part.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, MARK: mark, "TMPDIR": scratch.name},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop_processes(mark)
            process.wait()
    rows = read_rows(rows_path)
    result = {"seconds": time.monotonic() - start, "rows": rows}
    if code is None:
        return {"status": "timed out", **result, "reason": f"stopped after {limit:.0f} s"}
    if code:
        return {"status": "failed", **result, "reason": _last_line(log, code)}
    skipped = bool(rows) and all("skipped" in row for row in rows)
    return {"status": "skipped" if skipped else "ok", **result}


def stop_processes(mark: str) -> None:
    """End every process that inherited this mark, also in another session or without its parent:
    TERM, then KILL. What a part leaves behind would hold memory of the GPU.
    """
    processes = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(MARK) == mark
    ]
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(process)
        deadline = time.monotonic() + KILL_GRACE_SECONDS
        while processes := [process for process in processes if is_alive(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs: in a container a process without a parent stays a zombie."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:200] if lines else 'no output'}"
