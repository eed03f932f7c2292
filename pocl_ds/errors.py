"""What a user can cause. Each message is one sentence: the field or file, what was found, what to
do.

The command line prints the sentence and exits with `exit_code`; a traceback means a defect of ours.
"""

import re

RESUME = 75  # exit code EX_TEMPFAIL: everything is saved, start the same command again
UNFIT = 71  # EX_OSERR: this node cannot do its part, another may
HANG = 74  # a rank was silent for too long
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)


class PoclError(Exception):
    """Root of the tree."""

    exit_code = 2


class RecipeError(PoclError, ValueError):
    """A field of the recipe, or a contradiction between fields."""


class DataError(PoclError, ValueError):
    """An instruction file, a sample in it, or a data set on the Hub."""


class ModelError(PoclError, ValueError):
    """A model folder, its tokenizer, or a pair of models that do not go together."""


class ArtifactError(PoclError, RuntimeError):
    """A run directory: another recipe's, unfinished, damaged, or not writable."""


class ResourceError(PoclError, RuntimeError):
    """The machine: too little memory or disk, too few devices, a missing package."""


class NumericalError(PoclError, ArithmeticError):
    """A loss or gradient that is not finite."""


class DisagreementError(PoclError, RuntimeError):
    """Ranks that were about to do different things."""


class Interrupted(PoclError):
    """A signal stopped the work; what is finished is saved and the same command goes on."""

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def memory_fault(error: Exception) -> str | None:
    """What was asked for, and of what, where a machine's or a GPU's memory ran out; None where that
    is not the fault. There is no one type for it: torch, its libraries and numpy each have their
    own.
    """
    said = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(said):
        return None
    parts = (
        r"tried to allocate ([\d.]+ \w+)",
        r"(GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free)",
    )
    found = [part[1] for part in (re.search(text, said, re.IGNORECASE) for text in parts) if part]
    return ", ".join(found) or said[:200] or "no more is known"
