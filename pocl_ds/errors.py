"""Errors that a user can cause and fix, exit codes, and suggestions for misspelled names.

Every message is one sentence: the field or file, what was found there, and what to do. The command
line prints it and exits with the error's `exit_code`; a traceback means a defect of the program.

    PoclError
    ├── RecipeError         ValueError        a field of the recipe, or fields that contradict
    ├── DataError           ValueError        a data file, one of its records, or a Hub dataset
    ├── ModelError          ValueError        a model, its tokenizer, or two that do not match
    ├── ArtifactError       RuntimeError      a run directory or a file in it
    ├── ResourceError       RuntimeError      memory, disk, devices, or a missing package
    ├── NumericalError      ArithmeticError   a loss or gradient that is not finite
    ├── DisagreementError   RuntimeError      ranks that would do different things
    ├── StepFailedError     RuntimeError      a workflow step that ran in its own process
    └── Interrupted                           a signal
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

EXIT_RESUME = 75  # exit code (EX_TEMPFAIL): everything is saved, start the same command again
EXIT_UNFIT_NODE = 71  # exit code (EX_OSERR): this node cannot do its part, another node may
EXIT_HANG = 74  # exit code: a rank made no progress for too long
# In the message of a rank that did not fail first.
LOST_RANK = "lost the connection to another rank"
# What gloo, NCCL and torch's store say when a process at the other end is gone.
CONNECTION_LOST = re.compile(
    r"Connection (?:closed|reset|refused)|Connection was likely closed|[Bb]roken pipe|"
    r"remote process exited|communicator was aborted|Socket closed"
)
COLLECTIVE = re.compile(r"gloo|nccl|TCPStore|c10d|transport/tcp|Failed to recv", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)


class PoclError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 2


class RecipeError(PoclError, ValueError):
    """A field of the recipe has a wrong value, or fields contradict each other."""


class DataError(PoclError, ValueError):
    """A data file, a record in it, or a dataset on the Hub cannot be used.

    reason: a few words that all errors of one kind share, to count them by.
    """

    def __init__(self, message: str, *, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


class ModelError(PoclError, ValueError):
    """A model or its tokenizer cannot be used, or two models do not match."""


class ArtifactError(PoclError, RuntimeError):
    """A run directory belongs to another recipe, or is unfinished, damaged or not writable."""


class ResourceError(PoclError, RuntimeError):
    """The machine lacks memory, disk space, devices or a package."""


class NumericalError(PoclError, ArithmeticError):
    """A loss or gradient is not finite."""


class DisagreementError(PoclError, RuntimeError):
    """The ranks are about to do different things."""


class StepFailedError(PoclError, RuntimeError):
    """A workflow step failed in its own process, which has logged the reason."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(PoclError):
    """A signal stopped the work; finished work is saved, and the same command continues it."""

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """The known name that a misspelled one resembles most; None if it resembles none."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return matches[0] if matches else None


def did_you_mean(name: object, known: Collection[str]) -> str:
    """The remedy for an unknown name: `did you mean X?` with the nearest known name, else all known
    names.
    """
    if nearest := nearest_name(name, known):
        return f"did you mean {nearest}?"
    return f"use one of {', '.join(known)}" if known else "none is registered, remove it"


def decode_fault(error: UnicodeDecodeError) -> str:
    """Where a text that was read as a whole is not UTF-8: `invalid start byte in line 3`."""
    return f"{error.reason} in line {error.object[: error.start].count(10) + 1}"


def memory_fault(error: Exception) -> str | None:
    """What an out-of-memory error says about the request and the device; None for other errors.

    There is no common exception type: torch, its libraries and numpy each have their own.
    """
    message = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(message):
        return None
    patterns = (
        r"tried to allocate ([\d.]+ \w+)",
        r"(GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free)",
    )
    matches = (re.search(pattern, message, re.IGNORECASE) for pattern in patterns)
    details = [match[1] for match in matches if match]
    return ", ".join(details) or message[:200] or "the error has no details"


def connection_fault(error: Exception) -> str | None:
    """What a collective says when another rank is gone; None for other errors.

    gloo raises RuntimeError, NCCL and the store subclasses of it.
    """
    message = " ".join(str(error).split())
    if (match := CONNECTION_LOST.search(message)) and COLLECTIVE.search(message):
        return match[0]
    return None


def compile_fault(error: Exception) -> str | None:
    """What torch.compile says of a failed compilation, in one line; None for other errors.

    The classes are compared by name, since this module does not import torch.
    """
    bases = {base.__name__ for base in type(error).__mro__}
    if not bases & {"TorchDynamoException", "TritonError"}:
        return None
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200].rstrip(".") for line in lines if line), type(error).__name__)
