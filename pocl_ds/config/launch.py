"""Section `launch`: the processes of one machine."""

from __future__ import annotations

from pydantic import Field

from pocl_ds.config.base import RUNTIME_ONLY, Positive, Section


class LaunchConfig(Section):
    """How many processes are started on one machine. On SLURM the profile decides."""

    ranks: Positive = Field(
        1,
        description="Number of ranks (processes): one per GPU, or several on one CPU. With "
        "`teacher.placement: own_ranks` these are the student's, and `teacher.ranks` come on top.",
        json_schema_extra=RUNTIME_ONLY,
    )
    threads_per_rank: Positive | None = Field(
        None,
        description="CPU threads per rank; `null` divides the cores by the number of ranks.",
        json_schema_extra=RUNTIME_ONLY,
    )
