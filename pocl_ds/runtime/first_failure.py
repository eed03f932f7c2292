"""Find the rank that failed first, from the ranks' exit codes and exit records. For
launch/train.sh:

    python launch/pocl.py pocl_ds.runtime.first_failure FOLDER RANK:CODE...

prints rank and exit code, and on a second line the error message. Ranks end within moments of each
other, most of them because another one is gone, so the order in which the launcher notices them
says little.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.errors import EXIT_RESUME
from pocl_ds.runtime.process_exit import read_exit_records

SIGNAL_BASE = 128  # the exit code of a process that a signal ended is 128 + the signal's number


def first_failure(
    exit_codes: Mapping[int, int], records: Sequence[Mapping[str, Any]]
) -> tuple[int, int, str]:
    """Rank, exit code and error message of the first failure.

    exit_codes: of the ranks that failed before the launcher ended any, in the order in which it
    noticed them. records: exit records by time. The message is empty if the rank left no record.
    """
    recorded = {_rank_of(record) for record in records}
    # A rank that a signal ended, for example for lack of memory, cannot write a record.
    killed = [
        rank for rank, code in exit_codes.items() if code > SIGNAL_BASE and rank not in recorded
    ]
    failures = [record for record in records if record["code"] not in (0, EXIT_RESUME)]
    if killed or not failures:
        rank = killed[0] if killed else next(iter(exit_codes))
        return rank, exit_codes[rank], ""
    failure = failures[0]
    return _rank_of(failure), int(failure["code"]), " ".join(failure["error"].split())


def _rank_of(record: Mapping[str, Any]) -> int:
    return int(record["rank"].removeprefix("rank-"))


if __name__ == "__main__":
    pairs = [argument.split(":") for argument in sys.argv[2:]]
    rank, code, message = first_failure(
        {int(rank): int(code) for rank, code in pairs}, read_exit_records(Path(sys.argv[1]))
    )
    print(f"{rank} {code}\n{message}")
