"""A run is one recipe: YAML, checked here before anything heavy is imported.

One frozen model a section. Fields marked `operational` say how a run is executed (ranks, shards,
logging), not what it computes: changing them never invalidates finished work. Everything else
enters the fingerprints in `artifacts`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from pocl_ds.config.consistency import check_consistency
from pocl_ds.config.registry import (
    ACROSS_TOKENIZERS,
    ALL_LINEAR,
    BENCHMARKS,
    LOSSES,
    METRICS,
    POLICIES,
    STRATEGIES,
)


def _one_of(what: str, *registries: Collection[str]) -> Any:
    """A check that a name is known when the recipe is read."""

    def check(value: str) -> str:
        known = [name for registry in registries for name in registry]
        if value not in known:
            raise ValueError(
                f"there is no {what} {value!r}: take one of "
                f"{', '.join(known) or '(none is registered)'}"
            )
        return value

    return AfterValidator(check)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Int = Annotated[
    int, BeforeValidator(_no_bool), Field(ge=-(1 << 63), lt=1 << 63)
]  # as wide as those of all that takes them
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Int, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Format: TypeAlias = Literal[
    "auto", "alpaca", "prompt", "messages"
]  # of records, see FORMS in data/samples.py
Fields: TypeAlias = dict[Literal["id", "instruction", "input", "output", "prompt", "messages"], str]
ModelName: TypeAlias = Literal["teacher", "initial", "student", "baseline"]
RUNTIME_ONLY: dict[str, Any] = {"runtime_only": True}


class Section(BaseModel):
    """A part of the recipe: unknown keys fail, values never change."""

    # Defaults are validated too, so that 60 and 60.0 of a recipe that was written and read again
    # are one value.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )


class DocumentationConfig(Section):
    """The default corpus: docstrings of the standard library and of installed packages."""

    packages: tuple[str, ...] = Field(
        ("stdlib", "numpy", "torch"), description="`stdlib` or names of installed packages"
    )
    min_words: Positive = Field(4, description="shortest answer kept")
    max_words: Positive = Field(60, description="longest answer kept")


class DataConfig(Section):
    """Where instruction data comes from and how it is split."""

    source: str = Field(
        "documentation", description="`documentation`, a .jsonl/.json/.parquet file, or a Hub name"
    )
    hub_subset: str | None = Field(None, description="configuration name of a Hub data set")
    hub_split: str = Field("train", description="split of a Hub data set")
    hub_revision: str | None = Field(
        None, description="revision of a Hub data set: a commit stays what it is"
    )
    format: Format = Field("auto", description="form of the records")
    fields: Fields = Field(
        default_factory=dict, description="our field -> the name it has in the file"
    )
    on_invalid: Literal["error", "skip"] = Field(
        "error", description="a record without a text to learn from: an empty answer, say"
    )
    validation: str | None = Field(
        None, description="file with validation samples; else split off by hash"
    )
    test: str | None = Field(None, description="file with test samples; else split off by hash")
    validation_fraction: Fraction = Field(0.05, description="share split off by hash of the prompt")
    test_fraction: Fraction = Field(0.05, description="share split off by hash of the prompt")
    max_train_samples: Positive | None = Field(None, description="at most as many, chosen by hash")
    max_validation_samples: Positive | None = Field(
        None, description="at most as many, chosen by hash"
    )
    max_test_samples: Positive | None = Field(None, description="at most as many, chosen by hash")
    documentation: DocumentationConfig = DocumentationConfig()

    @model_validator(mode="after")
    def _fractions(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction leave nothing to train on: make their sum "
                "less than 1"
            )
        return self


class PromptConfig(Section):
    """How a sample becomes token ids: the same in scoring, training and evaluation."""

    template: str = Field(
        "alpaca", description="`alpaca`, `chat` (the tokenizer's own), `plain`, or a .jinja file"
    )
    chat_template_kwargs: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | str
    ] = Field(
        default_factory=dict,
        description="chat: variables of the template, as in {enable_thinking: false}",
    )
    max_prompt_tokens: Positive = Field(256, description="longer prompts keep their first tokens")
    max_length: Positive = Field(512, description="prompt and response together")
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="what to do with longer samples; an evaluation cuts and counts prompts, or "
        "stops with error",
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> PromptConfig:
        if self.chat_template_kwargs and self.template != "chat":
            raise ValueError(
                f"chat_template_kwargs are for template=chat, and this is {self.template}: remove them"
            )
        if self.max_prompt_tokens >= self.max_length:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response in "
                f"max_length={self.max_length}: make it smaller"
            )
        return self


class ModelSource(Section):
    """Where a model comes from."""

    model: str = Field(description="Hub name, folder, .gguf file, or package://PACKAGE/FILE.gguf")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class ModelConfig(ModelSource):
    """A model, and how it runs in training."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="weights of the forward pass"
    )
    attn_implementation: Literal["per_sample", "sdpa", "eager"] = Field(
        "per_sample",
        description="in training: torch's kernels without masks, or the model's own masks with "
        "sdpa or eager",
    )


Weight = Annotated[Float, Field(gt=0)]


class EnsembleTeacherConfig(ModelSource):
    """One more model that is distilled at the same time, with the dtype, attention and ds_config of
    the first.
    """

    weight: Weight = Field(1.0, description="its share of the mixture, relative to the others")


class TeacherConfig(ModelConfig):
    """The model that is distilled."""

    mode: Literal["online", "cached_hidden_states", "cached_topk", "auto"] = Field(
        "online",
        description="asked at each step; or once, keeping its hidden states: the same losses; or "
        "keeping its teach.k "
        "largest probabilities; auto: live or hidden, whichever is cheaper",
        json_schema_extra=RUNTIME_ONLY,
    )
    weight: Weight = Field(
        1.0, description="with teacher.others: its share of the mixture, relative to theirs"
    )
    ensemble: tuple[EnsembleTeacherConfig, ...] = Field(
        (),
        description="more teachers with the same tokens: the student learns from the weighted "
        "mean of all distributions",
    )
    quantization: Literal["none", "bnb_8bit", "bnb_4bit"] = Field(
        "none",
        description="of its linear modules but the head, by bitsandbytes, in train and teach; "
        "evaluation takes its "
        "model as it is. One that comes quantised (GPTQ, AWQ) loads as it is, with none",
    )
    ds_config: str | None = Field(
        "teacher_zero3",
        description="name in ds_configs/ or a JSON file; null: whole on each rank",
        json_schema_extra=RUNTIME_ONLY,
    )

    @model_validator(mode="after")
    def _whole(self) -> TeacherConfig:
        if self.quantization != "none" and self.ds_config is not None:
            raise ValueError(
                f"quantization={self.quantization} gives weights that ZeRO cannot shard, as "
                f"ds_config="
                f"{self.ds_config} asks for: set teacher.ds_config=null"
            )
        return self


class TeacherCacheConfig(Section):
    """What is kept of the teacher, where teacher.mode is not `live`."""

    top_k: Positive = Field(
        64, description="largest probabilities kept of each token, where teacher.mode is topk"
    )
    max_disk_gb: Annotated[Float, Field(gt=0)] | None = Field(
        None,
        description="most that may be kept; null: what the disk has",
        json_schema_extra=RUNTIME_ONLY,
    )
    shards: Positive = Field(
        1, description="pieces that finish and restart on their own", json_schema_extra=RUNTIME_ONLY
    )
    max_batch_tokens: Positive = Field(
        8192, description="tokens of one forward on one rank", json_schema_extra=RUNTIME_ONLY
    )


class PruneConfig(Section):
    """Depth pruning: the initial student is a model without some of its layers."""

    drop_layers: str = Field(description="layers to leave out, from 0: `10-19` or `1,3,5-7`")

    @field_validator("drop_layers")
    @classmethod
    def _ranges(cls, value: str) -> str:
        if not re.fullmatch(r"\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*", value):
            raise ValueError("write layer numbers and ranges, as in 10-19 or 1,3,5-7")
        return value


def _names(value: Any) -> Any:
    """`a,b` as the list that it is."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class LoraConfig(Section):
    """Low-rank adapters are trained and the model's own weights are not; what is written has them
    merged.
    """

    r: Positive = Field(16, description="of each adapter's two matrices")
    alpha: Positive = Field(32, description="an adapter's product is scaled by alpha / rank")
    dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="of what an adapter reads"
    )
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)] = (
        Field(
            (ALL_LINEAR,),
            description="names of linear modules, as in q_proj,v_proj; or all-linear: each but the head",
        )
    )

    @field_validator("target_modules")
    @classmethod
    def _clear(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError(
                "a name is empty or stands there twice: write each once, as in q_proj,v_proj"
            )
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(
                f"{ALL_LINEAR} stands beside other names: write it alone, or only names"
            )
        return value


class StudentConfig(ModelConfig):
    """The model that learns. `dtype` is that of its forward pass; DeepSpeed keeps float32 master
    weights.
    """

    ds_config: str = Field(
        "student_zero3",
        description="name in ds_configs/ or a JSON file",
        json_schema_extra=RUNTIME_ONLY,
    )
    prune: PruneConfig | None = Field(
        None, description="make the student from its model by leaving layers out"
    )
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters alone; null: all weights"
    )
    heal_steps: NonNegative = Field(
        0, description="plain KD steps before scoring; 0 for pre-trained students"
    )
    dropout: Fraction | None = Field(
        None, description="set every dropout of the model; null keeps the model's own"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in backward")


class GenerationConfig(Section):
    """The engine that writes text."""

    backend: Literal["vllm", "transformers"] = Field(
        "vllm", description="transformers is the numerical reference"
    )
    max_num_seqs: Positive = Field(
        64, description="sequences in flight at once", json_schema_extra=RUNTIME_ONLY
    )
    max_num_batched_tokens: Positive = Field(
        8192, description="tokens of one engine step", json_schema_extra=RUNTIME_ONLY
    )
    gpu_memory_utilization: Fraction = Field(
        0.85, description="of a GPU's memory, for vLLM", json_schema_extra=RUNTIME_ONLY
    )
    tensor_parallel_size: Positive = Field(
        1, description="GPUs that share one engine", json_schema_extra=RUNTIME_ONLY
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="compute type of generation"
    )


class ScoreConfig(Section):
    """Difficulty of each training sample under the initial student (METHOD 1)."""

    generation: GenerationConfig = GenerationConfig()
    temperature: Annotated[Float, Field(ge=0)] = Field(
        0.0, description="0 is greedy; the release samples at 0.01"
    )
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    count_eos: bool = Field(
        True, description="cross-entropy counts the EOS; false for parity with the release"
    )
    metrics: tuple[Annotated[str, _one_of("metric", METRICS)], ...] = Field(
        (), description="scored too"
    )
    shards: Positive = Field(
        1, description="pieces that finish and restart on their own", json_schema_extra=RUNTIME_ONLY
    )


class RankingConfig(Section):
    """From scores to an order, easiest first (METHOD 1.4)."""

    strategy: Annotated[str, _one_of("ranking strategy", STRATEGIES, METRICS)] = Field(
        "fusion", description=" ".join(STRATEGIES) + ", or a metric of score.metrics"
    )
    reverse: bool = Field(False, description="hard to easy")
    k: Annotated[Float, Field(gt=0)] = Field(60, description="constant of reciprocal rank fusion")


def _epochs(value: Any) -> Any:
    """One number for all stages, or one for each."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(type(number) is int and 1 <= number < 1 << 31 for number in numbers):
        raise ValueError(
            "write one number of epochs, at least 1, or one for each stage, as in 8 or [10, 8, 6, "
            "6]"
        )
    return tuple(value) if isinstance(value, list) else value


class CurriculumConfig(Section):
    """Subsets and stages (METHOD 2)."""

    num_subsets: Positive = 4
    epochs_per_stage: Annotated[int | tuple[int, ...], BeforeValidator(_epochs)] = Field(
        8, description="one number, or one for each stage"
    )
    scheduler: Literal["baby_step", "one_pass"] = Field(
        "baby_step", description="cumulative, or each subset alone"
    )
    temperature: tuple[Float, Float] = Field(
        (1.0, 2.0), description="temperature of the first and of the last stage"
    )
    sft_ratio: tuple[Fraction, Fraction] = Field(
        (0.3, 0.0), description="share of SFT in the first and the last stage"
    )
    drop_last: bool = Field(
        True,
        description="drop the last, smaller batch of an epoch; false: fill it from its beginning",
    )

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0:
            raise ValueError("a temperature must be greater than 0, as in [1.0, 2.0]")
        return value

    @model_validator(mode="after")
    def _epochs_of_each(self) -> CurriculumConfig:
        if (
            isinstance(self.epochs_per_stage, tuple)
            and len(self.epochs_per_stage) != self.num_subsets
        ):
            raise ValueError(
                f"epochs_per_stage names {len(self.epochs_per_stage)} stages and "
                f"num_subsets={self.num_subsets}: write one "
                "number for each stage, or one for all"
            )
        return self


class LossConfig(Section):
    """The divergence between teacher and student (METHOD 3)."""

    name: str = Field("fkl", description=" ".join(LOSSES))
    scale_by_temperature_squared: bool = Field(True, description="multiply the KD term by tau^2")
    options: dict[str, float | bool] = Field(
        default_factory=dict, description="options of the divergence"
    )
    fused: bool = Field(
        True,
        description="logits at loss positions only, a chunk at a time, and no gradient graph of "
        "them; false: all logits by "
        "the models' own forward, for families whose head is not known",
        json_schema_extra=RUNTIME_ONLY,
    )
    chunk_memory_mb: Annotated[Float, Field(ge=0.0625)] = Field(
        512, description="memory for one chunk of logits, in MiB", json_schema_extra=RUNTIME_ONLY
    )

    @property
    def chunk_bytes(self) -> int:
        """Memory for one chunk of logits, in bytes."""
        return int(self.chunk_memory_mb * (1 << 20))

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        if self.name not in LOSSES:
            raise ValueError(f"there is no loss {self.name!r}: take one of {', '.join(LOSSES)}")
        for option in self.options:
            if option not in LOSSES[self.name]:
                known = ", ".join(LOSSES[self.name]) or "no options"
                raise ValueError(f"{self.name} has no option {option!r}: it has {known}")
        return self


class CheckpointConfig(Section):
    """When training saves, and what it keeps."""

    every_n_steps: Positive = Field(
        100, description="steps between checkpoints", json_schema_extra=RUNTIME_ONLY
    )
    keep_last: Positive = Field(
        2, description="newest checkpoints kept", json_schema_extra=RUNTIME_ONLY
    )
    keep_every_n_steps: Positive | None = Field(
        None,
        description="also keep those whose step is a multiple of this",
        json_schema_extra=RUNTIME_ONLY,
    )
    keep_best: bool = Field(
        False,
        description="also save at the end of each stage, and keep the one with the lowest "
        "validation loss",
        json_schema_extra=RUNTIME_ONLY,
    )
    async_save: bool = Field(
        False,
        description="write from a copy in memory while training goes on: 12 bytes a parameter, "
        "over the ranks",
        json_schema_extra=RUNTIME_ONLY,
    )


class TrackingConfig(Section):
    """Where training metrics go; metrics.jsonl is always written."""

    tensorboard: bool = Field(True, json_schema_extra=RUNTIME_ONLY)
    wandb: bool = Field(
        False, description="log to Weights & Biases too", json_schema_extra=RUNTIME_ONLY
    )
    wandb_project: str = Field("pocl_ds", json_schema_extra=RUNTIME_ONLY)


class TrainConfig(Section):
    """Optimisation (METHOD 2)."""

    engine: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="torch is the numerical reference"
    )
    batch_size: Positive = Field(64, description="samples of one optimizer step, over all ranks")
    micro_batch_size: Positive = Field(
        8, description="samples of one forward on one rank", json_schema_extra=RUNTIME_ONLY
    )
    micro_batch_tokens: Positive | None = Field(
        None,
        description="most tokens of one forward on one rank, in place of micro_batch_size",
        json_schema_extra=RUNTIME_ONLY,
    )
    length_window: Positive = Field(
        1,
        description="neighbouring batches of an epoch's shuffle that exchange samples until "
        "lengths are alike; 1 for none",
    )
    layout: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="samples of a micro-batch padded to the longest, or behind one another in one "
        "row; auto: the cheaper",
        json_schema_extra=RUNTIME_ONLY,
    )
    lr: Annotated[Float, Field(gt=0)] = 1e-4
    min_lr: Annotated[Float, Field(ge=0)] = 1e-7
    warmup_steps: NonNegative = 0
    lr_restart: Literal["per_stage", "never"] = Field(
        "per_stage", description="optimizer and cosine restart at each stage, or carry over"
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(
        0.01, description="none on biases and norms"
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[Float, Field(gt=0)] = Field(1.0, description="largest gradient norm")
    max_non_finite_steps: NonNegative = Field(
        0,
        description="steps whose loss or gradient is not finite that may be left out before the "
        "run stops",
    )
    validate_max_samples: NonNegative = Field(
        64, description="validation samples to look at after a stage, chosen by hash; 0: none"
    )
    validate_every_n_steps: Positive | None = Field(
        None,
        description="steps after which validation is looked at too; distillm needs it, and looks "
        "before the first too",
    )
    hang_timeout_seconds: Annotated[Float, Field(gt=0)] = Field(
        1800,
        description="a rank silent for so long writes its stacks and ends the run",
        json_schema_extra=RUNTIME_ONLY,
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


class SharesConfig(Section):
    """Of a policy that mixes responses: the probability with which a step takes them from each
    source.
    """

    data: Fraction = Field(1.0, description="the data's")
    student: Fraction = Field(0.0, description="what the student writes")
    teacher: Fraction = Field(0.0, description="what the teacher wrote before training")

    @model_validator(mode="after")
    def _whole(self) -> SharesConfig:
        if abs(self.data + self.student + self.teacher - 1) > 1e-6:
            raise ValueError(
                f"data={self.data:g}, student={self.student:g} and teacher={self.teacher:g} must "
                f"sum to 1"
            )
        return self


class PolicyConfig(Section):
    """Which responses training sees: the data's, the student's own, or the teacher's (METHOD 3)."""

    name: Annotated[str, _one_of("policy", POLICIES)] = Field(
        "off",
        description="off: the data's; gkd, distillm: also the student's own; seqkd: the "
        "teacher's, written once; mixture: "
        "from each with its share",
    )
    shares: SharesConfig = SharesConfig()
    options: dict[str, Any] = Field(
        default_factory=dict, description="of a policy that a plugin adds"
    )
    lmbda: Fraction = Field(
        0.5, description="gkd: probability that a step's responses are written by the student"
    )
    phi_step: Fraction = Field(
        0.1, description="distillm: what phi grows by where the validation loss rose"
    )
    loss_tolerance: Annotated[Float, Field(ge=0)] = Field(
        0.1, description="distillm: a rise of the loss that counts"
    )
    replay_buffer_size: Positive = Field(
        1000, description="distillm: responses kept to be trained on again"
    )
    rollout_backend: Literal["vllm", "transformers"] = Field(
        "vllm", description="who writes: vLLM beside each rank, or transformers in it"
    )
    temperature: Annotated[Float, Field(gt=0)] = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    sync_weights_every: Positive = Field(1, description="steps between new weights for the writer")
    max_num_seqs: Positive = Field(
        64, description="sequences in flight at once", json_schema_extra=RUNTIME_ONLY
    )
    gpu_memory_utilization: Fraction = Field(
        0.3, description="of a GPU's memory, for vLLM", json_schema_extra=RUNTIME_ONLY
    )

    @property
    def on_policy(self) -> bool:
        """Whether the student writes while it learns."""
        return POLICIES[self.name] and (self.name != "mixture" or self.shares.student > 0)

    @property
    def uses_teacher_responses(self) -> bool:
        """Whether the teacher writes responses before training."""
        return self.name == "seqkd" or (self.name == "mixture" and self.shares.teacher > 0)


class BaselineConfig(Section):
    """A baseline: plain KD on as many sample visits, at one tau and one SFT ratio."""

    enabled: bool = Field(False, description="train it too", json_schema_extra=RUNTIME_ONLY)
    temperature: Annotated[Float, Field(gt=0)] = 1.0
    sft_ratio: Fraction = 0.3


class BenchmarkConfig(Section):
    """Questions with references, which every model answers."""

    source: str = Field(
        description="`test` for the held-out split, one of "
        + " ".join(BENCHMARKS)
        + ", a file, or a Hub name"
    )
    hub_subset: str | None = Field(None, description="configuration name of a Hub data set")
    hub_split: str = Field("test", description="split of a Hub data set")
    hub_revision: str | None = Field(
        None, description="revision of a Hub data set: a commit stays what it is"
    )
    format: Format = Field("auto", description="form of the records")
    fields: Fields = Field(
        default_factory=dict, description="our field -> the name it has in the file"
    )


class JudgeConfig(Section):
    """A language model that reads answers and says how good they are, behind any OpenAI-compatible
    endpoint.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://[^@?#\s]+$")] = Field(
        description="what stands before /chat/completions, as in http://localhost:8000/v1; "
        "without a password or a query",
        json_schema_extra=RUNTIME_ONLY,
    )
    model: str = Field(description="as the endpoint calls it")
    api_key_env: str | None = Field(
        None,
        description="NAME of the environment variable that holds the key, never the key itself",
        json_schema_extra=RUNTIME_ONLY,
    )
    mode: Literal["score", "pairwise"] = Field(
        "score", description="1 to 10 alone, or against the answer of another model"
    )
    opponent: ModelName = Field(
        "initial", description="pairwise: whose answers stand beside; asked in both orders"
    )
    max_samples: Positive | None = Field(
        100, description="at most as many of each benchmark, chosen by hash; null for all"
    )
    num_seeds: Positive = Field(1, description="so many of evaluate.seeds, the first ones")
    prompt_template: str | None = Field(
        None, description="a .jinja file in place of the judge's instructions"
    )
    temperature: Annotated[Float, Field(ge=0)] | None = Field(
        0.0, description="null for the endpoint's own"
    )
    max_tokens: Positive = Field(
        512, description="of one verdict; one that is longer counts as none"
    )
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="what the endpoint calls that limit",
        json_schema_extra=RUNTIME_ONLY,
    )
    max_concurrency: Positive = Field(
        8, description="questions in flight at once", json_schema_extra=RUNTIME_ONLY
    )
    timeout_seconds: Annotated[Float, Field(gt=0)] = Field(
        120, description="of one question", json_schema_extra=RUNTIME_ONLY
    )
    max_retries: NonNegative = Field(
        5, description="of a question, each after twice the wait", json_schema_extra=RUNTIME_ONLY
    )

    @model_validator(mode="after")
    def _no_key(self) -> JudgeConfig:
        # Not a pattern of the field: the message of one would show what was written there, which
        # may be a key.
        if self.api_key_env is not None and not re.fullmatch(
            r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env
        ):
            raise ValueError(
                "api_key_env is not the name of an environment variable: put the key into a variable, "
                "and write the "
                "variable's name here, as in OPENAI_API_KEY"
            )
        return self


def _sources(value: Any) -> Any:
    """Benchmarks as a list of names (`[dolly, vicuna]`, `dolly,vicuna`), or name -> a source or its
    fields.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        value = {name: name for name in value}
    if not isinstance(value, dict):
        return value
    return {
        name: {"source": entry} if isinstance(entry, str) else entry
        for name, entry in value.items()
    }


class EvaluateConfig(Section):
    """What the student is measured on (METHOD 5)."""

    generation: GenerationConfig = GenerationConfig()
    benchmarks: Annotated[
        dict[str, BenchmarkConfig], BeforeValidator(_sources), Field(min_length=1)
    ] = Field(
        default_factory=lambda: {"test": BenchmarkConfig(source="test")},
        description="names, or name -> source",
    )
    benchmark_dir: str | None = Field(
        None, description="where the files of named benchmarks lie; null: the Hub has them"
    )
    data_parallel_size: Positive = Field(
        1,
        description="engines of one model side by side, each with its own GPU or cores",
        json_schema_extra=RUNTIME_ONLY,
    )
    judge: JudgeConfig | None = Field(
        None, description="a second look, by a language model; null for none"
    )
    models: tuple[ModelName, ...] = ("teacher", "initial", "student")
    seeds: tuple[Int, ...] = Field((10, 20, 30, 40, 50), min_length=1)
    temperature: Annotated[Float, Field(ge=0)] = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    max_samples: Positive | None = Field(None, description="at most as many of each benchmark")
    held_out_loss: bool = Field(
        True, description="also loss and KL to the teacher, on the test split and on references"
    )

    @model_validator(mode="after")
    def _seeds_matter(self) -> EvaluateConfig:
        if self.temperature == 0 and len(self.seeds) > 1:
            raise ValueError(
                "with temperature=0 every seed gives the same text: name one seed, or raise "
                "temperature"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands there twice: name each once")
        return self


class ReportConfig(Section):
    """The page at the end."""

    num_examples: NonNegative = Field(8, description="items with all answers in report.md")
    max_samples: NonNegative = Field(
        10_000, description="training samples to browse in the page, at most"
    )
    max_items: NonNegative = Field(
        1_000, description="evaluated items to browse in the page, at most, of each benchmark"
    )
    max_text_mb: Positive = Field(
        8, description="room in the page for the texts of both; fewer are shown where they are long"
    )


class LaunchConfig(Section):
    """How ranks are started on one machine."""

    ranks: Positive = Field(
        1, description="processes that share the models", json_schema_extra=RUNTIME_ONLY
    )
    threads_per_rank: Positive | None = Field(
        None, description="CPU threads a rank; null: cores / ranks", json_schema_extra=RUNTIME_ONLY
    )


class Recipe(Section):
    """Everything a run is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    plugins: tuple[str, ...] = Field(
        (), description="modules of yours that register methods, see pocl_ds/plugins.py"
    )
    hardware: str = Field("", description="what the recipe expects", json_schema_extra=RUNTIME_ONLY)
    seed: NonNegative = 42
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    teacher: TeacherConfig | None = None
    student: StudentConfig
    teacher_cache: TeacherCacheConfig = TeacherCacheConfig()
    score: ScoreConfig = ScoreConfig()
    ranking: RankingConfig = RankingConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    loss: LossConfig = LossConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    baseline: BaselineConfig = BaselineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.ranking.strategy in METRICS and self.ranking.strategy not in self.score.metrics:
            raise ValueError(
                f"ranking.strategy={self.ranking.strategy} is not scored: name it in score.metrics"
            )
        check_consistency(self)
        return self

    @property
    def across_tokenizers(self) -> bool:
        """Whether the teacher reads texts in its own tokens."""
        return self.loss.name in ACROSS_TOKENIZERS

    @property
    def one_vocabulary(self) -> bool:
        """Whether teacher and student must have their tokens in common."""
        distils = (
            self.loss.name != "sft" or self.student.heal_steps > 0
        )  # healing does, whatever comes after it
        return self.teacher is not None and distils and not self.across_tokenizers


def semantic_fields(section: BaseModel) -> dict[str, Any]:
    """The section without its operational fields: what its results depend on."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("runtime_only"):
            continue
        value = getattr(section, name)
        kept[name] = semantic_fields(value) if isinstance(value, BaseModel) else value
    return kept
