"""How many answers an evaluation generates, before the benchmarks are read."""

from __future__ import annotations

from pocl_ds.config import Recipe
from pocl_ds.evaluation.benchmarks import KNOWN_BENCHMARKS, TEST_SPLIT


def num_answers(recipe: Recipe, training_samples: int) -> int:
    """The answers of one model to all benchmarks whose size is known, over all seeds."""
    sizes = benchmark_sizes(recipe, training_samples)
    return len(recipe.evaluate.seeds) * sum(size for size in sizes.values() if size is not None)


def benchmark_sizes(recipe: Recipe, training_samples: int) -> dict[str, int | None]:
    """Items of each benchmark: published numbers, and the share of the test split; None for a
    benchmark of the user's whose items are not limited.
    """
    data, limit = recipe.data, recipe.evaluate.max_samples
    share = data.test_fraction / (1 - data.test_fraction - data.validation_fraction)
    sizes: dict[str, int | None] = {}
    for name, benchmark in recipe.evaluate.benchmarks.items():
        if benchmark.source in KNOWN_BENCHMARKS:
            size = KNOWN_BENCHMARKS[benchmark.source].items
        elif benchmark.source == TEST_SPLIT and data.held_out_source("test") is None:
            size = round(share * training_samples)
            size = min(size, data.max_test_samples or size)
        else:
            sizes[name] = limit
            continue
        sizes[name] = min(size, limit or size)
    return sizes


def unknown_benchmarks(recipe: Recipe, training_samples: int) -> list[str]:
    """The benchmarks that `num_answers` leaves out."""
    sizes = benchmark_sizes(recipe, training_samples)
    return [name for name, size in sizes.items() if size is None]
