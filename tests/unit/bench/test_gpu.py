"""`pocl bench gpu` and launch/gpu.sh: the runner with fake parts, the page, and each measurement
against an independent form, with tiny shapes on a CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional

from pocl_ds.bench import loss as bench_loss
from pocl_ds.bench import workloads
from pocl_ds.bench.gpu import attention, estimates, loss, pairs, run, runner, tables
from pocl_ds.bench.gpu.parts import PARTS, TOTAL_SECONDS, Part, select_parts
from pocl_ds.bench.gpu.rows import NotAvailable, RowWriter, read_rows
from pocl_ds.errors import RecipeError

ROOT = Path(__file__).resolve().parents[3]
MACHINE = {
    "dry_run": False,
    "card": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "cuda": "13.0",
    "python": "3.12.1",
    "packages": {"torch": "2.11.0"},
    "date": "2026-11-29",
    "commit": "abc1234",
}
# A part that behaves as its argument says. `hangs` starts a process in another session that ignores
# TERM and outlives its parent.
FAKE_PART = """
import subprocess, sys, tempfile, time
from pathlib import Path
from pocl_ds.bench.gpu.rows import RowWriter

rows, behavior = RowWriter(Path(sys.argv[1])), sys.argv[2]
if behavior == "skips":
    rows.write({"name": "x", "skipped": "vllm is not installed"})
    sys.exit()
if behavior == "hangs":
    child = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo up; sleep 60"], start_new_session=True, stdout=-1
    )
    child.stdout.readline()
    rows.write({"name": "x", "pid": child.pid, "folder": tempfile.mkdtemp()})
    time.sleep(60)
rows.write({"name": "x", "outcome": "passed", "duration": 1.0})
if behavior == "fails":
    sys.exit("the reason")
"""


def fake_parts(folder: Path, *behaviors: str) -> list[Part]:
    (folder / "fake_part.py").write_text(FAKE_PART)
    return [
        Part(f"conformance-{name}", name, 2 if name == "hangs" else 60, "fake_part", (name,))
        for name in behaviors
    ]


@pytest.fixture
def fake_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "KILL_GRACE_SECONDS", 0.3)


@pytest.mark.usefixtures("fake_modules")
def test_a_fault_or_a_limit_of_one_part_leaves_the_others(tmp_path: Path) -> None:
    parts = fake_parts(tmp_path, "hangs", "fails", "skips", "works")
    results = runner.run_parts(parts, tmp_path / "out", MACHINE, print)
    by_name = {name.partition("-")[2]: part for name, part in results["parts"].items()}
    assert {name: part["status"] for name, part in by_name.items()} == {
        "hangs": "timed out",
        "fails": "failed",
        "skips": "skipped",
        "works": "ok",
    }
    assert by_name["fails"]["reason"] == "exit code 1: the reason"
    # Rows from before the fault count, and nothing of the part is left.
    (row,) = by_name["hangs"]["rows"]
    assert not psutil.pid_exists(row["pid"]) or not runner.is_alive(psutil.Process(row["pid"]))
    assert by_name["hangs"]["seconds"] < 30 and not Path(row["folder"]).parent.exists()
    assert by_name["fails"]["rows"] == by_name["works"]["rows"] != []
    assert runner.load_results(tmp_path / "out") == results
    assert "the reason" in (tmp_path / "out" / "conformance-fails.log").read_text()


@pytest.mark.usefixtures("fake_modules")
def test_a_second_call_adds_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "describe_machine", lambda **_: dict(MACHINE))
    parts, lines = fake_parts(tmp_path, "works", "fails"), []
    output = ["--output", str(tmp_path / "out")]
    run.run([*output, "--parts", "conformance-works"], lines.append, parts=parts)
    results = run.run(output, lines.append, parts=parts)
    starts = [line.partition(":")[0] for line in lines if "at most" in line]
    assert starts == ["conformance-works", "conformance-fails"]
    assert list(results["parts"]) == starts
    page = (tmp_path / "out" / "results.md").read_text()
    assert lines[-1].strip() == page.strip() and "### works" in page and "### fails" in page
    # A failed part runs again, and so does one of another commit or card.
    assert [p.title for p in runner.unfinished_parts(parts, results, MACHINE)] == ["fails"]
    for change in ({"commit": "new"}, {"card": "NVIDIA H200"}, {"dry_run": True}):
        assert runner.unfinished_parts(parts, results, {**MACHINE, **change}) == parts


@pytest.mark.usefixtures("fake_modules")
def test_a_part_may_use_the_time_that_earlier_ones_left(tmp_path: Path) -> None:
    parts, lines = fake_parts(tmp_path, "works", "skips"), []
    runner.run_parts(parts, tmp_path, MACHINE, lines.append)
    limits = [int(line.split()[3]) for line in lines if "at most" in line]
    assert limits[0] == 60 and 60 < limits[1] <= 120
    assert sum(part.limit_seconds for part in PARTS) <= TOTAL_SECONDS


def test_arguments() -> None:
    assert [part.name for part in select_parts(["steps", "loss"])] == [
        "loss",
        *(f"steps-{pair}" for pair in ("llama", "llama-long", "opt", "smollm2")),
    ]
    with pytest.raises(RecipeError, match="there is no part 'los': did you mean loss"):
        run.run(["--parts", "los"])
    with pytest.raises(RecipeError, match="'--fast' is no argument of `pocl bench gpu`"):
        run.parse_arguments(["--fast"])


def test_the_page_shows_every_kind_of_row() -> None:
    step = {"seconds": [0.5, 0.2, 0.21], "tokens_per_second": 17123.4, "mfu": 0.412}
    steps = [
        {"name": "pocl", **step, "peak_bytes": 3 << 30, "memory_ratio": 1.04, "speed_ratio": 0.9},
        {"name": "plain | all", **step, "peak_bytes": 60 << 30},
        {"name": "TRL", "skipped": "trl is not installed"},
        {"name": "full", "error": "out of memory"},
    ]
    kernel = {"seconds": [0.0012], "extra_bytes": 1 << 29, "gradient_error": 0.00123}
    other = {**MACHINE, "commit": "def5678"}
    results = {
        "parts": {
            "steps-opt": {"status": "timed out", "reason": "stopped after 50 s", "machine": other}
            | {"rows": steps},
            "loss": {"status": "ok", "machine": MACHINE}
            | {"rows": [{"group": "big", "name": "pocl", **kernel}]},
        }
    }
    page = tables.results_page(results)
    assert page.splitlines() == [
        "NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0. Python 3.12.1, torch 2.11.0. 2026-11-29, "
        "commit abc1234. Parts: loss.",
        "",
        "NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0. Python 3.12.1, torch 2.11.0. 2026-11-29, "
        "commit def5678. Parts: steps-opt.",
        "",
        "### Output head and divergence",
        "",
        "big:",
        "",
        "|  | ms | extra GiB | gradient error |",
        "| --- | ---: | ---: | ---: |",
        "| pocl | 1.20 (1.20..1.20) | 0.50 | 1.2e-03 |",
        "",
        "### Optimizer steps: OPT 6.7B into 1.3B, 64 instruction samples",
        "",
        "**timed out**: stopped after 50 s.",
        "",
        "|  | ms a step | tokens/s | MFU | peak GiB | peak / estimate | tokens/s / estimate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| pocl | 210 (200..500) | 17,123 | 41.2% | 3.00 | 1.04 | 0.90 |",
        r"| plain \| all | 210 (200..500) | 17,123 | 41.2% | 60.00 | – | – |",
        "| TRL | skipped: trl is not installed |  |  |  |  |  |",
        "| full | failed: out of memory |  |  |  |  |  |",
    ]
    assert all(part.name.partition("-")[0] in tables.COLUMNS for part in PARTS)
    dry = {"parts": {"loss": {"status": "ok", "machine": {**MACHINE, "dry_run": True}, "rows": []}}}
    assert "say nothing about a GPU" in tables.results_page(dry)


def test_the_page_counts_the_cases_of_a_test() -> None:
    rows = [
        {"name": "test_a[x]", "outcome": "passed", "duration": 1.0},
        {"name": "test_a[y]", "outcome": "passed", "duration": 2.0},
        {"name": "test_a[z]", "outcome": "failed", "duration": 9.0, "error": "assert 1 > 2"},
        {"name": "test_b[x]", "outcome": "skipped", "duration": 0.0, "skipped": "no vllm"},
        {"name": "test_a[w]", "outcome": "skipped", "duration": 0.0, "skipped": "no"},
    ]
    result = {"status": "failed", "reason": "exit code 1", "machine": MACHINE, "rows": rows}
    page = tables.results_page({"parts": {"conformance": result}})
    assert page.splitlines()[-3:] == [
        r"| test\_a\[z\] | failed: assert 1 &gt; 2 |  |",
        r"| test\_a | 2 passed, 1 skipped | 3.0 |",
        r"| test\_b | skipped: no vllm |  |",
    ]


def test_a_fault_of_one_measurement_is_a_row(tmp_path: Path) -> None:
    rows = RowWriter(tmp_path / "rows.jsonl")

    def fail(error: Exception) -> Any:
        raise error

    for error in (torch.OutOfMemoryError("CUDA"), NotAvailable("no"), ValueError("a\nb")):
        rows.measure({"name": "x"}, lambda error=error: fail(error))
    with rows.path.open("a") as file:
        file.write('{"name": "cut')
    outcomes = [{key: row[key] for key in row if key != "name"} for row in read_rows(rows.path)]
    assert outcomes == [{"error": "out of memory"}, {"skipped": "no"}, {"error": "ValueError: a"}]


def test_the_gradient_error_of_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The float64 reference equals autograd's, in chunks too; a wrong gradient shows."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    inputs = bench_loss.draw_inputs((20, 50, 8), torch.float64, torch.device("cpu"))
    leaves = [inputs.hidden.clone().requires_grad_(), inputs.weight]
    log_q = functional.log_softmax(leaves[0] @ leaves[1].T, -1)
    log_p = functional.log_softmax(inputs.teacher_hidden @ inputs.teacher_weight.T, -1).detach()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    for exact, gradient in zip(
        loss.exact_gradients(inputs), torch.autograd.grad(divergence, leaves), strict=True
    ):
        torch.testing.assert_close(exact, gradient, rtol=1e-10, atol=1e-14)
    single = bench_loss.draw_inputs((20, 50, 8), torch.float32, torch.device("cpu"))
    plain = bench_loss.contenders()["plain full logits"]
    doubled = lambda *tensors: 2 * plain(*tensors)  # noqa: E731
    assert loss.gradient_error(plain, single) < 1e-5
    assert loss.gradient_error(doubled, single) == pytest.approx(1.0, rel=1e-4)

    monkeypatch.setattr(loss, "DRY_RUN_SHAPES", ((20, 50, 8),))
    loss.main(rows := RowWriter(tmp_path / "rows.jsonl"), rounds=1)
    measured = read_rows(rows.path)
    assert [row["name"] for row in measured] == [*bench_loss.contenders()]
    assert all(row["gradient_error"] < 1e-5 and len(row["seconds"]) == 1 for row in measured)


def test_every_attention_has_the_exact_result(tmp_path: Path) -> None:
    attention.main(rows := RowWriter(tmp_path / "rows.jsonl"), rounds=1)
    measured = [row for row in read_rows(rows.path) if "skipped" not in row]
    assert len(measured) == 7 and all(row["error_norm"] < 1e-5 for row in measured)
    result = {"status": "ok", "machine": MACHINE, "rows": read_rows(rows.path)}
    page = tables.results_page({"parts": {"attention": result}})
    assert "failed" not in page and "each sample |" in page  # the kernel
    # Attention across samples, without a window, or without a cap differs.
    sides = attention.draw_sides(attention.DRY_RUN_SHAPES[0], torch.float32, torch.device("cpu"))
    plain = attention.DRY_RUN_SHAPES[0]
    whole = attention.Shape("", 4, 2, 16, (plain.tokens,))
    for shape in (whole, *attention.DRY_RUN_SHAPES[1:]):
        attend = attention.packed_attention(plain, torch.device("cpu"))
        assert attention.error(attend, sides, shape) > 1e-2


def test_estimates_of_a_step() -> None:
    """FLOPs by two formulas; a cached teacher needs no memory but its head's."""
    work = pairs.find_pair("llama", on_gpu=False)
    online, cached, sft = (
        estimates.estimate_step(work, mode) for mode in ("online", "cached_hidden_states", "none")
    )
    assert online.flops == pytest.approx(workloads.flops(work), rel=1e-6)
    assert online.memory > cached.memory > sft.memory and sft.flops < cached.flops < online.flops


def test_pairs_have_real_sizes() -> None:
    """Parameters of the published models, in millions; 64 samples of 157 tokens on average."""
    from pocl_ds.models.cost import model_shape

    millions = {
        name: [round(model_shape(config).parameters / 1e6) for config in pair.configs]
        for name in ("llama", "opt", "smollm2")
        for pair in [pairs.find_pair(name, on_gpu=True)]
    }
    assert millions == {"llama": [8030, 1236], "opt": [6658, 1316], "smollm2": [135, 99]}
    lengths = pairs.instruction_lengths()
    assert len(lengths) == 64 and all(0 < prompt < total <= 512 for prompt, total in lengths)
    assert sum(total for _, total in lengths) / 64 == pytest.approx(157, rel=0.1)


def test_contenders_of_steps_start_from_the_same_loss(tmp_path: Path) -> None:
    """One process on the CPU: with the same weights and batch, the online and the cached teacher
    and plain full logits have the same loss.
    """
    part = Part("steps-opt", "", 200, "pocl_ds.bench.gpu.steps", ("opt",))
    environment = runner.part_environment({**MACHINE, "dry_run": True})
    result = runner.run_part(part, tmp_path, part.limit_seconds, environment)
    log = (tmp_path / "steps-opt.log").read_text()
    assert result["status"] == "ok", log[-3000:]
    rows = {row["name"]: row for row in result["rows"]}
    assert not [row for row in rows.values() if "error" in row], log[-3000:]
    first = [
        rows[name]["losses"][0]
        for name in ("pocl, online teacher", "pocl, cached hidden states", "plain full logits")
    ]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert rows["pocl, SFT"]["losses"][0] != pytest.approx(first[0], rel=1e-2)
    timed = [row for row in rows.values() if "skipped" not in row]
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in timed)
    assert "memory_ratio" in rows["pocl, SFT"] and "memory_ratio" not in rows["plain full logits"]


@pytest.mark.parametrize("wheels", [True, False])
def test_the_script_passes_arguments_and_packages(wheels: bool, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "gpu.sh", tmp_path / "launch")
    python = tmp_path / "python"
    # Prints each call; unpacks archives with a real interpreter.
    python.write_text(
        f'#!/bin/bash\necho "$*"\ncase "$*" in *cli.main*) echo "path=$PYTHONPATH";\n'
        f'  for p in ${{PYTHONPATH//:/ }}; do ls "$p"; done ;;\n'
        f'  *zipfile*) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    folder = tmp_path / "packages"
    folder.mkdir()
    if wheels:
        (folder / "x.whl").touch()
        shutil.make_archive(str(folder / "y"), "zip", ROOT / "ds_configs")
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "gpu.sh"), "--parts", "loss,steps", "--dry-run"]
        + [str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHON": str(python), "PYTHONPATH": ""},
    )
    if not wheels:
        assert done.returncode == 2 and f"{folder} holds no wheels" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if line.startswith("-m ")]
    assert calls[0].startswith("-m pip install") and calls[0].endswith(f"{folder}/x.whl")
    assert calls[-1] == "-m pocl_ds.cli.main bench gpu --parts loss,steps --dry-run"
    assert "student_zero3.json" in done.stdout  # from the archive, on PYTHONPATH
    (path,) = [line for line in done.stdout.splitlines() if line.startswith("path=")]
    assert path.startswith(f"path={tmp_path}:") and not Path(path.rpartition(":")[2]).exists()
