"""Find the rank that failed first, from the ranks' exit codes and exit records. For
launch/train.sh:

    python launch/pocl.py pocl_ds.runtime.first_failure FOLDER RANK:CODE:PID...

prints the rank, its exit code, and `signal` if a signal ended it, else `exit`; on a second line the
error message, or what the signal means. Ranks end within moments of each other, most of them
because another one is gone, so the order in which the launcher notices them says little.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.errors import EXIT_RESUME, LOST_RANK
from pocl_ds.runtime.process_exit import node_name, read_exit_records
from pocl_ds.runtime.signal_causes import SIGNAL_BASE, describe_signal


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
    # A rank that only lost the connection to another one did not fail first.
    failures.sort(key=lambda record: LOST_RANK in record["error"])
    if killed or not failures:
        rank = killed[0] if killed else next(iter(exit_codes))
        return rank, exit_codes[rank], ""
    failure = failures[0]
    return _rank_of(failure), int(failure["code"]), " ".join(failure["error"].split())


def _rank_of(record: Mapping[str, Any]) -> int:
    return int(record["rank"].removeprefix("rank-"))


def main(folder: Path, arguments: Sequence[str]) -> None:
    """Print rank, exit code and message of the first failure. arguments: RANK:CODE:PID."""
    ended = [tuple(map(int, argument.split(":"))) for argument in arguments]
    codes, pids = {rank: code for rank, code, _ in ended}, {rank: pid for rank, _, pid in ended}
    rank, code, message = first_failure(codes, read_exit_records(folder))
    by_signal = not message and code > SIGNAL_BASE and code != SIGNAL_BASE + signal.SIGINT
    if by_signal:
        words = describe_signal(code - SIGNAL_BASE, pids[rank])
        message = (
            f"rank {rank} on {node_name()} was {words}: finished work is saved; run the same "
            "command again to continue"
        )
    print(f"{rank} {code} {'signal' if by_signal else 'exit'}\n{message}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
