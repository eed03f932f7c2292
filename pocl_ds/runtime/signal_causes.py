"""What a signal that ended a process means, with the kernel's own words where they can be read."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from pathlib import Path

SIGNAL_BASE = 128  # a shell's exit code of a process that a signal ended is 128 + its number
CAUSES = {
    signal.SIGKILL: "often because memory ran out",
    signal.SIGSEGV: "a crash of a library or a driver",
    signal.SIGABRT: "a library gave up, mostly after its own message",
    signal.SIGFPE: "a crash of a library",
    signal.SIGILL: "a library was built for another processor",
    signal.SIGBUS: "often because /dev/shm or a disk is full",
    signal.SIGTERM: "somebody or the scheduler ended it",
    signal.SIGXCPU: "it reached its limit of processor time",
}
MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
DMESG_SECONDS = 5.0


def describe_signal(number: int, pid: int) -> str:
    """Words for a process that a signal ended: `killed by SIGKILL, often because memory ran out`.

    pid: its process id, by which the kernel's log names it.
    """
    with contextlib.suppress(ValueError):
        received = signal.Signals(number)
        cause = CAUSES.get(received)
        if received is signal.SIGKILL and (evidence := _out_of_memory(pid)):
            cause = f"because memory ran out ({evidence})"
        return f"killed by {received.name}" + (f", {cause}" if cause else "")
    return f"killed by signal {number}"


def _out_of_memory(pid: int) -> str | None:
    """What the kernel says about memory that ran out; None if it says nothing, or nobody may read
    it.
    """
    log = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        log = subprocess.run(
            ["dmesg"], capture_output=True, text=True, errors="replace", timeout=DMESG_SECONDS
        ).stdout
    for line in reversed(log.splitlines()):
        if re.search(rf"[Kk]illed process {pid}\b", line):
            return f"dmesg: {line.strip()}"
    with contextlib.suppress(OSError, ValueError):
        events = dict(line.split() for line in MEMORY_EVENTS.read_text().splitlines())
        if count := int(events.get("oom_kill", 0)):
            return f"the memory limit of this control group has ended {count} processes so far"
    return None
