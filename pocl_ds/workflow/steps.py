"""One stage in this process: each function hands it the parts of the recipe that it needs.

A stage's own module is imported when the stage runs: `pocl rank` needs neither vLLM nor DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig, Recipe, StudentConfig, TeacherConfig
from pocl_ds.config.recipe_file import dump_recipe
from pocl_ds.errors import ModelError, PoclError, RecipeError
from pocl_ds.workflow.pipeline import (
    check_sizes,
    evaluated_models,
    fingerprints,
    keeps_teacher,
    temperatures,
)
from pocl_ds.workflow.run_dir import RunDirectory, read_manifest, read_models

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class Asked:
    """What a command line says of its stage beside the recipe: which part of the work, and where
    the result goes.
    """

    shard: tuple[int, int] | None = None  # (I, N), from 0: of score, teach and evaluate
    model: str | None = None  # evaluate: only this one's answers
    benchmark: str | None = None  # with `model`: only this benchmark
    seed: int | None = None  # with `model`: only this seed
    out: Path | None = None  # export: in place of the run directory's export/

    @property
    def piece(self) -> int | None:
        """The shard alone, of a stage whose recipe says how many there are."""
        return None if self.shard is None else self.shard[0]


WHOLE = Asked()


def run_here(name: str, recipe: Recipe, run: RunDirectory, asked: Asked = WHOLE) -> None:
    """Run one stage, or the part of it that is asked for, as the only process or as one of its
    ranks.
    """
    if name not in ("preprocess", "evaluate", "export", "report"):
        check_sizes(run, recipe)
    FUNCTIONS[name](recipe, run, fingerprints(recipe)[name], asked)


def _data(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.data.preprocess import prepare_data
    from pocl_ds.models.load import commits_of, load_tokenizer, resolve_model

    commits = commits_of(
        [recipe.student, *([recipe.teacher, *recipe.teacher.ensemble] if recipe.teacher else [])]
    )
    student, teacher = _at_commits(recipe, commits)
    path, theirs = resolve_model(student), None
    tokenizer = load_tokenizer(
        path, trust_remote_code=student.trust_remote_code, revision=student.revision
    )
    if teacher and recipe.one_vocabulary:
        from pocl_ds.models.vocab import DifferentTokenizers, reconcile_all

        try:
            reconcile_all(
                [(one, resolve_model(one)) for one in (teacher, *teacher.ensemble)], student, path
            )
        except DifferentTokenizers:
            if recipe.loss.name != "sft":
                raise
            raise ModelError(
                f"student.heal_steps={recipe.student.heal_steps} is plain distillation, which "
                f"needs the same "
                "tokens, and teacher and student have different tokenizers: set it to 0"
            ) from None
    if teacher and recipe.across_tokenizers:
        theirs = load_tokenizer(
            resolve_model(teacher),
            trust_remote_code=teacher.trust_remote_code,
            revision=teacher.revision,
        )
    prepare_data(run, recipe.data, recipe.prompt, tokenizer, fingerprint, theirs, commits)


def _at_commits(
    recipe: Recipe, commits: Mapping[str, str]
) -> tuple[StudentConfig, TeacherConfig | None]:
    """Student and teachers as the stage `data` found them."""
    from pocl_ds.models.load import at_commit

    teacher = recipe.teacher
    if teacher:
        others = tuple(at_commit(other, commits) for other in teacher.ensemble)
        teacher = at_commit(teacher, commits).model_copy(update={"others": others})
    return at_commit(recipe.student, commits), teacher


def _commits(run: RunDirectory) -> dict[str, str]:
    """What the stage `data` noted of the Hub's models."""
    manifest = read_manifest(run.data)
    return manifest.info["commits"] if manifest else {}


def _prepare(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.training.run_training import prepare

    student, teacher = _at_commits(recipe, _commits(run))
    prepare(
        run,
        student=student,
        teacher=teacher,
        train=recipe.train,
        loss=recipe.loss,
        seed=recipe.seed,
        longest=recipe.prompt.max_length,
        fingerprint=fingerprint,
    )


def _teach(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.curriculum.plan import visits
    from pocl_ds.teachers.cache_writer import teach
    from pocl_ds.teachers.mode_selection import Use

    if recipe.teacher is None or not keeps_teacher(recipe):
        raise RecipeError(
            "recipe field teacher.mode is live: there is nothing to keep of a teacher that is "
            "asked at each step"
        )
    curriculum = recipe.curriculum
    student, teacher = _at_commits(recipe, _commits(run))
    assert teacher is not None
    seen = visits(curriculum.num_subsets, curriculum.epochs_per_stage, curriculum.scheduler) * (
        2 if recipe.baseline.enabled else 1
    )
    teach(
        run,
        teacher=teacher,
        student=student,
        config=recipe.teacher_cache,
        use=Use(seen, temperatures(recipe)),
        fingerprint=fingerprint,
        shard=asked.piece,
    )


def _respond(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.generation.teacher_responses import respond

    if recipe.teacher is None or not recipe.policy.uses_teacher_responses:
        raise RecipeError(
            f"recipe field policy.name is {recipe.policy.name}: the teacher writes for seqkd and "
            f"mixture only"
        )
    student, teacher = _at_commits(recipe, _commits(run))
    assert teacher is not None
    respond(
        run,
        teacher=teacher,
        student=student,
        prompt=recipe.prompt,
        policy=recipe.policy,
        generation=recipe.score.generation,
        seed=recipe.seed,
        fingerprint=fingerprint,
        threads=recipe.launch.threads_per_rank,
    )


def _score(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.difficulty.score import score

    score(
        run,
        recipe.score,
        recipe.prompt,
        model_path=read_models(run)["student"],
        fingerprint=fingerprint,
        shard=asked.piece,
        threads=recipe.launch.threads_per_rank,
        trust_remote_code=recipe.student.trust_remote_code,
    )


def _rank(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.difficulty.rank import rank

    rank(run, recipe.ranking, seed=recipe.seed, fingerprint=fingerprint)


def _plan(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.curriculum.plan_step import make_plan

    make_plan(run, recipe.curriculum, batch_size=recipe.train.batch_size, fingerprint=fingerprint)


def _train(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    _fit(recipe, run, fingerprint, baseline=False)


def _baseline(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    if not recipe.baseline.enabled:
        raise RecipeError(
            "recipe field baseline.enabled is false: nothing would look at a baseline, set it to "
            "true"
        )
    _fit(recipe, run, fingerprint, baseline=True)


def _fit(recipe: Recipe, run: RunDirectory, fingerprint: str, *, baseline: bool) -> None:
    from pocl_ds.training.run_training import train

    train(
        run,
        taught=fingerprints(recipe)["cache-teacher"] if keeps_teacher(recipe) else None,
        student=recipe.student,
        teacher=recipe.teacher,
        loss=recipe.loss,
        train=recipe.train,
        seed=recipe.seed,
        policy=recipe.policy,
        prompt=recipe.prompt,
        compare=recipe.baseline if baseline else None,
        fingerprint=fingerprint,
    )


def _evaluate(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.evaluation.evaluate import RESULTS, answer, held_out, model_path, summarise
    from pocl_ds.evaluation.judge import judge

    names = evaluated_models(recipe)
    trusted = {"initial", "student", "baseline"} if recipe.student.trust_remote_code else set[str]()
    trusted |= {"teacher"} if recipe.teacher and recipe.teacher.trust_remote_code else set()
    if asked.model:
        answer(
            run,
            _part(recipe.evaluate, asked),
            recipe.prompt,
            model=asked.model,
            path=model_path(run, asked.model),
            threads=recipe.launch.threads_per_rank,
            shard=asked.shard or (0, 1),
            trust_remote_code=asked.model in trusted,
        )
        return
    held_out(
        run,
        recipe.evaluate,
        recipe.prompt,
        {name: model_path(run, name) for name in names},
        teacher=recipe.teacher,
        threads=recipe.launch.threads_per_rank,
        trusted=trusted,
    )
    try:
        judge(run, recipe.evaluate, names)
    except PoclError:  # an endpoint is the part that is most often away
        summarise(run, recipe.evaluate.model_copy(update={"judge": None}), names)
        log.info("evaluate: %s has everything but what the judge says", run.evaluation / RESULTS)
        raise
    summarise(run, recipe.evaluate, names, fingerprint=fingerprint)


def _part(config: EvaluateConfig, asked: Asked) -> EvaluateConfig:
    """The evaluation with only the benchmark and the seed that are asked for."""
    part: dict[str, Any] = {}
    if asked.benchmark is not None:
        if asked.benchmark not in config.benchmarks:
            raise RecipeError(
                f"--benchmark {asked.benchmark}: the recipe has {', '.join(config.benchmarks)}"
            )
        part["benchmarks"] = {asked.benchmark: config.benchmarks[asked.benchmark]}
    if asked.seed is not None:
        if asked.seed not in config.seeds:
            raise RecipeError(
                f"--seed {asked.seed}: the recipe has {', '.join(map(str, config.seeds))}"
            )
        part["seeds"] = (asked.seed,)
    return config.model_copy(update=part)


def _export(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.evaluation.export import export

    folder = export(
        run,
        out=asked.out,
        recipe_yaml=dump_recipe(recipe),
        fingerprint=fingerprint,
        trust_remote_code=recipe.student.trust_remote_code,
    )
    print(f"student  {folder}")


def _report(recipe: Recipe, run: RunDirectory, fingerprint: str, asked: Asked) -> None:
    from pocl_ds.report.build import build_report

    build_report(run, recipe.report, recipe_yaml=dump_recipe(recipe), fingerprint=fingerprint)
    print(f"report   {run.report / 'report.html'}")


FUNCTIONS: dict[str, Callable[[Recipe, RunDirectory, str, Asked], None]] = {
    "preprocess": _data,
    "init-student": _prepare,
    "cache-teacher": _teach,
    "generate-teacher": _respond,
    "score": _score,
    "rank": _rank,
    "plan": _plan,
    "train": _train,
    "baseline": _baseline,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}
