"""The answers of one model of a run."""

from __future__ import annotations

from contextlib import closing

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.evaluation.evaluate import generate_answers
from pocl_ds.evaluation.evaluated_models import model_path
from pocl_ds.generation.reused_generator import ReusedGenerator
from pocl_ds.workflow.run_dir import RunDirectory


def generate(run: RunDirectory, config: EvaluateConfig, prompt: PromptConfig, model: str) -> None:
    """Generate them with its own engine and one thread."""
    with closing(ReusedGenerator()) as generators:
        generate_answers(
            run,
            config,
            prompt,
            model=model,
            path=model_path(run, model),
            generators=generators,
            threads=1,
        )
