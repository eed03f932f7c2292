"""The roles of a job's ranks where the teacher has its own ranks: the first ranks are the
student's, the others the teacher's.

Each role is its own world. After `split_ranks` the environment's RANK and WORLD_SIZE are those
of this process in its role, so that collectives, DeepSpeed and checkpoints see the ranks of one
role only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pocl_ds.errors import ResourceError
from pocl_ds.runtime.process_exit import JOB_RANK, rank_and_world_size

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_SECONDS = 600.0  # that the processes of a job may take to start
FAILURE = "failure of the teacher"  # key in the store: why the teacher's ranks ended

_roles: JobRoles | None = None


@dataclass(frozen=True)
class JobRoles:
    """How the ranks of this job are divided. store: which all of them share."""

    store: Store
    rank: int  # of this process in the job
    student_ranks: int
    teacher_ranks: int
    ranks_per_node: int | None = None  # in the job; None if the launcher does not say

    @property
    def is_teacher(self) -> bool:
        """Whether this process runs the teacher."""
        return self.rank >= self.student_ranks

    @property
    def own_store(self) -> Store:
        """The part of the store for the process group of this process's role."""
        from torch.distributed import PrefixStore

        return PrefixStore("teacher" if self.is_teacher else "student", self.store)

    def on_this_node(self) -> tuple[int, int]:
        """Number of the student's and of the teacher's ranks on this node."""
        per_node = self.ranks_per_node or self.student_ranks + self.teacher_ranks
        first = self.rank // per_node * per_node
        students = min(max(self.student_ranks - first, 0), per_node)
        return students, per_node - students

    def even_ranks_per_node(self) -> int | None:
        """Number of the own role's ranks on each node that has any; None if the nodes differ."""
        if self.ranks_per_node is None:
            return None
        count = self.teacher_ranks if self.is_teacher else self.student_ranks
        first = self.student_ranks if self.is_teacher else 0
        if first // self.ranks_per_node == (first + count - 1) // self.ranks_per_node:
            return count
        is_even = first % self.ranks_per_node == 0 and count % self.ranks_per_node == 0
        return self.ranks_per_node if is_even else None


def job_roles() -> JobRoles | None:
    """The roles of this job; None if the teacher has no separate ranks."""
    return _roles


def split_ranks(teacher_ranks: int) -> JobRoles:
    """Connect all processes of the job, and make this one a rank of its role. Call it before any
    process group exists; all processes call it together.

    Raises ResourceError if no rank is left for the student.
    """
    global _roles
    rank, world_size = rank_and_world_size()
    if world_size <= teacher_ranks:
        raise ResourceError(
            f"{world_size} processes were started, and teacher.placement=own_ranks takes "
            f"teacher.ranks={teacher_ranks} of them for the teacher: start more, at least "
            f"{teacher_ranks + 1}"
        )
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=CONNECT_SECONDS))))
    per_node = os.environ.get("LOCAL_WORLD_SIZE")
    roles = JobRoles(
        store,
        rank,
        world_size - teacher_ranks,
        teacher_ranks,
        int(per_node) if per_node else None,
    )
    os.environ[JOB_RANK] = str(rank)
    os.environ["RANK"] = str(rank - roles.student_ranks if roles.is_teacher else rank)
    os.environ["WORLD_SIZE"] = str(teacher_ranks if roles.is_teacher else roles.student_ranks)
    even = roles.even_ranks_per_node()
    if even is None:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    else:
        os.environ["LOCAL_WORLD_SIZE"] = str(even)
    _roles = roles
    return roles
