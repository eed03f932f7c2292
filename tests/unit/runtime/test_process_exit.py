"""How processes leave: signals before there is anything to save, and the word of a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, os, sys, time
from pocl_ds.runtime.process_exit import leave, leave_when_asked, leave_word
leave_when_asked()
atexit.register(lambda: print("tidied", flush=True))
try:
    print("ready", flush=True)
    if "wait" in sys.argv:
        time.sleep(30)
except SystemExit as leaving:
    leave_word(leaving.code, "asked")
    leave_word(1, "a second word")
    leave(leaving.code)
leave(7)
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
def test_a_signal_before_the_training_says_resume_me(
    number: signal.Signals, tmp_path: Path
) -> None:
    child = start("wait", RANK="3", POCL_EXITS=str(tmp_path / "exits"))
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 75 and number.name in err and "tidied" in out
    word = json.loads((tmp_path / "exits" / "rank-3.json").read_text())
    assert (word["code"], word["error"], word["node"]) == (75, "asked", os.uname().nodename)


WORDS = {
    "a refusal": (
        "from pocl_ds.cli.main import main; sys.exit(main(['run', 'no such recipe']))",
        2,
    ),
    "a defect": (
        "from pocl_ds.cli import main as cli; cli._main = lambda _: 1 / 0; sys.exit(cli.main([]))",
        1,
    ),
    "a signal": (
        "from pocl_ds.runtime import process_exit; process_exit.leave_when_asked(); os.kill(os.getpid(), 15); "
        "time.sleep(9)",
        75,
    ),
    "a hang": (
        "from pocl_ds.training.watchdog import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0.2): time.sleep(9)",
        74,
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_last_word_that_cannot_be_written_changes_no_exit_code(case: str, tmp_path: Path) -> None:
    """As of a rank whose log lies on a full disk."""
    program, code = WORDS[case]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"import os, pathlib, sys, time\n{program}", str(tmp_path)],
            stderr=full,
            timeout=60,
        )
    assert done.returncode == code


@pytest.mark.parametrize("words", [["run", "quickstart", "--dry-run"], ["bench", "list"]])
def test_output_that_cannot_be_written_is_a_sentence(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pocl_ds.cli.main", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    said = "an output's disk is full (No space left on device): free some space and start again, finished work is kept"
    assert done.stderr == f"pocl {words[0]}: {said}\n"


@pytest.mark.parametrize(
    "became",
    ["ImportError('PyCapsule_Import could not import')", "ModelError('it cannot be loaded')"],
)
def test_ctrl_c_is_one_whatever_a_library_makes_of_it(became: str) -> None:
    program = f"""
import os, signal, sys
from pocl_ds.cli import main as cli
from pocl_ds.workflow import pipeline
from pocl_ds.errors import ModelError
def imports(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        import time
        time.sleep(9)
    except KeyboardInterrupt:
        raise {became} from None
pipeline.join = imports
sys.exit(cli.main(["preprocess", "quickstart", "--run-dir", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "nowhere"],
        text=True,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.endswith("interrupted; finished work is kept, the same command goes on\n")


def test_ctrl_c_in_a_destructor_comes_again() -> None:
    """Where Python prints its KeyboardInterrupt and goes on; any other fault of one is printed as
    ever.
    """
    program = """
import os, signal, sys, time
from pocl_ds.cli import main as cli
from pocl_ds.workflow import pipeline
class Left:
    def __init__(self, what): self.what = what
    def __del__(self): self.what()
def works(*_):
    Left(lambda: 1 / 0)
    Left(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))
    time.sleep(30)
pipeline.join = works
sys.exit(cli.main(["preprocess", "quickstart", "--run-dir", "nowhere"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        text=True,
        capture_output=True,
        timeout=25,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (
        done.returncode == 130
        and "ZeroDivisionError" in done.stderr
        and "KeyboardInterrupt" not in done.stderr
    )
    assert done.stderr.endswith("interrupted; finished work is kept, the same command goes on\n")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}])
def test_a_code_is_handed_on(environment: dict[str, str]) -> None:
    out, _ = (child := start(**environment)).communicate(timeout=20)
    assert child.returncode == 7 and out == "ready\ntidied\n"
