"""Which of several ranks failed first, for launch/train.sh, by how each ended and the words that
they left.

python launch/pocl.py pocl_ds.runtime.first_failure FOLDER RANK:CODE...     # prints rank, exit code and, on a
second line, the sentence

Ranks end within a moment of each other, most of them only since another was gone: whom the launcher
notices first is chance.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.errors import RESUME
from pocl_ds.runtime.process_exit import words_of_ranks

KILLED = 128  # exit codes above: a signal's number is added to it


def first_fault(
    ended: Mapping[int, int], words: Sequence[Mapping[str, Any]]
) -> tuple[int, int, str]:
    """Rank, exit code and sentence ("" where it left none) of the first fault.

    ended: exit codes of the ranks that failed before the launcher ended any, in the order in which
    it noticed. words: by time.
    """
    spoke = {int(word["rank"].removeprefix("rank-")) for word in words}
    silent = [rank for rank, code in ended.items() if code > KILLED and rank not in spoke]
    faults = [word for word in words if word["code"] not in (0, RESUME)]
    if silent or not faults:
        rank = silent[0] if silent else next(iter(ended))
        return rank, ended[rank], ""
    return (
        int(faults[0]["rank"].removeprefix("rank-")),
        int(faults[0]["code"]),
        " ".join(faults[0]["error"].split()),
    )


if __name__ == "__main__":
    pairs = [word.split(":") for word in sys.argv[2:]]
    rank, code, sentence = first_fault(
        {int(rank): int(code) for rank, code in pairs}, words_of_ranks(Path(sys.argv[1]))
    )
    print(f"{rank} {code}\n{sentence}")
