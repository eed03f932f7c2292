"""Section `policy`: which responses training uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import (
    MAX_NEW_TOKENS_DESCRIPTION,
    RUNTIME_ONLY,
    TOP_P_DESCRIPTION,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    TopP,
    registered_name,
)
from pocl_ds.config.registry import POLICIES


class SharesConfig(Section):
    """With `policy.name: mixture`: probability with which an optimizer step uses each source of
    responses. They sum to 1.
    """

    data: Fraction = Field(1.0, description="Probability of the references of the data.")
    student: Fraction = Field(
        0.0, description="Probability of responses that the student generates during training."
    )
    teacher: Fraction = Field(
        0.0, description="Probability of responses that the teacher generated before training."
    )

    @model_validator(mode="after")
    def _check_sum(self) -> SharesConfig:
        if abs(self.data + self.student + self.teacher - 1) > 1e-6:
            raise ValueError(
                f"data={self.data:g}, student={self.student:g} and teacher={self.teacher:g} must "
                "sum to 1"
            )
        return self


class PolicyConfig(Section):
    """Which responses training uses: the data's, the student's or the teacher's (docs/method.md,
    eq. 24 and 25).
    """

    name: Annotated[str, registered_name("policy", POLICIES)] = Field(
        "off",
        description="`off`: the references of the data. `gkd`, `distillm`: also responses that the "
        "student generates during training. `seqkd`: responses that the teacher generates once "
        "before training. `mixture`: each source with its probability in `shares`. Plugins can "
        "register more.",
    )
    shares: SharesConfig = SharesConfig()
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of a policy that a plugin registers."
    )
    lmbda: Fraction = Field(
        0.5,
        description="gkd: probability that an optimizer step trains on responses of the student.",
    )
    phi_step: Fraction = Field(
        0.1,
        description="distillm: increase of the probability of student responses each time the "
        "validation loss has risen.",
    )
    loss_tolerance: NonNegativeFloat = Field(
        0.1,
        description="distillm: smallest rise of the validation loss that counts, in nats per "
        "token.",
    )
    replay_buffer_size: Positive = Field(
        1000, description="distillm: number of student responses kept for reuse."
    )
    rollout_backend: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="Engine that generates the student's responses: `vllm` in one process "
        "per rank, or `transformers` inside the rank.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="Sampling temperature of the student's responses."
    )
    top_p: TopP = Field(1.0, description=TOP_P_DESCRIPTION)
    max_new_tokens: Positive = Field(256, description=MAX_NEW_TOKENS_DESCRIPTION)
    sync_weights_every: Positive = Field(
        1,
        description="Copy the trained weights to the generation engine every so many optimizer "
        "steps.",
    )
    staleness: Literal[0, 1] = Field(
        0,
        description="`0`: the student generates the responses of an optimizer step before that "
        "step. `1`: it generates them one step earlier, and vLLM does so while that step trains.",
    )
    weight_transfer: Literal["auto", "file"] = Field(
        "auto",
        description="How weights reach vLLM. `auto`: on a GPU by CUDA IPC handles, without a copy "
        "in host memory, and on CPUs through a file in shared memory. `file`: always through a "
        "file.",
        json_schema_extra=RUNTIME_ONLY,
    )
    max_num_seqs: Positive = Field(
        64,
        description="Maximum number of sequences that are generated at the same time.",
        json_schema_extra=RUNTIME_ONLY,
    )
    gpu_memory_utilization: Fraction = Field(
        0.3,
        description="Fraction of a GPU's memory that vLLM may use during rollouts.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @property
    def on_policy(self) -> bool:
        """Whether the student generates responses during training."""
        return POLICIES[self.name] and (self.name != "mixture" or self.shares.student > 0)

    @property
    def uses_teacher_responses(self) -> bool:
        """Whether the teacher generates responses before training."""
        return self.name == "seqkd" or (self.name == "mixture" and self.shares.teacher > 0)
