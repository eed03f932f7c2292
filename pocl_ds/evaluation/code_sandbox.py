"""Python code of a model's answer and its tests, run in a sandbox by bwrap (bubblewrap).

A program sees a Python with its standard library and an empty /tmp. It has no network, no other
process, no file of the user and no variable of the environment. It ends with this process. The
kernel limits its time, memory, files and processes. It does not count the processes of root, so a
program that root starts runs as NOBODY.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pocl_ds.errors import ResourceError

MAX_SECONDS = 30  # of a program
# By the names of setrlimit: seconds of processor time, bytes of address space and of a file, number
# of processes.
LIMITS = {"CPU": 10, "AS": 1 << 30, "FSIZE": 1 << 24, "NPROC": 128, "CORE": 0}
MAX_REPLY_BYTES = 1 << 12
NOBODY = 65534
INVALID, FAILED, OUT_OF_TIME, ENDED = "not valid Python", "failed", "out of time", "ended early"

# The interpreter outside its virtual environment, without installed packages.
PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-c"]
# Reads {"program", "tests", "key", "limits"} from stdin. It replies on stdout, and with the key
# after the last test alone, so that an answer that exits does not pass.
RUNNER = f"""
import json, os, resource, sys
request = json.loads(sys.stdin.buffer.read())
for limit, value in request["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
if os.getuid() == 0:
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
reply, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
def end(result, error=None):
    text = "" if error is None else (type(error).__name__ + ": " + str(error)[:200])
    os.write(reply, json.dumps({{"result": result, "error": text}}).encode())
    os._exit(0)
names = {{"__name__": "__main__"}}
try:
    program = compile(request["program"], "answer", "exec", dont_inherit=True)
except BaseException as error:
    end({INVALID!r}, error)
try:
    exec(program, names)
    exec(compile(request["tests"], "tests", "exec", dont_inherit=True), names)
except SystemExit as error:
    end("")
except BaseException as error:
    end({FAILED!r}, error)
end(request["key"])
"""


def run_tests(program: str, tests: str) -> str | None:
    """Run a program and then its tests in the namespace of the program.

    Returns None if the tests ended without an error, else what happened, in words. Raises
    ResourceError if there is no sandbox here.
    """
    key = secrets.token_hex(16)
    request = {"program": program, "tests": tests, "key": key, "limits": LIMITS}
    with tempfile.TemporaryFile() as reply:
        try:
            code = subprocess.run(
                [*_sandbox(), *PYTHON, RUNNER],
                input=json.dumps(request).encode(),
                stdout=reply,
                stderr=subprocess.DEVNULL,
                timeout=MAX_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{OUT_OF_TIME} (took more than {MAX_SECONDS} s)"
        reply.seek(0)
        content = reply.read(MAX_REPLY_BYTES)
    if code - 128 in (signal.SIGXCPU, signal.SIGKILL):  # as bwrap reports them
        return f"{OUT_OF_TIME} (took more than {LIMITS['CPU']} s of processor time)"
    try:
        answer = json.loads(content)
        result, error = str(answer["result"]), str(answer["error"])
    except (ValueError, KeyError, TypeError):
        return ENDED
    if result == key:
        return None
    if result not in (INVALID, FAILED):
        return ENDED
    return f"{result} ({error})"


@functools.cache
def check_sandbox() -> None:
    """Raise ResourceError if programs cannot run in a sandbox here."""
    needs = "a benchmark with `verify: code` runs code in a sandbox, which needs bubblewrap (bwrap)"
    if shutil.which("bwrap") is None:
        raise ResourceError(
            f"{needs}, which is not installed: install the package bubblewrap, or set verify to "
            "null"
        )
    process = subprocess.run(
        [*_sandbox(), *PYTHON, "import json, resource"], capture_output=True, text=True
    )
    if process.returncode:
        reason = " ".join(process.stderr.split())[:200]
        raise ResourceError(
            f"{needs} and user namespaces, and it does not start here ({reason}): let an "
            "administrator enable them, evaluate on another machine, or set verify to null"
        )


def _sandbox() -> list[str]:
    """The command that runs another one in the sandbox."""
    is_root = os.geteuid() == 0
    arguments = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    if is_root:  # its capabilities end when the runner becomes NOBODY
        arguments += [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts", "cgroup-try")]
        arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        arguments += ["--perms", "1777"]
    else:
        arguments.append("--unshare-all")
    arguments += ["--tmpfs", "/tmp"]

    # The system's libraries, and Python with its standard library.
    for path in map(Path, ("/usr", "/lib", "/lib64", "/bin")):
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        for folder in reversed(prefix.parents[:-1]) if is_root else ():  # may be closed to NOBODY
            arguments += ["--perms", "0755", "--dir", str(folder)]
        arguments += ["--ro-bind", str(prefix), str(prefix)]
    return [*arguments, "--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp"]
