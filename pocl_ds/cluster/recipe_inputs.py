"""Data, files and folders that a recipe names, by their fields."""

from __future__ import annotations

from pocl_ds.config import Recipe
from pocl_ds.config.data import BUILT_IN_SOURCES, HELD_OUT_SPLITS, SourceConfig


def data_sections(recipe: Recipe) -> dict[str, SourceConfig]:
    """The sources that the data are read from, by their field."""
    data = recipe.data
    sections: dict[str, SourceConfig] = {}
    for split in HELD_OUT_SPLITS:
        if section := data.held_out_source(split):
            sections[f"data.{split}"] = section
    for number, source in enumerate(data.training_sources):
        sections[f"data.sources[{number}]" if data.sources else "data.source"] = source
    return {
        field: section
        for field, section in sections.items()
        if section.source not in BUILT_IN_SOURCES
    }


def named_files(recipe: Recipe) -> dict[str, str]:
    """Files and folders besides models and data that a recipe names, by field."""
    judge, harness = recipe.evaluate.judge, recipe.evaluate.harness
    files = {
        "prompt.template": recipe.prompt.template if "/" in recipe.prompt.template else None,
        "evaluate.judge.prompt_template": judge.prompt_template if judge else None,
        "evaluate.benchmark_dir": recipe.evaluate.benchmark_dir,
        "evaluate.harness.include_path": harness.include_path if harness else None,
        "ranking.scores": recipe.ranking.scores,
    }
    return {field: name for field, name in files.items() if name is not None}
