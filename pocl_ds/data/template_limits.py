"""Limits of time and memory for templates.

A sandbox keeps a template away from files and the network, not from `"%0999999999d" % 1` or from
loops in loops. Each template first renders one short sample in its own process, which the
kernel stops, before any data are read. Each sample is then rendered within the same limits, since
some templates cost too much with some samples only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

MAX_SECONDS, MAX_BYTES = 10, 2 << 30
OUT_OF_MEMORY, OUT_OF_TIME = 3, 4  # exit codes of the process
READ_EVERY = 64

_is_limited = False
_reading = (0, 0, 0)  # process, calls since its size was read, and that size


class TemplateCostError(Exception):
    """A template exceeded a limit; the message says which."""


@contextlib.contextmanager
def limited_rendering() -> Iterator[None]:
    """Render one sample within the limits: of processor time, and of memory in addition to what
    this process has. Raises TemplateCostError.

    Only the main thread gets signals and so has these limits; samples are tokenized in it. A block
    within a block shares its limits.
    """
    global _is_limited
    if _is_limited or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _raise_out_of_time:
        signal.signal(signal.SIGVTALRM, _raise_out_of_time)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    _is_limited = True
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min([_address_space() + MAX_BYTES, *limits]), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        yield
    except MemoryError:
        raise TemplateCostError(_out_of_memory()) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _is_limited = False


def exceeded_limit(work: Callable[[], object]) -> str | None:
    """Run `work` in a forked process. Returns which limit it exceeded, in words, or None; its
    result and its other errors are dropped.
    """
    child = os.fork()
    if child == 0:
        _work_and_exit(work)
    deadline = time.monotonic() + 3 * MAX_SECONDS  # the limit is one of processor time
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"{MAX_SECONDS} s"
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    if code in (-signal.SIGXCPU, OUT_OF_TIME):
        return f"{MAX_SECONDS} s"
    if code == -signal.SIGKILL:  # by the kernel, before the limit of memory was reached
        return "the memory that is free"
    return f"{MAX_BYTES >> 30} GiB of memory" if code == OUT_OF_MEMORY else None


def _work_and_exit(work: Callable[[], object]) -> None:
    code = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        seconds = int(time.process_time()) + MAX_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        limit = _address_space() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work()
    except Exception as error:
        code = _exit_code(error)
    finally:
        os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    """0 unless the error, or one that a library has wrapped, is about a limit."""
    while error is not None:
        if isinstance(error, MemoryError) or str(error) == _out_of_memory():
            return OUT_OF_MEMORY
        if isinstance(error, TemplateCostError):
            return OUT_OF_TIME
        error = error.__cause__ or error.__context__
    return 0


def _raise_out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise TemplateCostError(f"takes more than {MAX_SECONDS} s")


def _out_of_memory() -> str:
    return f"takes more than {MAX_BYTES / 2**30:.3g} GiB of memory"


def _address_space() -> int:
    """Bytes of address space of this process, read anew every READ_EVERY calls of a process."""
    global _reading
    pid, calls, size = _reading
    if pid != os.getpid() or calls >= READ_EVERY:
        with open("/proc/self/statm", encoding="ascii") as stream:
            calls, size = 0, int(stream.read().split()[0]) * resource.getpagesize()
    _reading = os.getpid(), calls + 1, size
    return size
