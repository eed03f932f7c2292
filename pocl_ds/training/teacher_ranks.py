"""A process that runs the teacher alone, for the student's ranks of the same job."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocl_ds.config import TeacherConfig, TrainConfig
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.errors import EXIT_RESUME, Interrupted, PoclError
from pocl_ds.models.load import embedding_rows
from pocl_ds.models.recipe_model import load_recipe_model, read_model_config
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.runtime.job_roles import JobRoles
from pocl_ds.teachers.requests import ForwardModel, TeacherService
from pocl_ds.teachers.routed import RoutedModel
from pocl_ds.teachers.teacher import TeacherEnsemble
from pocl_ds.training.monitor import StopSignal
from pocl_ds.training.teachers_of_run import TeacherLoader
from pocl_ds.training.watchdog import Watchdog

log = logging.getLogger("pocl_ds")


def serve_teacher(roles: JobRoles) -> None:
    """Run the teacher on this rank until the student's ranks need it no more. All ranks of the
    teacher call it together.

    After a signal the student's ranks decide when the work ends: they still need the teacher for
    the optimizer step that they finish. Raises Interrupted then, ResourceError if a rank of the
    student has ended, and ModelError or ResourceError for a teacher that cannot be loaded.
    """
    if distributed.rank() == 0:
        log.setLevel(logging.INFO)
    if distributed.world_size() > 1:
        start_deepspeed()  # before the first collective
    log.info(
        "rank %d runs the teacher: ranks=%d device=%s",
        distributed.job_rank(),
        distributed.world_size(),
        distributed.device_name(),
    )
    with contextlib.ExitStack() as stack:
        stop, hangs = stack.enter_context(StopSignal()), _HangDetection(stack)
        try:
            interrupted = TeacherService(roles, hangs.load, hangs.working).run()
        except PoclError:
            if stop.number is None:
                raise
            interrupted = True
    if interrupted:
        number = stop.number or signal.SIGTERM
        raise Interrupted(
            f"the teacher's ranks stop after {signal.Signals(number).name}, with the student's",
            exit_code=128 + number if number == signal.SIGINT else EXIT_RESUME,
        )


class _HangDetection:
    """Watches the time that a request takes, by the settings of the training whose teacher is
    loaded. The watchdogs end with `stack`.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._watchdog: Watchdog | None = None

    def load(self, settings: dict[str, Any]) -> ForwardModel:
        """Load a teacher, see `_load`; that may take as long as it will."""
        train = TrainConfig.model_validate(settings["train"])
        if self._watchdog is None:
            watchdog = Watchdog(Path(settings["logs"]), train.hang_timeout_seconds)
            self._watchdog = self._stack.enter_context(watchdog)
        self._watchdog.pause()
        return _load(settings, train)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """See `TeacherService`."""
        if self._watchdog:
            self._watchdog.reset()
        yield
        if self._watchdog:
            self._watchdog.pause()


def _load(settings: dict[str, Any], train: TrainConfig) -> ForwardModel:
    """Load a teacher, or the members of an ensemble, as `RemoteLoader` describes them."""
    if train.engine == "deepspeed":
        start_deepspeed()
    stopwatch = distributed.Stopwatch()
    teachers = []
    for member in settings["members"]:
        config, path = TeacherConfig.model_validate(member["config"]), member["path"]
        # Requests have the teacher's own ids.
        vocab = VocabMap(embedding_rows(read_model_config(path, config)))
        load = TeacherLoader(config, train, settings["fused"], vocab, load_recipe_model)
        teachers.append(load(RoutedModel(config.label, path, ("teacher",))))
        log.info("loaded the teacher %s: seconds=%.1f", path, stopwatch.lap())
    return teachers[0] if len(teachers) == 1 else TeacherEnsemble(teachers, [1.0] * len(teachers))
