"""Which teacher cache a training reads, and what `pocl cache-teacher --export` and `--import` run,
which move a cache between runs.

Imports of libraries are inside the functions, as in `step_functions`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pocl_ds.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from pocl_ds.config import ModelSource, Recipe, StudentConfig, TeacherConfig
    from pocl_ds.teachers.cache_format import DataIdentity, ModelIdentity
    from pocl_ds.teachers.cache_plan import CacheReference
    from pocl_ds.workflow.run_dir import RunDirectory
    from pocl_ds.workflow.steps import StepRequest

# Files of a model's folder that decide its outputs.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def transfer_cache(
    recipe: Recipe,
    run: RunDirectory,
    student: StudentConfig,
    teacher: TeacherConfig,
    fingerprint: str,
    request: StepRequest,
) -> None:
    """Export the teacher cache of a run, or import one into it.

    student, teacher: at their commits. Raises RecipeError for both at once or for a part of the
    cache, and as `export_cache`, `import_cache` and `import_foreign`.
    """
    from pocl_ds.teachers.cache_export import export_cache
    from pocl_ds.teachers.cache_import import import_cache
    from pocl_ds.teachers.cache_step import plan_cache
    from pocl_ds.teachers.foreign_records import import_foreign, is_foreign
    from pocl_ds.workflow.steps import cached_model_fingerprints
    from pocl_ds.workflow.teacher_usage import teacher_usage

    if request.shard is not None or (request.export_to and request.import_from):
        raise RecipeError(
            "--export and --import move the complete teacher cache: use one of them, without "
            "--shard"
        )
    config = recipe.teacher_cache
    layout = plan_cache(
        run,
        teacher=teacher,
        student=student,
        config=config,
        usage=teacher_usage(recipe, run),
        model_fingerprints=cached_model_fingerprints(recipe),
    )
    data = _data_identity(recipe, run)
    models = {
        cache.model.fields[0]: _model_identity(
            teacher.named_sources[cache.model.fields[0]], cache.model.path, teacher.quantization
        )
        for cache in layout.caches
    }
    if request.export_to:
        export_cache(
            run,
            request.export_to,
            layout,
            fingerprint=fingerprint,
            data=data,
            models=models,
            hidden_dtype=config.hidden_dtype,
        )
    elif request.import_from and is_foreign(request.import_from):
        import_foreign(run, request.import_from, layout, config=config, fingerprint=fingerprint)
    elif request.import_from:
        import_cache(
            run,
            request.import_from,
            layout,
            config=config,
            fingerprint=fingerprint,
            data=data,
            models=models,
        )


def cache_reference(recipe: Recipe) -> CacheReference | None:
    """The teacher cache that a training of the recipe reads; None with an online teacher."""
    from pocl_ds.teachers.cache_plan import CacheReference
    from pocl_ds.workflow.step_inputs import caches_teacher
    from pocl_ds.workflow.steps import fingerprints

    if not caches_teacher(recipe):
        return None
    return CacheReference(fingerprints(recipe)["cache-teacher"], recipe.teacher_cache.local_copy)


def _data_identity(recipe: Recipe, run: RunDirectory) -> DataIdentity:
    """The tokenizer that made the token ids, and the template. Raises ArtifactError if the data are
    missing.
    """
    from pocl_ds.teachers.cache_format import DataIdentity
    from pocl_ds.workflow import input_digests
    from pocl_ds.workflow.manifest import fingerprint, read_manifest

    manifest = read_manifest(run.data)
    if manifest is None:
        raise ArtifactError(f"{run.data} has no finished data: run `pocl preprocess` first")
    prompt = recipe.prompt
    settings = [prompt.chat_template_kwargs, prompt.reasoning, prompt.system_message]
    files = list(input_digests.template_file(recipe).values())
    name = Path(prompt.template).name
    return DataIdentity(
        tokenizer=manifest.info["tokenizers"]["student"],
        template={"name": name, "sha256": fingerprint([name, settings, files])},
    )


def _model_identity(source: ModelSource, path: str, quantization: str) -> ModelIdentity:
    """Which model a teacher is: the contents of a folder, from wherever it was copied, or the
    commit of a model of the Hub, whose weights may not be on this machine.
    """
    from pocl_ds.teachers.cache_format import ModelIdentity
    from pocl_ds.workflow.input_digests import content_digest

    folder = Path(path)
    if not folder.is_dir():
        return ModelIdentity(source.label, {"commit": [path, source.revision]}, quantization)
    paths = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    digests = {path.name: content_digest(path) for path in paths}
    return ModelIdentity(source.label, digests, quantization)
