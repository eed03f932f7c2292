"""How processes end: signals before there is a state to save, and exit records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_ds.runtime.process_exit import JOB_RANK, read_exit_records, record_exit

PROGRAM = """
import atexit, os, sys, time
from pocl_ds.runtime.process_exit import exit_process, install_signal_handlers, record_exit
install_signal_handlers()
atexit.register(lambda: print("cleaned up", flush=True))
try:
    print("ready", flush=True)
    if "wait" in sys.argv:
        time.sleep(30)
except SystemExit as leaving:
    record_exit(leaving.code, "first record")
    record_exit(1, "second record")
    exit_process(leaving.code)
exit_process(7)
"""


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_before_training_exits_with_the_resume_code(
    number: signal.Signals, tmp_path: Path
) -> None:
    child = start("wait", RANK="3", POCL_EXITS=str(tmp_path / "exits"))
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 75 and number.name in err and "cleaned up" in out
    record = json.loads((tmp_path / "exits" / "rank-3.75.json").read_text())
    assert (record["code"], record["error"], record["node"]) == (
        75,
        "first record",
        os.uname().nodename,
    )


INTERRUPTED = "interrupted; finished work is saved; run the same command again to continue"
ENDINGS = {
    "a refusal": (
        "from pocl_ds.cli.main import main; sys.exit(main(['run', 'no such recipe']))",
        2,
    ),
    "a defect": (
        "from pocl_ds.cli import main as cli; cli._main = lambda _: 1 / 0; sys.exit(cli.main([]))",
        1,
    ),
    "a signal": (
        "from pocl_ds.runtime import process_exit; process_exit.install_signal_handlers()\n"
        "os.kill(os.getpid(), 15); time.sleep(9)",
        75,
    ),
    "a closed terminal": (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may ignore it\n"
        "from pocl_ds.runtime import process_exit; process_exit.install_signal_handlers()\n"
        "os.kill(os.getpid(), 1); time.sleep(9)",
        75,
    ),
    "a hang": (
        "from pocl_ds.training.watchdog import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0.2): time.sleep(9)",
        74,
    ),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_an_error_that_cannot_be_printed_changes_no_exit_code(case: str, tmp_path: Path) -> None:
    """For example, if the rank's log is on a full disk."""
    program, code = ENDINGS[case]
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-c", f"import os, pathlib, sys, time\n{program}", str(tmp_path)],
            stderr=full,
            timeout=60,
        )
    assert process.returncode == code


@pytest.mark.parametrize("words", [["run", "quickstart", "--dry-run"], ["bench", "list"]])
def test_a_full_disk_of_stdout_is_one_sentence(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "pocl_ds.cli.main", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert process.returncode == 2
    message = (
        "the disk of an output is full (No space left on device): free some space and run the same "
        "command again; finished work is saved"
    )
    assert process.stderr == f"pocl {words[0]}: {message}\n"


@pytest.mark.parametrize(
    "replacement",
    ["ImportError('PyCapsule_Import could not import')", "ModelError('it cannot be loaded')"],
)
def test_ctrl_c_interrupts_even_if_a_library_replaces_it(replacement: str) -> None:
    program = f"""
import os, signal, sys
from pocl_ds.cli import main as cli
from pocl_ds.workflow import run_setup
from pocl_ds.errors import ModelError
def import_module(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        import time
        time.sleep(9)
    except KeyboardInterrupt:
        raise {replacement} from None
run_setup.open_run_directory = import_module
sys.exit(cli.main(["preprocess", "quickstart", "--run-dir", sys.argv[1]]))
"""
    process = subprocess.run(
        [sys.executable, "-c", program, "nowhere"],
        text=True,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.returncode == 130 and "Traceback" not in process.stderr
    assert process.stderr.endswith(f"{INTERRUPTED}\n")


def test_ctrl_c_in_a_destructor_is_sent_again() -> None:
    """Python would print the KeyboardInterrupt and continue. Other errors are printed as usual."""
    program = """
import os, signal, sys, time
from pocl_ds.cli import main as cli
from pocl_ds.workflow import run_setup
class Destructor:
    def __init__(self, call): self.call = call
    def __del__(self): self.call()
def work(*_):
    Destructor(lambda: 1 / 0)
    Destructor(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))
    time.sleep(30)
run_setup.open_run_directory = work
sys.exit(cli.main(["preprocess", "quickstart", "--run-dir", "nowhere"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        text=True,
        capture_output=True,
        timeout=25,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (
        process.returncode == 130
        and "ZeroDivisionError" in process.stderr
        and "KeyboardInterrupt" not in process.stderr
    )
    assert process.stderr.endswith(f"{INTERRUPTED}\n")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}])
def test_exit_process_exits_with_its_code(environment: dict[str, str]) -> None:
    out, _ = (child := start(**environment)).communicate(timeout=20)
    assert child.returncode == 7 and out == "ready\ncleaned up\n"


def test_exit_process_takes_no_modules_apart() -> None:
    """It costs a forked process seconds, which would first copy them."""
    program = (
        "from pocl_ds.runtime.process_exit import exit_process\n"
        "class Global:\n"
        "    def __del__(self): print('taken apart')\n"
        "value = Global()\n"
        "print('flushed')\n"
        "exit_process(3)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (3, "flushed\n")


def test_the_exit_record_has_the_rank_that_the_launcher_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of the teacher has another number in its own world."""
    monkeypatch.setenv("POCL_EXITS", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(JOB_RANK, "2")
    record_exit(2, "reason")
    assert [record["rank"] for record in read_exit_records(tmp_path)] == ["rank-2"]
