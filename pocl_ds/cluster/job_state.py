"""Whether SLURM is ending or preempting a running job, from its controller.

It imports only the standard library.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from pocl_ds.cluster import scheduler
from pocl_ds.errors import ResourceError


def ended_by_slurm(job: str) -> bool:
    """Whether SLURM is ending the job for another reason than its time limit.

    A cancelled job must not come back; one that was requeued, by a user or since a node failed,
    comes back by itself. SLURM does not tell the two apart while it ends the job.
    """
    text = controller_output("job", job)
    state = re.search(r"JobState=(\S+)", text)
    if state is None or state.group(1) in ("RUNNING", "TIMEOUT"):
        return False
    used, limit = (re.search(rf"{name}=(\S+)", text) for name in ("RunTime", "TimeLimit"))
    timed_out = (
        used
        and limit
        and limit.group(1) != "UNLIMITED"
        and _seconds(used.group(1)) >= _seconds(limit.group(1))
    )
    return not timed_out


def _seconds(text: str) -> int:
    """Seconds of D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def preempted(job: str) -> bool:
    """Whether the scheduler is giving the job's nodes to another job."""
    time_of_preemption = re.search(r"PreemptTime=(\S+)", controller_output("job", job))
    return bool(time_of_preemption and time_of_preemption.group(1) not in ("None", "N/A"))


def lost_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """Those nodes that are down or do not answer, with their states."""
    lost = {}
    for node in nodes:
        state = re.search(r"State=(\S+)", controller_output("node", node))
        # A `*` stands for a node that does not answer.
        if state and re.search(r"DOWN|FAIL|\*", state.group(1)):
            lost[node] = state.group(1)
    return lost


def controller_output(*arguments: str) -> str:
    """Output of `scontrol show`. It is empty if the controller is unreachable: that must not end a
    job.
    """
    with contextlib.suppress(ResourceError):
        return scheduler.call("scontrol", "show", *arguments)
    return ""
