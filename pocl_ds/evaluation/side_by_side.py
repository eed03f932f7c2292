"""Two models' answers put side by side: read, checked that they may be compared, joined by the
items' ids, and compared.
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
from pocl_ds.evaluation.comparison import Comparison, compare, compare_mean, sentence
from pocl_ds.evaluation.judge import read_verdicts, verdicts_file
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.metrics.footnotes import merge_footnotes
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

# Measure -> what its unit is called, and by how much the number on disk is multiplied.
MEASURES = {
    "rouge_l": ("ROUGE-L", 100.0),
    "exact_match": ("% exact match", 100.0),
    "judge": ("in the judge's scores", 1.0),
}
MEAN = "mean of all"  # no benchmark can be called so


@dataclass(frozen=True)
class Side:
    """One model of one run, and what it is called in words."""

    run: RunDirectory
    model: str
    name: str


@dataclass(frozen=True)
class Answered:
    """A model's scores on one benchmark: item -> its scores by seed; how they were made; what was
    asked of each item.
    """

    scores: dict[str, list[float]]
    settings: dict[str, Any]
    asked: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Comparisons by benchmark, with their mean where there are several. marks: why they should not
    have been compared.
    """

    comparisons: dict[str, Comparison]
    marks: list[str]
    measure: str


def put_side_by_side(
    a: Side, b: Side, *, measure: str = "rouge_l", benchmark: str | None = None, force: bool = False
) -> Table:
    """Compare B with A on every benchmark that both answered, or on one.

    Raises ArtifactError where template, decoding, or items differ, unless forced: then what differs
    is said in `marks`, and items are those of both.
    """
    if measure not in MEASURES:
        raise RecipeError(f"there is no measure {measure!r}: take one of {', '.join(MEASURES)}")
    pairs: dict[str, tuple[Floats, Floats]] = {}
    marks: list[str] = []
    for name in _benchmarks(a, b, benchmark):
        one, other = (read_side(side, name, measure) for side in (a, b))
        differences = _differences(one, other)
        if differences and not force:
            raise ArtifactError(
                f"benchmark {name}: {differences[0]}, so {a.name} and {b.name} are not "
                f"comparable: evaluate both "
                "alike, or look at them all the same with --force"
            )
        marks += [f"{name}: {text}" for text in differences]
        pairs[name] = _joined(one, other, name, measure)
    found = {name: compare(*pair) for name, pair in pairs.items()}
    if len(pairs) > 1:
        found[MEAN] = compare_mean(pairs)
    return Table(found, marks, measure)


def read_side(side: Side, benchmark: str, measure: str) -> Answered:
    """A model's scores on a benchmark, all seeds that its results hold. Raises ArtifactError where
    a part is missing.
    """
    scores: dict[str, list[float]] = {}
    asked: dict[str, Any] = {}
    how: dict[str, Any] | None = None
    seeds, factor = results_of(side.run)["seeds"], MEASURES[measure][1]
    files = [answers_file(side.run, side.model, benchmark, seed) for seed in seeds]
    if measure == "judge":  # it may have looked at the first seeds only
        files = [
            file
            for seed, file in zip(seeds, files)
            if verdicts_file(side.run, side.model, benchmark, seed).is_file()
        ]
    for file in files:
        records, manifest = read_answers(file), answers_manifest(file)
        settings = manifest.info.get("settings") if manifest else None
        if settings is None or (how is not None and settings != how):
            raise ArtifactError(
                f"{file} does not say how it was made as the other seeds do: run `pocl evaluate` "
                f"again"
            )
        how = settings
        values = _values(file, records, measure)
        for record in records:
            asked.setdefault(
                record["id"], [record["instruction"], record.get("input", ""), record["references"]]
            )
            if record["id"] in values:
                scores.setdefault(record["id"], []).append(factor * values[record["id"]])
    if how is None:
        raise ArtifactError(
            f"{side.run.evaluation / side.model} holds no verdicts on {benchmark}: run `pocl "
            f"evaluate` with "
            "evaluate.judge first"
        )
    if measure == "judge":
        how = {**how, "judge": _judged_how(side, benchmark, seeds)}
    whole = {key: values for key, values in scores.items() if len(values) == len(files)}
    return Answered(whole, how, asked)


def results_of(run: RunDirectory) -> dict[str, Any]:
    """The results of a finished evaluation."""
    path: Path = run.evaluation / "results.json"
    if not path.is_file():
        raise ArtifactError(
            f"{run.path} holds no finished evaluation: run `pocl evaluate --run-dir {run.path}` "
            f"first"
        )
    found: dict[str, Any] = read_json(path)
    return found


def lines_of(table: Table, a: Side, b: Side) -> list[str]:
    """A table and a sentence for each benchmark, for the terminal."""
    rows = [["", a.name, b.name, "difference", "95% interval", "p", "items"]]
    for name, found in table.comparisons.items():
        rows.append(
            [
                name,
                _mean(found.mean_a, found.deviation_a),
                _mean(found.mean_b, found.deviation_b),
                f"{found.difference:+.2f}",
                f"{found.low:+.2f} .. {found.high:+.2f}",
                f"{found.p:.2g}",
                str(found.items),
            ]
        )
    lines = [*align_columns(rows, numbers=True), ""]
    unit = MEASURES[table.measure][0]
    lines += [
        f"{name}: {sentence(found, a.name, b.name, unit)}"
        for name, found in table.comparisons.items()
    ]
    lines += merge_footnotes(
        [(side.name, results_of(side.run)) for side in (a, b)], table.comparisons
    )
    lines += [f"NOT COMPARABLE, shown by --force: {mark}" for mark in table.marks]
    lines.append(
        "\nIntervals and p: paired bootstrap over items; ± beside a mean: deviation over seeds. "
        "Other trainings are not "
        "in them."
    )
    return lines


def _benchmarks(a: Side, b: Side, only: str | None) -> list[str]:
    held: list[Sequence[str]] = []
    for side in (a, b):
        models = results_of(side.run)["models"]
        if side.model not in models:
            raise RecipeError(
                f"{side.run.path} has no results of {side.model!r}: it has {', '.join(models)}"
            )
        held.append(list(models[side.model]["benchmarks"]))
    both = [name for name in held[0] if name in held[1]]
    if only is not None and only not in both:
        raise RecipeError(f"--benchmark {only}: both have {', '.join(both) or 'none in common'}")
    if not both:
        raise ArtifactError(
            f"{a.name} and {b.name} have no benchmark in common ({', '.join(held[0])}; "
            f"{', '.join(held[1])}): "
            "evaluate both on the same"
        )
    if only is None and (alone := sorted(set(held[0]) ^ set(held[1]))):
        log.warning(
            "compare: only one of both was evaluated on %s, which is left out", ", ".join(alone)
        )
    return both if only is None else [only]


def _values(file: Path, records: list[dict[str, Any]], measure: str) -> dict[str, float]:
    """Item -> the number on disk; items without a verdict are left out."""
    if measure != "judge":
        return {record["id"]: float(record[measure]) for record in records}
    verdicts = read_verdicts(file.with_name(f"{file.stem}.judge.jsonl"))
    return {
        record["id"]: float(record["score"]) for record in verdicts if record["score"] is not None
    }


def _judged_how(side: Side, benchmark: str, seeds: Sequence[int]) -> list[Any]:
    """Which judge it was, and what it was told."""
    found = []
    for seed in seeds:
        file = verdicts_file(side.run, side.model, benchmark, seed)
        manifest = read_manifest(file.parent, f"{file.name}.manifest.json")
        if manifest is not None:
            found.append(manifest.info["settings"])
    return sorted(set(found))


def _differences(a: Answered, b: Answered) -> list[str]:
    """Why two sides should not be compared, each a part of a sentence."""
    names = dict.fromkeys([*a.settings, *b.settings])
    found = [
        f"{name} differs ({a.settings.get(name)} and {b.settings.get(name)})"
        for name in names
        if a.settings.get(name) != b.settings.get(name)
    ]
    one, other = len(a.asked.keys() - b.asked.keys()), len(b.asked.keys() - a.asked.keys())
    if one or other:
        found.append(f"the items differ ({one} and {other} that the other was not asked)")
    changed = sum(a.asked[key] != b.asked[key] for key in a.asked.keys() & b.asked.keys())
    if changed:
        found.append(f"{changed} items of the same id have another question or other references")
    return found


def _joined(a: Answered, b: Answered, name: str, measure: str) -> tuple[Floats, Floats]:
    """Scores [n, s] and [n, s'] of the items of both, by id, never by position."""
    ids = sorted(a.scores.keys() & b.scores.keys())
    if len(ids) < 2:
        raise ArtifactError(
            f"benchmark {name}: {len(ids)} items have a score of {measure} on both sides: two are "
            f"the least"
        )
    if left := len(a.asked.keys() | b.asked.keys()) - len(ids):
        log.log(
            logging.INFO if measure == "judge" else logging.WARNING,
            "compare: %s: %d items without a score on one side are left out",
            name,
            left,
        )
    one, other = (np.array([side.scores[key] for key in ids], np.float64) for side in (a, b))
    return one, other


def _mean(value: float, deviation: float | None) -> str:
    return f"{value:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
