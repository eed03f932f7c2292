"""Comparison of two models: read their answers, check that they are comparable, join them by item
id, and compare them by a paired bootstrap.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.evaluation.answers import answers_file, answers_manifest, read_answers
from pocl_ds.evaluation.comparison import (
    Comparison,
    compare_benchmark_means,
    compare_scores,
    comparison_sentence,
)
from pocl_ds.evaluation.judge import read_verdicts, verdicts_file
from pocl_ds.evaluation.verification import (
    read_verification,
    verification_file,
    verification_manifest,
)
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.metrics.footnotes import merge_footnotes
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_part
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

# Measure -> its unit in sentences, and the factor that turns stored scores into this unit.
MEASURES = {
    "rouge_l": ("ROUGE-L", 100.0),
    "exact_match": ("% exact match", 100.0),
    "correct": ("% correct", 100.0),
    "judge": ("in the judge's scores", 1.0),
}
MEAN = "mean of all"  # cannot be the name of a benchmark, since it has spaces


@dataclass(frozen=True)
class ComparedModel:
    """One model of one run, and its label in tables and sentences."""

    run: RunDirectory
    model: str
    label: str


@dataclass(frozen=True)
class BenchmarkScores:
    """One model's scores on one benchmark."""

    scores: dict[str, list[float]]  # item id -> score by seed, only of items with all seeds
    settings: dict[str, Any]  # how the answers were generated and judged
    prompts: dict[str, Any]  # item id -> instruction, input and references


@dataclass(frozen=True)
class ModelComparison:
    """Comparisons by benchmark, and of their mean if there are several."""

    comparisons: dict[str, Comparison]
    differences: list[str]  # why the two models are not comparable, if that was forced
    measure: str


def compare_models(
    a: ComparedModel,
    b: ComparedModel,
    *,
    measure: str = "rouge_l",
    benchmark: str | None = None,
    force: bool = False,
) -> ModelComparison:
    """Compare model B with model A.

    Args:
        measure: a key of MEASURES.
        benchmark: compare on this benchmark only; None means all that both have answered.
        force: compare the common items even if template, decoding or items differ, and list the
            differences.

    Raises:
        RecipeError: there is no such measure, model or benchmark.
        ArtifactError: results are missing, or differ in template, decoding or items.
    """
    if measure not in MEASURES:
        raise RecipeError(f"there is no measure {measure!r}: choose one of {', '.join(MEASURES)}")
    scores: dict[str, tuple[Floats, Floats]] = {}
    all_differences: list[str] = []
    for name in _common_benchmarks(a, b, benchmark, measure):
        scores_a, scores_b = (read_scores(model, name, measure) for model in (a, b))
        differences = _differences(scores_a, scores_b)
        if differences and not force:
            raise ArtifactError(
                f"benchmark {name}: {differences[0]}, so {a.label} and {b.label} are not "
                "comparable: evaluate both in the same way, or compare them anyway with --force"
            )
        all_differences += [f"{name}: {text}" for text in differences]
        scores[name] = _join_by_id(scores_a, scores_b, name, measure)
    comparisons = {name: compare_scores(*pair) for name, pair in scores.items()}
    if len(scores) > 1:
        comparisons[MEAN] = compare_benchmark_means(scores)
    return ModelComparison(comparisons, all_differences, measure)


def read_scores(compared: ComparedModel, benchmark: str, measure: str) -> BenchmarkScores:
    """A model's scores on a benchmark, with all seeds of its results.

    Raises:
        ArtifactError: answers or verdicts are missing, or seeds were generated differently.
    """
    run, model = compared.run, compared.model
    seeds, factor = read_results(run)["seeds"], MEASURES[measure][1]
    if measure == "judge":  # it may have judged the first seeds only
        seeds = [s for s in seeds if verdicts_file(run, model, benchmark, s).is_file()]

    # Read all seeds, which must have been generated in the same way.
    scores: dict[str, list[float]] = {}
    prompts: dict[str, Any] = {}
    settings: dict[str, Any] | None = None
    for seed in seeds:
        file = answers_file(run, model, benchmark, seed)
        records, manifest = read_answers(file), answers_manifest(file)
        file_settings = manifest.info.get("settings") if manifest else None
        if file_settings is None or (settings is not None and file_settings != settings):
            raise ArtifactError(
                f"{file} was generated with other settings than the other seeds: run "
                "`pocl evaluate` again"
            )
        settings = file_settings
        values = _stored_scores(compared, benchmark, seed, records, measure)
        for record in records:
            prompt = [record["instruction"], record.get("input", ""), record["references"]]
            prompts.setdefault(record["id"], prompt)
            if record["id"] in values:
                scores.setdefault(record["id"], []).append(factor * values[record["id"]])

    if settings is None:
        raise ArtifactError(
            f"{run.evaluation / model} holds no verdicts on {benchmark}: run `pocl evaluate` with "
            "evaluate.judge first"
        )
    if measure == "judge":
        settings = {**settings, "judge": _judge_settings(compared, benchmark, seeds)}
    if measure == "correct":
        manifest = verification_manifest(verification_file(run, model, benchmark, seeds[0]))
        settings = {**settings, "verify": manifest.info["verify"] if manifest else None}
    # An item without a verdict under some seed does not count.
    complete = {item: values for item, values in scores.items() if len(values) == len(seeds)}
    return BenchmarkScores(complete, settings, prompts)


def read_results(run: RunDirectory) -> dict[str, Any]:
    """The results of a finished evaluation. Raises ArtifactError if there are none."""
    path: Path = run.evaluation / "results.json"
    if not path.is_file():
        raise ArtifactError(
            f"{run.path} has no finished evaluation: run `pocl evaluate --run-dir {run.path}` first"
        )
    results: dict[str, Any] = read_json(path)
    return results


def comparison_lines(result: ModelComparison, a: ComparedModel, b: ComparedModel) -> list[str]:
    """A table, and a sentence for each benchmark, as lines for the terminal."""
    rows = [["", a.label, b.label, "difference", "95% interval", "p", "items"]]
    for name, comparison in result.comparisons.items():
        rows.append(
            [
                name,
                _format_mean(comparison.mean_a, comparison.deviation_a),
                _format_mean(comparison.mean_b, comparison.deviation_b),
                f"{comparison.difference:+.2f}",
                f"{comparison.low:+.2f} .. {comparison.high:+.2f}",
                f"{comparison.p:.2g}",
                str(comparison.items),
            ]
        )
    unit = MEASURES[result.measure][0]
    results = [(model.label, read_results(model.run)) for model in (a, b)]
    return [
        *align_columns(rows, numbers=True),
        "",
        *(
            f"{name}: {comparison_sentence(comparison, a.label, b.label, unit)}"
            for name, comparison in result.comparisons.items()
        ),
        *merge_footnotes(results, result.comparisons),
        *(f"NOT COMPARABLE, shown because of --force: {text}" for text in result.differences),
        "\nIntervals and p: paired bootstrap over items. ± after a mean: standard deviation over "
        "seeds. Neither includes how much another training would differ.",
    ]


def _common_benchmarks(
    a: ComparedModel, b: ComparedModel, name: str | None, measure: str
) -> list[str]:
    """Benchmarks with the measure that both models have answered, or only `name`."""
    benchmarks: list[list[str]] = []
    for compared in (a, b):
        models = read_results(compared.run)["models"]
        if compared.model not in models:
            raise RecipeError(
                f"{compared.run.path} has no results of {compared.model!r}: it has "
                f"{', '.join(models)}"
            )
        entries = models[compared.model]["benchmarks"]
        if measure == "correct":
            entries = {key: entry for key, entry in entries.items() if "correct" in entry}
            if not entries:
                raise ArtifactError(
                    f"{compared.run.path} has no benchmark whose answers are verified: set "
                    "evaluate.benchmarks.NAME.verify, and run `pocl evaluate` again"
                )
        benchmarks.append(list(entries))
    names_a, names_b = benchmarks
    common = [benchmark for benchmark in names_a if benchmark in names_b]
    if name is not None and name not in common:
        raise RecipeError(f"--benchmark {name}: both have {', '.join(common) or 'none in common'}")
    if not common:
        raise ArtifactError(
            f"{a.label} and {b.label} have no benchmark in common ({', '.join(names_a)}; "
            f"{', '.join(names_b)}): evaluate both on the same"
        )
    if name is not None:
        return [name]
    if not_common := sorted(set(names_a) ^ set(names_b)):
        log.warning(
            "compare: only one of the models was evaluated on %s, which is left out",
            ", ".join(not_common),
        )
    return common


def _stored_scores(
    compared: ComparedModel, benchmark: str, seed: int, records: list[dict[str, Any]], measure: str
) -> dict[str, float]:
    """Item id -> score as stored; items without a verdict are left out."""
    place = (compared.run, compared.model, benchmark, seed)
    if measure == "correct":
        return dict(read_verification(verification_file(*place)))
    if measure != "judge":
        return {record["id"]: float(record[measure]) for record in records}
    verdicts = read_verdicts(verdicts_file(*place))
    return {
        record["id"]: float(record["score"]) for record in verdicts if record["score"] is not None
    }


def _judge_settings(compared: ComparedModel, benchmark: str, seeds: Sequence[int]) -> list[Any]:
    """The judge's model and instructions, from the manifests of its verdicts."""
    settings = set()
    for seed in seeds:
        file = verdicts_file(compared.run, compared.model, benchmark, seed)
        manifest = read_part(file.parent, f"{file.name}.manifest.json")
        if manifest is not None:
            settings.add(manifest.info["settings"])
    return sorted(settings)


def _differences(a: BenchmarkScores, b: BenchmarkScores) -> list[str]:
    """Why two models are not comparable, each a part of a sentence."""
    names = dict.fromkeys([*a.settings, *b.settings])
    differences = [
        f"{name} differs ({a.settings.get(name)} and {b.settings.get(name)})"
        for name in names
        if a.settings.get(name) != b.settings.get(name)
    ]
    only_a, only_b = (
        len(a.prompts.keys() - b.prompts.keys()),
        len(b.prompts.keys() - a.prompts.keys()),
    )
    if only_a or only_b:
        differences.append(f"the items differ ({only_a} only of the first, {only_b} of the second)")
    common = a.prompts.keys() & b.prompts.keys()
    if changed := sum(a.prompts[item] != b.prompts[item] for item in common):
        differences.append(f"{changed} items with the same id have different prompts or references")
    return differences


def _join_by_id(
    a: BenchmarkScores, b: BenchmarkScores, benchmark: str, measure: str
) -> tuple[Floats, Floats]:
    """Scores [n, s] and [n, s'] of the items that both have."""
    ids = sorted(a.scores.keys() & b.scores.keys())
    if len(ids) < 2:
        raise ArtifactError(
            f"benchmark {benchmark}: both models have a score of {measure} on {len(ids)} items: "
            "at least two are needed"
        )
    if missing := len(a.prompts.keys() | b.prompts.keys()) - len(ids):
        log.log(
            logging.INFO if measure == "judge" else logging.WARNING,
            "compare: %s: %d items without a score of both models are left out",
            benchmark,
            missing,
        )
    scores_a, scores_b = (
        np.array([side.scores[item] for item in ids], np.float64) for side in (a, b)
    )
    return scores_a, scores_b


def _format_mean(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
