"""Submission of a run as dependent SLURM jobs: freeze what they read in the run directory, render
their scripts, and submit them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.job_graph import JobSpec, nodes_for, pipeline_jobs
from pocl_ds.cluster.job_options import job_limits, sbatch_options
from pocl_ds.cluster.profile import Profile, dump_profile, load_profile
from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe, load_recipe
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.resources import JOB_TEMPLATE, copy_code
from pocl_ds.workflow.files import atomic_directory, atomic_write, read_json, write_json
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.manifest import fingerprint, package_versions
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory, record_recipe
from pocl_ds.workflow.steps import STEP_NAMES, enabled_steps

# Characters that SLURM interprets in the name of an output file.
UNSAFE = re.compile(r'[%"\\\x00-\x1f\x7f-\x9f\u2028\u2029]')


class Submission:
    """A run, its recipe with the ranks of its nodes, a profile, and the unfinished jobs."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        profile: Profile,
        *,
        nodes: int | None,
        start: str = STEP_NAMES[0],
        until: str = STEP_NAMES[-1],
    ) -> None:
        """start, until: the first and last step to submit. Raises ArtifactError if one before
        `start` is not finished.
        """
        if STEP_NAMES.index(until) < STEP_NAMES.index(start):
            raise RecipeError(
                f"--until {until} comes before --from {start}, so no step is left: exchange them"
            )
        self.until = until
        self.path = run.path.expanduser().resolve()
        if unsafe := UNSAFE.search(str(self.path)):
            raise RecipeError(
                f"the run directory {str(self.path)!r} contains {unsafe.group()!r}, which SLURM "
                "interprets in the name of a log: choose another --run-dir"
            )
        self.run, self.profile = RunDirectory(self.path), profile

        # The student gets the ranks that the nodes have besides the teacher's own.
        count, tasks = nodes_for(recipe, profile, nodes)
        self.recipe = recipe
        if count * tasks != recipe.total_ranks:
            if count * tasks <= recipe.teacher_ranks:
                raise RecipeError(
                    f"teacher.ranks={recipe.teacher_ranks} leaves no rank for the student on "
                    f"{count} x {tasks} ranks: lower it, or use more nodes"
                )
            tree = recipe.model_dump(mode="json")
            tree["launch"]["ranks"] = count * tasks - recipe.teacher_ranks
            self.recipe = check_recipe(tree)

        # Steps after `until` count as finished, so that no job runs them.
        finished = dict.fromkeys(STEP_NAMES, False)
        if self.run.recipe.is_file():
            finished = finished_steps(self.run, self.recipe)
        for step in enabled_steps(self.recipe, until=start):
            if step.name != start and not finished[step.name]:
                raise ArtifactError(
                    f"the step {step.name}, which comes before {start}, is not finished in "
                    f"{self.path}: submit without --from {start}"
                )
        finished |= dict.fromkeys(STEP_NAMES[STEP_NAMES.index(until) + 1 :], True)
        self.jobs = pipeline_jobs(self.recipe, profile, finished, nodes=count, tasks=tasks)
        self.folder = self.run.cluster
        self.directory = os.getcwd()  # relative paths of the recipe start here
        if UNSAFE.search(self.directory):
            raise RecipeError(
                f"the working directory {self.directory!r} has a name that SLURM does not accept: "
                "choose another"
            )

    @property
    def runs_here(self) -> bool:
        """Whether jobs use the packages of this machine: without a container."""
        return self.profile.container is None

    def script(self, job: JobSpec) -> str:
        """The text of a job's script."""
        renderer = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        renderer.filters["quoted"] = lambda value: shlex.quote(str(value))
        template = renderer.from_string(JOB_TEMPLATE.read_text(encoding="utf-8"))
        return template.render(
            run=str(self.path),
            job=job,
            options=self._options(job),
            setup=self.profile.setup,
            environment=self.profile.environment | self.profile.network.variables,
            scratch=self.profile.scratch,
            python="python3" if self.profile.container else sys.executable,
            launcher=f"{self.folder}/code/launch/pocl.py",
        )

    def _options(self, job: JobSpec) -> list[str]:
        """The options of a job's #SBATCH lines."""
        # A task of an array has the id of the array, and its own number.
        log = f"{self.path}/logs/{job.name}-{'%A_%a' if job.array else '%j'}.log"
        return sbatch_options(
            self.profile,
            job,
            run_name=self.recipe.name,
            log=log,
            directory=self.directory,
            is_last=job is self.jobs[-1],
        )

    def show(self) -> str:
        """The jobs and their dependencies, one line each."""
        lines = []
        for job in self.jobs:
            size = f"nodes {job.nodes} x tasks {job.tasks_per_node}"
            array = f", array of {len(job.array)}" if job.array else ""
            after = f"  after {', '.join(job.after)}" if job.after else ""
            if self.recipe.teacher_ranks and any(command.ranks for command in job.commands):
                size += f", {self.recipe.teacher_ranks} of them for the teacher"
            steps = ", ".join(" ".join(command.arguments) for command in job.commands)
            lines.append(f"{job.name:<18}{size}{array}  ({steps}){after}")
        return "\n".join(lines) or "every step is finished: nothing to submit"

    def start_times(self) -> dict[str, str]:
        """When the scheduler would start each job that waits for no other one."""
        return {
            job.name: f"after {', '.join(job.after)}"
            if job.after
            else scheduler.start_time(self.script(job))
            for job in self.jobs
        }

    def submit(self) -> dict[str, str]:
        """Freeze the run's inputs and submit its jobs. Returns the job ids by name. If SLURM
        refuses a job, the ones before it are cancelled.
        """
        if busy := scheduler.live_jobs(job_ids(self.run)):
            raise ArtifactError(
                f"{self.path} has jobs that wait or run "
                f"({', '.join(sorted({job.id for job in busy}))}): see `pocl status --run-dir "
                f"{self.path}`, or `pocl cancel` them first"
            )
        with lock_run_directory(self.run):
            record_recipe(self.run, self.recipe, runs_here=self.runs_here)
            self._freeze()
        ids: dict[str, str] = {}
        try:
            for job in self.jobs:
                # Jobs without dependencies are held until all are submitted: a job that moves to
                # other nodes looks up the jobs that wait for it.
                dependencies = ":".join(ids[name] for name in job.after)
                options = [
                    "--kill-on-invalid-dep=yes",
                    f"--dependency=afterok:{dependencies}" if job.after else "--hold",
                ]
                script = self.folder / "jobs" / f"{job.name}.sbatch"
                ids[job.name] = scheduler.submit(str(script), options)
                with atomic_write(script.with_suffix(".ids")) as stream:
                    stream.write(f"{ids[job.name]}\n")
            if "--hold" not in self.profile.options:
                scheduler.release([ids[job.name] for job in self.jobs if not job.after])
        except BaseException:
            scheduler.cancel(list(ids.values()))
            raise
        return ids

    def _freeze(self) -> None:
        """Copy everything that the jobs read: the working tree may change while a job waits."""
        self.run.logs.mkdir(parents=True, exist_ok=True)
        with atomic_directory(self.folder / "code") as folder:
            copy_code(folder)
        with atomic_write(self.folder / "profile.yaml") as stream:
            stream.write(dump_profile(self.profile))
        with atomic_directory(self.folder / "jobs") as folder:
            for job in self.jobs:
                (folder / f"{job.name}.sbatch").write_text(self.script(job))
                write_json(folder / f"{job.name}.json", self._spec(job))

        # Attempts of an earlier submission do not count against this one.
        if (self.folder / "attempts").is_dir():
            past = self.folder / "past"
            past.mkdir(exist_ok=True)
            number = len(list(past.iterdir()))
            for name in ("attempts", "exits"):
                if (self.folder / name).is_dir():
                    os.replace(self.folder / name, past / f"{number}-{name}")
        write_json(
            self.folder / "submission.json",
            {
                "jobs": [job.name for job in self.jobs],
                "profile": self.profile.name,
                "until": self.until,
                "recipe": fingerprint(self.recipe.model_dump()),
                "versions": package_versions(),
                "python": sys.executable,
                "directory": self.directory,
                "code": _tree_digest(self.folder / "code"),
            },
        )

    def _spec(self, job: JobSpec) -> dict[str, Any]:
        """What the job runner reads."""
        profile = self.profile
        return {
            **asdict(job),
            "python": sys.executable,
            "container": profile.container and profile.container.model_dump(mode="json"),
            "max_attempts": profile.attempts,
            "gpu_vendor": profile.gpu_vendor,
            "preflight_seconds": profile.preflight_seconds,
            "exclude": job_limits(profile, job).exclude,
            "keep_last": self.recipe.train.checkpoint.keep_last,
            "lora": self.recipe.student.lora is not None,
            "preflight": job.tasks > 1 or job.gpus_per_node > 0,
            "successors": [other.name for other in self.jobs if job.name in other.after],
        }


def resume(run: RunDirectory) -> Submission:
    """The unfinished jobs of a submitted run, by its recorded recipe and profile and the current
    code.

    Raises ArtifactError for a run that was never submitted.
    """
    run = RunDirectory(run.path.resolve())
    until = enter_submission(run)["until"]
    return Submission(
        run,
        load_recipe(str(run.recipe)),
        load_profile(str(run.cluster / "profile.yaml")),
        nodes=None,
        until=until,
    )


def enter_submission(run: RunDirectory) -> dict[str, Any]:
    """Read the submission, and change to the directory that it was submitted from, since relative
    paths of the recipe start there.

    Raises ArtifactError for a run that was never submitted.
    """
    file = run.cluster / "submission.json"
    if not file.is_file():
        raise ArtifactError(
            f"{run.path} was never submitted: run `pocl submit RECIPE --profile NAME --run-dir "
            f"{run.path}`"
        )
    submission: dict[str, Any] = read_json(file)
    if Path(submission["directory"]).is_dir():
        os.chdir(submission["directory"])
    return submission


def job_ids(run: RunDirectory) -> list[str]:
    """All ids of the run's jobs."""
    return [
        line
        for path in sorted((run.cluster / "jobs").glob("*.ids"))
        for line in path.read_text().split()
    ]


def cancel(run: RunDirectory) -> list[str]:
    """Cancel the run's jobs that wait or run. Returns their ids."""
    ids = sorted({job.array for job in scheduler.live_jobs(job_ids(run))}, key=int)
    scheduler.cancel(ids)
    return ids


def _tree_digest(folder: Path) -> str:
    """sha256 of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
