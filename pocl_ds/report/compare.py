"""Several runs on one page: results side by side, curves on common axes, what their recipes differ
in.

Results that were measured in another way cannot be compared: they are refused, or where that is
insisted on, marked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import ReportConfig
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.config.yaml_io import dump_yaml
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.metrics.footnotes import MARK, footnotes, mark_benchmark
from pocl_ds.report.charts import overlaid
from pocl_ds.report.document import browser, cells, document, figures, folded, section, table
from pocl_ds.report.formatting import ABSENT, escaped, kl_lines, number, size
from pocl_ds.report.items import Benchmark, Item
from pocl_ds.report.page import ITEM_MENUS, item_data, missing
from pocl_ds.report.run_summary import Facts, read_facts
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

PAGE = "comparison.html"
LABELS = {"loss": "held-out loss (nats/token)", "kl": "KL to teacher (nats/token)"}
DECODING = ("temperature", "top_p", "max_new_tokens", "samples")


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    name: str
    recipe: dict[str, Any]
    facts: Facts
    ids: int | None = None  # over which loss and KL were measured


def compare_runs(paths: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Path:
    """Write one page over the runs and return where: `out`, or report/comparison.html of the first.

    Raises RecipeError for a folder that is no run or is named twice, ArtifactError where
    evaluations were made in different ways and `force` does not insist.
    """
    runs = _read(paths)
    differing = evaluation_differences(runs)
    if differing and not force:
        raise ArtifactError(
            "these results cannot stand side by side, since they were measured in different ways "
            f"({'; '.join(differing)}): evaluate them alike, or say --force to see them marked"
        )
    target = out or RunDirectory(paths[0]).report / PAGE
    with atomic_write(target) as stream:
        stream.write(comparison_page(runs, differing))
    return target


def evaluation_differences(runs: Sequence[Compared]) -> list[str]:
    """What was done differently in the evaluations that are there: `field: value of one run, value
    of another`.
    """
    evaluated = [run for run in runs if run.facts.results is not None]
    found = []
    for other in evaluated[1:]:
        first = evaluated[0]
        sides = [
            {
                **{f"prompt.{key}": value for key, value in run.recipe["prompt"].items()},
                **{f"evaluate.{key}": run.recipe["evaluate"][key] for key in DECODING},
                **{
                    f"evaluate.generation.{key}": run.recipe["evaluate"]["generation"][key]
                    for key in ("backend", "dtype")
                },
                "benchmarks": [one.name for one in run.facts.benchmarks],
            }
            for run in (first, other)
        ]
        differing = [
            key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key)
        ]
        found += [
            f"{key}: {sides[0].get(key)} in {first.name}, {sides[1].get(key)} in {other.name}"
            for key in differing
        ]
        asked = {one.name: one.asked for one in first.facts.benchmarks}
        found += [
            f"benchmark {one.name}: {other.name} was asked other questions than {first.name}"
            for one in other.facts.benchmarks
            if asked.get(one.name, one.asked) != one.asked
        ]
    return found


def loss_differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Of LABELS what does not compare, and why, as far as manifests tell: nats a token are of some
    texts in some tokens.
    """
    found: dict[str, list[str]] = {}
    for key in LABELS:
        measured = [run for run in runs if _students(run).get(key) is not None]
        for other in measured[1:]:
            found.setdefault(key, []).extend(_why_apart(measured[0], other, key))
    return {key: why for key, why in found.items() if why}


def _why_apart(one: Compared, other: Compared, key: str) -> list[str]:
    both, found = f"{one.name} and {other.name}", []
    data, theirs = (run.facts.manifests.get("preprocess") for run in (one, other))
    if data and theirs:
        texts, tokens = (
            data.files.get(f"test.{part}") != theirs.files.get(f"test.{part}")
            for part in ("jsonl", "tokens.bin")
        )
        if texts:
            found.append(f"{both} have other test splits")
        if data.info.get("vocabulary") != theirs.info.get("vocabulary") or (tokens and not texts):
            found.append(f"{both} split texts into other tokens")
    if one.ids != other.ids:
        found.append(f"{one.name} counts {one.ids} token ids and {other.name} {other.ids}")
    if key == "kl" and _teacher(one) != _teacher(other):
        found.append(
            f"the teacher of {one.name} is {_teacher(one)} and that of {other.name} "
            f"{_teacher(other)}"
        )
    return found


def _students(run: Compared) -> dict[str, Any]:
    """What the results say of the student."""
    found: dict[str, Any] = (
        run.facts.results["models"].get("student", {}) if run.facts.results else {}
    )
    return found


def _teacher(run: Compared) -> str:
    """The one that is evaluated, at the commit that the run took."""
    teacher, data = (
        run.recipe["teacher"] or {"model": "none", "revision": None},
        run.facts.manifests.get("preprocess"),
    )
    name = f"{teacher['model']}@{teacher['revision'] or 'main'}"
    commit = (
        data.info.get("commits", {}).get(name, teacher["revision"]) if data else teacher["revision"]
    )
    return f"{teacher['model']} at {commit}" if commit else str(teacher["model"])


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(dotted field, its value in each recipe) for the fields that are not the same in all."""
    flat = [dict(_fields(recipe)) for recipe in recipes]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name) for one in flat]) for name in names if name != "name"]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def comparison_page(runs: Sequence[Compared], differing: Sequence[str]) -> str:
    """The whole page. differing: of evaluations that are shown all the same."""
    charts = overlaid({run.name: run.facts.curves for run in runs if run.facts.curves is not None})
    mixed, why = _mixed(runs, bool(differing))
    sentences = [
        f"These results were measured in different ways and do not compare. {one}"
        for one in differing
    ]
    sentences += [f"{run.name}: {sentence}" for run in runs for sentence in run.facts.missing]
    sentences += [
        f"{run.name}: {line}" for run in runs for line in footnotes(run.facts.results or {})
    ]
    apart = loss_differences(runs)
    sentences += [
        f"{MARK} {LABELS[key]} does not compare: {'; '.join(why)}." for key, why in apart.items()
    ]
    if other_teachers := [
        f"{run.name}: {MARK} {line}"
        for run in runs
        for line in kl_lines(run.facts.results, run.recipe)
    ]:
        sentences, apart = [*sentences, *other_teachers], {**apart, "kl": other_teachers}
    names = " · ".join(run.name for run in runs)
    title = f"{len(runs)} runs side by side"
    differences = recipe_differences([run.recipe for run in runs])
    rows = "".join(
        f"<tr>{cells([name, *('null' if value is None else value for value in values)])}</tr>"
        for name, values in differences
    )
    recipes = "".join(
        folded(run.name, f'<pre tabindex="0">{escaped(dump_yaml(run.recipe))}</pre>')
        for run in runs
    )
    body = "".join(
        [
            f'<header><p class="eyebrow">POCL distillation · comparison</p><h1>{escaped(title)}</h1>'
            f'<p class="lead">{escaped(names)}</p></header>',
            missing(sentences),
            section(
                "Results",
                _results(runs, differing=bool(differing), apart=apart),
                anchor="results",
                note="Of the students after training: mean ± standard deviation over seeds, in "
                "brackets a "
                "95% bootstrap interval over items, ROUGE-L ×100.",
            ),
            section(
                "What the recipes differ in",
                table(["field", *(run.name for run in runs)], rows, css="wrap", caption="recipes")
                if rows
                else "<p>In nothing but their names.</p>",
                anchor="recipes",
            ),
            section(
                "Training",
                figures(charts, 0),
                anchor="training",
                note="Drag over a chart to zoom in, twice a click to zoom out.",
            ),
            section(
                "Answers",
                browser("items", ITEM_MENUS) if mixed else f'<p class="note">{escaped(why)}</p>',
                anchor="answers",
            ),
            section("Recipes", recipes, anchor="provenance"),
        ]
    )
    data = {"charts": charts, "samples": None, "items": mixed}
    return document(title, body, data)


def _read(paths: Sequence[Path]) -> list[Compared]:
    if twice := next(
        (path for path in paths if [p.resolve() for p in paths].count(path.resolve()) > 1), None
    ):
        raise RecipeError(f"{twice} is named twice: name each run once")
    runs = []
    room = ReportConfig(max_samples=0, max_text_mb=max(1, 16 // len(paths)))
    labels = [path.resolve().name for path in paths]
    for path, label in zip(paths, labels, strict=True):
        run = RunDirectory(path)
        if not run.recipe.is_file():
            raise RecipeError(f"{path} is not a run directory: it holds no recipe.yaml")
        recipe = load_recipe(str(run.recipe)).model_dump(mode="json")
        facts = read_facts(
            run, room, seed=int(recipe["seed"]), window=int(recipe["train"]["length_window"])
        )
        measured = read_manifest(run.evaluation, "held_out.json.manifest.json")
        ids = measured.info["ids"] if measured else None
        runs.append(Compared(label if labels.count(label) == 1 else str(path), recipe, facts, ids))
    return runs


def _results(runs: Sequence[Compared], *, differing: bool, apart: Collection[str]) -> str:
    """One column a run. differing: they were measured in different ways; apart: of LABELS, what
    does not compare.
    """
    names = list(dict.fromkeys(one.name for run in runs for one in run.facts.benchmarks))
    sign = f" {MARK}" if differing else ""
    rows = []
    for name in names:
        rouge = (
            f"{name}{sign}"
            if differing
            else mark_benchmark(name, *(run.facts.results or {} for run in runs))
        )
        rows.append([f"ROUGE-L, {rouge}", *(_score(run.facts, name, "student") for run in runs)])
        rows.append(
            [
                f"ROUGE-L of the teacher, {rouge}",
                *(_score(run.facts, name, "teacher") for run in runs),
            ]
        )
    for key, label in LABELS.items():
        name = f"{label} {MARK}" if differing or key in apart else label
        rows.append([name, *(number(_students(run).get(key), 3) for run in runs)])
    infos = [
        run.facts.manifests["train"].info if "train" in run.facts.manifests else {} for run in runs
    ]
    rows.append(
        [
            "steps",
            *(ABSENT if run.facts.curves is None else f"{run.facts.curves.last:,}" for run in runs),
        ]
    )
    rows.append(
        [
            "time of training",
            *(format_duration(info["seconds"]) if "seconds" in info else ABSENT for info in infos),
        ]
    )
    rows.append(
        ["time, all stages", *(format_duration(sum(one.seconds for one in run.facts.spent)) for run in runs)]
    )
    rows.append(["ranks", *(str(info.get("ranks", ABSENT)) for info in infos)])
    rows.append(
        ["peak host memory of a rank", *(size(info.get("peak_host_bytes")) for info in infos)]
    )
    rows.append(
        ["peak GPU memory of a rank", *(size(info.get("peak_device_bytes")) for info in infos)]
    )
    return table(
        ["", *(run.name for run in runs)],
        "".join(f"<tr>{cells(row)}</tr>" for row in rows),
        caption="results",
    )


def _score(facts: Facts, name: str, model: str) -> str:
    benchmark = next((one for one in facts.benchmarks if one.name == name), None)
    if facts.results is None or benchmark is None or model not in benchmark.intervals:
        return ABSENT
    entry = facts.results["models"][model]["benchmarks"][name]
    deviation = "" if entry["rouge_l_deviation"] is None else f" ± {entry['rouge_l_deviation']:.2f}"
    low, high = benchmark.intervals[model]
    return f"{entry['rouge_l']:.2f}{deviation} ({low:.2f} to {high:.2f})"


def _mixed(runs: Sequence[Compared], differing: bool) -> tuple[list[dict[str, Any]], str]:
    """The students' answers of all runs to the same items, by benchmark; or why there are none."""
    evaluated = [
        run for run in runs if any("student" in one.intervals for one in run.facts.benchmarks)
    ]
    if len(evaluated) < 2:
        return [], "Fewer than two of these runs have answers of their students."
    if differing:
        return [], "The runs were not asked alike, so their answers are not put side by side."
    found = []
    for one in evaluated[0].facts.benchmarks:
        sides = [next(b for b in run.facts.benchmarks if b.name == one.name) for run in evaluated]
        by_id = [{item.id: item for item in side.items} for side in sides]
        items = [
            Item(
                item.id,
                item.question,
                item.references,
                {
                    run.name: known[item.id].answers["student"]
                    for run, known in zip(evaluated, by_id, strict=True)
                },
            )
            for item in one.items
            if all(item.id in known for known in by_id)
        ]
        intervals = {
            run.name: side.intervals["student"] for run, side in zip(evaluated, sides, strict=True)
        }
        names = {run.name: run.name for run in evaluated}
        found.append(
            item_data(Benchmark(one.name, one.total, items, one.asked, {}, intervals), names)
        )
    return found, ""


def _fields(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += (
            _fields(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else [(f"{prefix}{key}", value)]
        )
    return found
