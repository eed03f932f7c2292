"""Which ranks of a job are the student's and which the teacher's, on each node."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.errors import ResourceError
from pocl_ds.runtime import job_roles
from pocl_ds.runtime.job_roles import JobRoles

RANKS = st.integers(1, 9)


def roles(rank: int, students: int, teachers: int, per_node: int | None) -> JobRoles:
    return JobRoles(cast(Any, None), rank, students, teachers, per_node)


@given(RANKS, RANKS, st.integers(1, 4))
def test_the_nodes_count_every_rank_once(students: int, teachers: int, nodes: int) -> None:
    per_node = -(-(students + teachers) // nodes)
    teachers = nodes * per_node - students  # SLURM fills its nodes
    if teachers < 1:
        return
    ranks = [roles(r, students, teachers, per_node) for r in range(students + teachers)]
    assert [r.is_teacher for r in ranks] == [False] * students + [True] * teachers
    of_nodes = [ranks[node * per_node].on_this_node() for node in range(nodes)]
    assert [sum(counts) for counts in zip(*of_nodes, strict=True)] == [students, teachers]
    # What a role's ranks take for the ranks of a node is the same for all of them, and true.
    for own, place in ((ranks[:students], 0), (ranks[students:], 1)):
        (even,) = {r.even_ranks_per_node() for r in own}
        counts = {r.on_this_node()[place] for r in own}
        assert even is None or counts == {even}
        assert even is not None or len(counts) > 1 or nodes > 1


def test_without_a_number_of_ranks_per_node_there_is_one_node() -> None:
    assert roles(0, 3, 2, None).on_this_node() == (3, 2)
    assert roles(0, 3, 2, None).even_ranks_per_node() is None


def test_a_job_without_ranks_for_the_student_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"2 processes were started.*teacher\.ranks=2.*least 3"):
        job_roles.split_ranks(2)
