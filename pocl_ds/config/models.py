"""Sections `teacher` and `student`: which models, and how they run in training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pocl_ds.config.base import (
    DTYPE_AUTO,
    RUNTIME_ONLY,
    Dtype,
    Float,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    split_names,
)
from pocl_ds.config.endpoint import TeacherEndpointConfig
from pocl_ds.config.registry import ALL_LINEAR

TeacherMode = Literal["online", "cached_hidden_states", "cached_topk", "cached_sampled", "auto"]


class ModelSource(Section):
    """Where a model comes from."""

    model: str = Field(
        description="Name on the Hugging Face Hub, model folder, .gguf file, folder with a LoRA "
        "adapter alone (it is merged once with its base model), or `package://PACKAGE/NAME` for "
        "one of these inside an installed Python package."
    )
    revision: str | None = Field(
        None, description="Revision on the Hub: a branch, tag or commit; `null` for the default."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that is shipped with the model."
    )

    @property
    def label(self) -> str:
        """The model and its revision, for logs and metrics."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


class ModelConfig(ModelSource):
    """A model, and how it runs in training."""

    dtype: Dtype = Field("auto", description=f"Data type of the forward pass. {DTYPE_AUTO}")
    attn_implementation: Literal["per_sample", "sdpa", "eager"] = Field(
        "per_sample",
        description="Attention in training: `per_sample` needs no mask, as fused kernels compute "
        "the samples of a micro-batch separately; `sdpa` and `eager` are the model's own, with "
        "masks.",
    )


class EnsembleTeacherConfig(ModelSource):
    """A further teacher, with the dtype, attention and ds_config of the first."""

    weight: PositiveFloat = Field(
        1.0,
        description="Weight of this teacher in the mixture, relative to the other teachers.",
    )


def _check_stage_numbers(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    stages = [str(stage).strip().lstrip("0") for stage in value]
    for stage in stages:
        if stages.count(stage) > 1:
            raise ValueError(f"stage {stage} appears twice: name one teacher for it")
    return value


class TeacherConfig(ModelConfig):
    """The model that is distilled."""

    mode: TeacherMode = Field(
        "online",
        description="`online` runs the teacher in every optimizer step. `cached_hidden_states` "
        "runs it once and caches its last hidden states, which gives the same losses. "
        "`cached_topk` caches the `teacher_cache.top_k` largest probabilities. `cached_sampled` "
        "caches `teacher_cache.num_samples` ids drawn from the teacher's distribution, for an "
        "unbiased estimate of `loss.name: fkl`. `auto` chooses the cheaper of the first two, and "
        "`online` with `by_stage` or `by_domain`.",
        json_schema_extra=RUNTIME_ONLY,
    )
    weight: PositiveFloat = Field(
        1.0,
        description="With `ensemble`: weight of this teacher in the mixture, relative to the "
        "others.",
    )
    ensemble: tuple[EnsembleTeacherConfig, ...] = Field(
        (),
        description="Further teachers with the same vocabulary. The student learns from the "
        "weighted mean of all teachers' distributions.",
    )
    by_stage: Annotated[dict[Positive, ModelSource], BeforeValidator(_check_stage_numbers)] = Field(
        default_factory=dict,
        description="Other teachers for stages of the curriculum, by the stage's number from 1, "
        "as in `{3: {model: org/larger}}` (staged teachers, arXiv 2605.11260). Only the teacher "
        "of the current stage is in memory. Stages that are not named use `model`, and so do "
        "healing and the baseline. A cache has for each teacher the samples of its stages.",
    )
    by_domain: dict[Annotated[str, Field(min_length=1)], ModelSource] = Field(
        default_factory=dict,
        description="Other teachers for domains of the samples, by the domain's name, as in "
        "`{math: {model: org/math}}`. A sample's domain is its field `data.fields.domain`, or "
        "the name of its source in `data.sources`. All these teachers are in memory if they are "
        "online. A cache has each sample once, from the teacher of its domain. Domains that "
        "are not named use `model`.",
    )
    template: Literal["student", "own"] | None = Field(
        None,
        description="Whose chat template and BOS the teacher's prompts have: `student`, so that "
        "both models read the same text, or its `own`, as the teacher was trained. `null` is "
        "`student` where the models share a vocabulary, and `own` where they do not.",
    )
    quantization: Literal["none", "bnb_8bit", "bnb_4bit"] = Field(
        "none",
        description="Quantize the teacher's linear layers except its output head with "
        "bitsandbytes, in training and in `cache-teacher`. Evaluation uses the unquantized model. "
        "A model that is stored quantized (GPTQ, AWQ) needs `none`.",
    )
    endpoint: TeacherEndpointConfig | None = Field(
        None,
        description="Servers that run the teacher in place of this job: for `mode: cached_topk` "
        "with a temperature of 1, and for responses (`policy.name: seqkd`).",
    )
    ds_config: str | None = Field(
        "teacher_zero3",
        description="DeepSpeed configuration: a name in ds_configs/ or a JSON file. `null` loads "
        "the complete teacher on every rank.",
        json_schema_extra=RUNTIME_ONLY,
    )

    placement: Literal["with_student", "own_ranks"] = Field(
        "with_student",
        description="Where an online teacher runs in training: `with_student`, on the student's "
        "ranks, or `own_ranks`, on `ranks` separate processes and GPUs, at the same time as the "
        "student. The losses are the same.",
        json_schema_extra=RUNTIME_ONLY,
    )
    ranks: Positive = Field(
        1,
        description="With `placement: own_ranks`: number of the teacher's ranks. They are started "
        "in addition to `launch.ranks`, and `ds_config` shards the teacher over them.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @property
    def named_sources(self) -> dict[str, ModelSource]:
        """Every model of this section by its field: `teacher`, then those of the other fields."""
        return {
            "teacher": self,
            **{f"teacher.ensemble.{n}": member for n, member in enumerate(self.ensemble)},
            **{f"teacher.by_stage.{stage}": source for stage, source in self.by_stage.items()},
            **{f"teacher.by_domain.{name}": source for name, source in self.by_domain.items()},
        }

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Every model of this section, the teacher itself first."""
        return tuple(self.named_sources.values())

    @property
    def routes_field(self) -> str | None:
        """The field that gives stages or domains teachers of their own; None without any."""
        if self.by_stage:
            return "teacher.by_stage"
        return "teacher.by_domain" if self.by_domain else None

    @property
    def is_text_only(self) -> bool:
        """Whether texts alone are exchanged with the teacher, so that no step reads its tokenizer
        or its configuration.
        """
        return self.endpoint is not None and self.endpoint.api == "chat"

    @property
    def single_stage(self) -> TeacherConfig:
        """The teacher of a training without the stages of the curriculum."""
        return self.model_copy(update={"by_stage": {}})

    def of_source(self, source: ModelSource) -> TeacherConfig:
        """The section of one of its models alone."""
        own = {name: getattr(source, name) for name in ModelSource.model_fields}
        return self.model_copy(
            update={**own, "weight": 1.0, "ensemble": (), "by_stage": {}, "by_domain": {}}
        )

    @model_validator(mode="after")
    def _check_one_kind_of_teachers(self) -> TeacherConfig:
        used = [name for name in ("ensemble", "by_stage", "by_domain") if getattr(self, name)]
        if len(used) > 1:
            raise ValueError(
                f"{used[0]} and {used[1]} are both set, and each decides alone which teacher a "
                f"token has: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_placement(self) -> TeacherConfig:
        if self.placement == "with_student" and self.ranks != 1:
            raise ValueError(
                f"ranks={self.ranks} counts ranks of the teacher alone, and "
                "placement=with_student gives it none: set teacher.placement=own_ranks, or remove "
                "teacher.ranks"
            )
        if self.placement == "own_ranks" and self.mode != "online":
            raise ValueError(
                f"placement=own_ranks runs the teacher in every step of training, and "
                f"mode={self.mode} caches its outputs before: set teacher.mode=online, or "
                "teacher.placement=with_student"
            )
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> TeacherConfig:
        if self.quantization != "none" and self.ds_config is not None:
            raise ValueError(
                f"ZeRO cannot shard the weights of quantization={self.quantization}, as "
                f"ds_config={self.ds_config} asks for: set teacher.ds_config=null"
            )
        return self


class PruneConfig(Section):
    """Depth pruning: the student is its model without some of its layers."""

    drop_layers: str = Field(
        description="Layers to remove, counted from 0: ranges and numbers, as in `10-19` or "
        "`1,3,5-7`."
    )

    @field_validator("drop_layers")
    @classmethod
    def _check_ranges(cls, value: str) -> str:
        if not re.fullmatch(r"\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*", value):
            raise ValueError("write layer numbers and ranges, as in 10-19 or 1,3,5-7")
        return value


class LoraConfig(Section):
    """Low-rank adapters: only they are trained. The final student has them merged, and
    `train/adapter` has them alone, as a folder of peft.
    """

    r: Positive = Field(16, description="Rank of each adapter's two matrices.")
    alpha: Positive = Field(32, description="The output of an adapter is scaled by `alpha / r`.")
    dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout probability on the input of each adapter."
    )
    target_modules: Annotated[
        tuple[str, ...], BeforeValidator(split_names), Field(min_length=1)
    ] = Field(
        (ALL_LINEAR,),
        description="Names of the linear layers that get an adapter, as in `q_proj,v_proj`; "
        f"`{ALL_LINEAR}` for every linear layer except the output head.",
    )

    @field_validator("target_modules")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError(
                "a name is empty or appears twice: write each name once, as in q_proj,v_proj"
            )
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(
                f"{ALL_LINEAR} cannot be combined with other names: write it alone, or only names"
            )
        return value


class StudentConfig(ModelConfig):
    """The model that is trained. DeepSpeed keeps float32 master weights for every `dtype`."""

    ds_config: str = Field(
        "student_zero3",
        description="DeepSpeed configuration: a name in ds_configs/ or a JSON file.",
        json_schema_extra=RUNTIME_ONLY,
    )
    prune: PruneConfig | None = Field(
        None, description="Create the student by removing layers from its model."
    )
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters only; `null` trains all weights."
    )
    heal_steps: NonNegative = Field(
        0,
        description="Optimizer steps of plain distillation before scoring. A pruned student needs "
        "some; 0 for a pre-trained student.",
    )
    dropout: Fraction | None = Field(
        None,
        description="Dropout probability of every dropout layer in training, which also turns "
        "layer dropping (`layerdrop`) off; `null` keeps the model's own values.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only the input of each layer for the backward pass, which computes the "
        "layer again: less memory, more time.",
        json_schema_extra=RUNTIME_ONLY,
    )
    activation_offloading: bool = Field(
        False,
        description="With `activation_checkpointing`, keep the inputs of the layers in the host's "
        "memory in place of the GPU's.",
        json_schema_extra=RUNTIME_ONLY,
    )
