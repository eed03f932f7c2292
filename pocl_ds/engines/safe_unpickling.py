"""Load checkpoints that a library unpickles as data only: a pickle may otherwise run any code."""

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

# torch.load obeys it even if its caller passes weights_only=False.
FORCE_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def pickle_by_value(kind: type[Enum]) -> None:
    """Pickle members of an enumeration as its class and a value, which `data_only` can load.

    Python 3.11.0 to 3.11.3 (Debian 12 has one of them) write the function getattr instead, and a
    pickle that may call getattr can do anything.
    """
    copyreg.pickle(kind, lambda member: (kind, (member.value,)))


@contextlib.contextmanager
def data_only(directory: Path, *classes: type) -> Iterator[None]:
    """Within the block `torch.load` builds only tensors, plain values and objects of `classes`,
    also in processes that are forked there.

    Raises ArtifactError if a file holds anything else.
    """
    previous = os.environ.get(FORCE_VARIABLE)
    os.environ[FORCE_VARIABLE] = "1"
    try:
        with torch.serialization.safe_globals([*classes]):
            yield
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ArtifactError(
            f"the checkpoint {directory} contains more than data "
            f"({name[1] if name else 'a damaged pickle'}); none of its code was run. Remove it, "
            f"and training resumes from the previous checkpoint"
        ) from None
    finally:
        if previous is None:
            del os.environ[FORCE_VARIABLE]
        else:
            os.environ[FORCE_VARIABLE] = previous
