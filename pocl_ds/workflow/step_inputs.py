"""The fields and files of a recipe that the result of each step depends on.

A step's fingerprint is a digest of these plain values and of the fingerprints of the steps that it
depends on. A value that is missing here lets an outdated result pass for a current one; a value too
many makes a finished step run again. Imports are inside the functions, so that the command line can
read the table of steps without loading pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pocl_ds.config import ModelSource, Recipe


def preprocess_inputs(recipe: Recipe) -> list[Any]:
    """The data, the template, and the tokenizers that encode it."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    # The tokens that end the teacher's turns end the student's too.
    teacher = recipe.local_teacher
    return [
        semantic_fields(recipe.data),
        semantic_fields(recipe.prompt),
        list(input_digests.data_files(recipe).values()),
        list(input_digests.template_file(recipe).values()),
        _tokenizer_inputs(recipe.student),
        _tokenizer_inputs(teacher) if teacher else None,
        recipe.teacher_template if recipe.teacher_has_own_prompts else None,
        _decontamination_inputs(recipe),
    ]


def _decontamination_inputs(recipe: Recipe) -> list[Any] | None:
    """The benchmarks, where training does without their near-duplicates."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    if recipe.data.decontaminate != "train":
        return None
    sources = {name: semantic_fields(b) for name, b in recipe.evaluate.benchmarks.items()}
    return [sources, list(input_digests.benchmark_files(recipe).values())]


def _tokenizer_inputs(source: ModelSource) -> list[Any]:
    """Name and revision of a model, and its files without the weights."""
    from pocl_ds.workflow import input_digests

    return [source.model, source.revision, _named(input_digests.tokenizer_files(source))]


def _named(digests: Mapping[str, list[Any]]) -> list[Any]:
    """Names of files with their digests; their folder may move."""
    return [[path.rpartition("/")[2], *digest] for path, digest in digests.items()]


def init_student_inputs(recipe: Recipe) -> list[Any]:
    """Both models, and the training that heals a pruned student."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    healing = None
    if recipe.student.heal_steps:
        healing = [
            semantic_fields(recipe.train),
            semantic_fields(recipe.loss) if recipe.cross_tokenizer else None,
            recipe.seed,
        ]
    return [
        semantic_fields(recipe.student),
        _named(input_digests.model_files(recipe.student)),
        teacher_inputs(recipe),
        healing,
    ]


def cache_teacher_inputs(recipe: Recipe) -> list[Any]:
    """The teachers, the backend that they run in, how records are made of their logits, and which
    samples each one has. With teachers by stage that follows from the plan, which is a dependency,
    and from the baseline.
    """
    teacher = recipe.teacher
    stages = None
    if teacher and teacher.by_stage:
        stages = [recipe.curriculum.num_subsets, planned_stages(recipe), recipe.baseline.enabled]
    return [teacher_inputs(recipe), recipe.teacher_cache.backend, record_inputs(recipe), stages]


def cached_model_inputs(recipe: Recipe) -> dict[str, list[Any]]:
    """What the outputs of each teacher depend on besides the data, by the field of its model: a
    change of one teacher leaves the outputs of the others as they are.
    """
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    teacher = recipe.teacher
    assert teacher is not None
    return {
        name: [
            semantic_fields(teacher.of_source(source)),
            _named(input_digests.model_files(source)),
            recipe.teacher_cache.backend,
            record_inputs(recipe),
        ]
        for name, source in teacher.named_sources.items()
    }


def planned_stages(recipe: Recipe) -> int:
    """How many stages have the samples of the plan, until the student ranks them again."""
    rescoring = recipe.curriculum.rescoring
    return rescoring.from_stage - 1 if rescoring else recipe.curriculum.num_subsets


def cache_teacher_dependencies(recipe: Recipe) -> tuple[str, ...]:
    """The plan, if it decides which teacher has which samples."""
    by_stage = caches_teacher(recipe) and recipe.teacher and recipe.teacher.by_stage
    return ("plan",) if by_stage and planned_stages(recipe) else ()


def generate_teacher_inputs(recipe: Recipe) -> list[Any]:
    """The teacher, the policy, and the seed and backend of its sampling."""
    from pocl_ds.config import semantic_fields

    return [
        teacher_inputs(recipe),
        semantic_fields(recipe.policy),
        recipe.seed,
        recipe.score.generation.backend,
    ]


def score_inputs(recipe: Recipe) -> list[Any]:
    """Section `score`, and the scorers of the user's plugins."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    return [semantic_fields(recipe.score), _named(input_digests.plugin_files(recipe))]


def rank_inputs(recipe: Recipe) -> list[Any]:
    """Section `ranking`, the seed, the rankings of the user's plugins, and the file of scores."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    return [
        {**semantic_fields(recipe.ranking), "scores": None},
        recipe.seed,
        _named(input_digests.plugin_files(recipe)),
        [digest for _, *digest in _named(input_digests.score_file(recipe))],
    ]


def plan_inputs(recipe: Recipe) -> list[Any]:
    """Section `curriculum`, and the batch size that stages are rounded to."""
    from pocl_ds.config import semantic_fields

    return [semantic_fields(recipe.curriculum), recipe.train.batch_size]


def train_inputs(recipe: Recipe) -> list[Any]:
    """Everything that changes a training, besides its plan, its data and its models."""
    from pocl_ds.config import ds_config, semantic_fields
    from pocl_ds.workflow import input_digests

    ds_configs = [recipe.student.ds_config, recipe.teacher.ds_config if recipe.teacher else None]
    return [
        semantic_fields(recipe.train),
        semantic_fields(recipe.loss),
        semantic_fields(recipe.policy),
        recipe.seed,
        record_inputs(recipe),
        _named(input_digests.plugin_files(recipe)),
        [ds_config.numeric_settings(name) for name in ds_configs],
    ]


def baseline_inputs(recipe: Recipe) -> list[Any]:
    """The inputs of a training, and section `baseline`."""
    from pocl_ds.config import semantic_fields

    return [train_inputs(recipe), semantic_fields(recipe.baseline)]


def evaluate_inputs(recipe: Recipe) -> list[Any]:
    """Section `evaluate`, the models that it names, the files of its benchmarks, and the tokenizer
    of ROUGE-L.
    """
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    return [
        semantic_fields(recipe.evaluate),
        recipe.score.rouge_tokenizer,
        evaluated_models(recipe),
        list(input_digests.benchmark_files(recipe).values()),
        list(input_digests.judge_template_file(recipe).values()),
        input_digests.harness_file_digests(recipe.evaluate.harness),
    ]


def export_inputs(recipe: Recipe) -> Any:
    """Section `export`."""
    from pocl_ds.config import semantic_fields

    return semantic_fields(recipe.export)


def report_inputs(recipe: Recipe) -> Any:
    """Section `report`."""
    from pocl_ds.config import semantic_fields

    return semantic_fields(recipe.report)


def teacher_inputs(recipe: Recipe) -> list[Any] | None:
    """The teacher, and the contents of the folders that it and its other models are read from."""
    from pocl_ds.config import semantic_fields
    from pocl_ds.workflow import input_digests

    teacher = recipe.teacher
    if teacher is None:
        return None
    sources = () if teacher.is_text_only else teacher.sources
    return [semantic_fields(teacher), [_named(input_digests.model_files(m)) for m in sources]]


def record_inputs(recipe: Recipe) -> list[Any] | None:
    """What decides the outputs of a teacher that is not cached exactly; every other one gives the
    same losses as an online teacher.
    """
    mode, cache = recipe.teacher.mode if recipe.teacher else None, recipe.teacher_cache
    choices: dict[str, list[Any]] = {
        "cached_topk": [cache.top_k, cache.top_p],
        "cached_sampled": [cache.num_samples, recipe.seed],
    }
    if mode in choices:
        # Another backend rounds differently, so that it may draw or keep other ids.
        return [mode, *choices[mode], teacher_temperatures(recipe), cache.backend]
    if mode in ("cached_hidden_states", "auto") and cache.hidden_dtype != "model":
        return [mode, cache.hidden_dtype]
    return None


def teacher_temperatures(recipe: Recipe) -> tuple[float, ...]:
    """Every temperature at which a training needs the teacher; validation uses 1."""
    from pocl_ds.curriculum.schedules import stage_values

    stages = stage_values(recipe.curriculum.num_subsets, recipe.curriculum.temperature)
    baseline = [recipe.baseline.temperature] if recipe.baseline.enabled else []
    return tuple(dict.fromkeys([1.0, *stages, *baseline]))


def caches_teacher(recipe: Recipe) -> bool:
    """Whether the recipe runs the step `cache-teacher`. With teachers by stage or by domain
    teacher.mode=auto is online.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.mode == "online":
        return False
    return not (teacher.mode == "auto" and teacher.routes_field)


def evaluated_models(recipe: Recipe) -> list[str]:
    """The models of evaluate.models that exist in this recipe, and the baseline where one is
    trained.
    """
    names = [name for name in recipe.evaluate.models if name != "teacher" or recipe.local_teacher]
    if recipe.baseline.enabled and "baseline" not in names:
        names.append("baseline")
    return [name for name in names if name != "baseline" or recipe.baseline.enabled]


def engine_groups(recipe: Recipe) -> list[list[str]]:
    """The evaluated models that share an engine of vLLM: the students differ in weights alone."""
    models = evaluated_models(recipe)
    students = [name for name in models if name != "teacher"]
    return [group for group in (students, [n for n in models if n == "teacher"]) if group]


def engine_needs_own_process(recipe: Recipe) -> bool:
    """Whether answers are generated in their own processes: a process has one engine of vLLM,
    and several engines run side by side.
    """
    evaluate = recipe.evaluate
    return evaluate.generation.backend == "vllm" or evaluate.data_parallel_size > 1
