"""Checkpoints that a library unpickles are read as data: a pickle may otherwise run whatever its
writer wanted.
"""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import torch

from pocl_ds.errors import ArtifactError

# torch.load obeys it also where its caller says weights_only=False
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def pickle_by_value(kind: type[Enum]) -> None:
    """From now on members of an enumeration are pickled as its class and a value, which `data_only`
    reads.

    Python 3.11.0 to 3.11.3 (Debian 12's is one) write the function getattr instead, with which a
    pickle could do anything.
    """
    copyreg.pickle(kind, lambda member: (kind, (member.value,)))


@contextlib.contextmanager
def data_only(directory: Path, *classes: type) -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain values and objects of `classes`, also in processes
    that are forked there.

    Raises ArtifactError where a file holds anything else.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([*classes]):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ArtifactError(
            f"the checkpoint {directory} holds more than data "
            f"({found[1] if found else 'a damaged pickle'}), and "
            "nothing of it was run: remove it, training goes on from the one before"
        ) from None
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
