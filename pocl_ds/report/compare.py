"""Several runs on one page: results in one table, curves on common axes, differences of recipes.

Results that were measured in different ways are not comparable: they are an error, or marked if the
comparison is forced.
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
from pocl_ds.report.charts import overlay_charts
from pocl_ds.report.document import (
    chart_figures,
    details,
    filter_list,
    html_document,
    html_rows,
    html_table,
    page_header,
    paragraph_note,
    preformatted,
    section,
)
from pocl_ds.report.formatting import (
    ABSENT,
    LOSS_LABELS,
    format_number,
    format_score,
    format_size,
    kl_footnotes,
)
from pocl_ds.report.items import BenchmarkItems, Item
from pocl_ds.report.page import ITEM_MENUS, ZOOM_NOTE, item_data, missing_list
from pocl_ds.report.run_summary import RunSummary, read_run_summary
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

HTML_FILE = "comparison.html"
MAX_TEXT_MB = 16  # of the items of all runs
# Fields of `evaluate` and of `evaluate.generation` that change answers.
DECODING_FIELDS = ("temperature", "top_p", "max_new_tokens", "max_samples")
BACKEND_FIELDS = ("backend", "dtype")


@dataclass(frozen=True)
class ComparedRun:
    """A run that is compared with others."""

    name: str
    recipe: dict[str, Any]
    summary: RunSummary
    shared_ids: int | None = None  # number of token ids over which loss and KL were computed

    @property
    def student_results(self) -> dict[str, Any]:
        """The student's results, empty if there are none."""
        results = self.summary.results
        entry: dict[str, Any] = results["models"].get("student", {}) if results else {}
        return entry

    @property
    def teacher_revision(self) -> str:
        """The evaluated teacher with its commit."""
        teacher = self.recipe["teacher"] or {"model": "none", "revision": None}
        manifest = self.summary.manifests.get("preprocess")
        commits = manifest.info.get("commits", {}) if manifest else {}
        key = f"{teacher['model']}@{teacher['revision'] or 'main'}"
        commit = commits.get(key, teacher["revision"])
        return f"{teacher['model']} at {commit}" if commit else str(teacher["model"])


def compare_runs(paths: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Path:
    """Write a page that compares runs.

    Args:
        out: the file; None means report/comparison.html of the first run.
        force: also compare results that were measured in different ways, and mark them.

    Returns:
        The file.

    Raises:
        RecipeError: a folder is not a run directory, or is named twice.
        ArtifactError: evaluations differ and `force` is not set.
    """
    runs = _read_runs(paths)
    differences = evaluation_differences(runs)
    if differences and not force:
        raise ArtifactError(
            "these results are not comparable, since they were measured in different ways "
            f"({'; '.join(differences)}): evaluate the runs in the same way, or mark the results "
            "with --force"
        )
    target = out or RunDirectory(paths[0]).report / HTML_FILE
    with atomic_write(target) as stream:
        stream.write(comparison_page(runs, differences))
    return target


def evaluation_differences(runs: Sequence[ComparedRun]) -> list[str]:
    """How the evaluations of runs differ from that of the first one: `field: value in run A, value
    in run B`.
    """
    evaluated = [run for run in runs if run.summary.results is not None]
    differences = []
    for run in evaluated[1:]:
        reference = evaluated[0]
        settings, reference_settings = _evaluation_settings(run), _evaluation_settings(reference)
        differences += [
            f"{key}: {reference_settings.get(key)} in {reference.name}, {settings.get(key)} in "
            f"{run.name}"
            for key in {**reference_settings, **settings}
            if reference_settings.get(key) != settings.get(key)
        ]
        digests = {
            benchmark.name: benchmark.prompts_digest for benchmark in reference.summary.benchmarks
        }
        differences += [
            f"benchmark {benchmark.name}: {run.name} has other prompts than {reference.name}"
            for benchmark in run.summary.benchmarks
            if digests.get(benchmark.name, benchmark.prompts_digest) != benchmark.prompts_digest
        ]
    return differences


def loss_differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Key of LOSS_LABELS -> why it is not comparable, as far as manifests tell.

    Nats per token depend on the texts, on the tokenizer, and KL also on the teacher.
    """
    differences: dict[str, list[str]] = {}
    for key in LOSS_LABELS:
        measured = [run for run in runs if run.student_results.get(key) is not None]
        reasons = [
            reason for run in measured[1:] for reason in _loss_differences(measured[0], run, key)
        ]
        if reasons:
            differences[key] = reasons
    return differences


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(dotted field, its value in each recipe) for the fields that differ."""
    flat = [dict(_dotted_fields(recipe)) for recipe in recipes]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [(name, [fields.get(name) for fields in flat]) for name in names if name != "name"]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def comparison_page(runs: Sequence[ComparedRun], differences: Sequence[str]) -> str:
    """The whole page. differences: of evaluations whose comparison is forced."""
    title = f"Comparison of {len(runs)} runs"
    header = ["", *(run.name for run in runs)]
    warnings, marked_losses = _warnings(runs, differences)
    recipe_rows = [
        [name, *("null" if value is None else value for value in values)]
        for name, values in recipe_differences([run.recipe for run in runs])
    ]
    recipe_table = html_table(
        ["field", *header[1:]], html_rows(recipe_rows), css="wrap", caption="recipes"
    )
    charts = overlay_charts(
        {run.name: run.summary.curves for run in runs if run.summary.curves is not None}
    )
    items, no_items_reason = _common_items(runs, forced=bool(differences))
    html = "".join(
        [
            page_header("comparison", title, " · ".join(run.name for run in runs)),
            missing_list(warnings),
            section(
                "Results",
                html_table(
                    header,
                    html_rows(_results_rows(runs, bool(differences), marked_losses)),
                    caption="results",
                ),
                anchor="results",
                note="Of the students after training: mean ± standard deviation over seeds, and in "
                "brackets a 95% bootstrap interval over items. ROUGE-L ×100.",
            ),
            section(
                "Recipe differences",
                recipe_table if recipe_rows else "<p>Only the names differ.</p>",
                anchor="recipes",
            ),
            section("Training", chart_figures(charts, 0), anchor="training", note=ZOOM_NOTE),
            section(
                "Answers",
                filter_list("items", ITEM_MENUS) if items else paragraph_note(no_items_reason),
                anchor="answers",
            ),
            section(
                "Recipes",
                *(details(run.name, preformatted(dump_yaml(run.recipe))) for run in runs),
                anchor="provenance",
            ),
        ]
    )
    return html_document(title, html, {"charts": charts, "samples": None, "items": items})


def _read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    resolved = [path.resolve() for path in paths]
    if duplicate := next((path for path in paths if resolved.count(path.resolve()) > 1), None):
        raise RecipeError(f"{duplicate} is named twice: name each run once")
    runs = []
    config = ReportConfig(max_samples=0, max_text_mb=max(1, MAX_TEXT_MB // len(paths)))
    names = [path.name for path in resolved]
    for path, name in zip(paths, names, strict=True):
        run = RunDirectory(path)
        if not run.recipe.is_file():
            raise RecipeError(f"{path} is not a run directory: it has no recipe.yaml")
        recipe = load_recipe(str(run.recipe)).model_dump(mode="json")
        seed, window = int(recipe["seed"]), int(recipe["train"]["length_window"])
        summary = read_run_summary(run, config, seed=seed, window=window)
        losses = read_manifest(run.evaluation, "held_out_loss.json.manifest.json")
        shared_ids = losses.info["ids"] if losses else None
        # Runs whose folders have the same name are shown by their paths.
        unique_name = name if names.count(name) == 1 else str(path)
        runs.append(ComparedRun(unique_name, recipe, summary, shared_ids))
    return runs


def _evaluation_settings(run: ComparedRun) -> dict[str, Any]:
    """Fields that must be equal for answers to be comparable, and the benchmarks."""
    evaluate = run.recipe["evaluate"]
    return {
        **{f"prompt.{key}": value for key, value in run.recipe["prompt"].items()},
        **{f"evaluate.{key}": evaluate[key] for key in DECODING_FIELDS},
        **{f"evaluate.generation.{key}": evaluate["generation"][key] for key in BACKEND_FIELDS},
        "benchmarks": [benchmark.name for benchmark in run.summary.benchmarks],
    }


def _loss_differences(a: ComparedRun, b: ComparedRun, key: str) -> list[str]:
    names, reasons = f"{a.name} and {b.name}", []
    data_a, data_b = (run.summary.manifests.get("preprocess") for run in (a, b))
    if data_a and data_b:
        other_texts, other_tokens = (
            data_a.files.get(f"test.{part}") != data_b.files.get(f"test.{part}")
            for part in ("jsonl", "tokens.bin")
        )
        if other_texts:
            reasons.append(f"{names} have different test splits")
        other_vocabulary = data_a.info.get("vocabulary") != data_b.info.get("vocabulary")
        if other_vocabulary or (other_tokens and not other_texts):
            reasons.append(f"{names} have different tokenizers")
    if a.shared_ids != b.shared_ids:
        reasons.append(
            f"the loss of {a.name} is over {a.shared_ids} token ids, that of {b.name} over "
            f"{b.shared_ids}"
        )
    if key == "kl" and a.teacher_revision != b.teacher_revision:
        reasons.append(
            f"the teacher of {a.name} is {a.teacher_revision}, that of {b.name} "
            f"{b.teacher_revision}"
        )
    return reasons


def _warnings(
    runs: Sequence[ComparedRun], differences: Sequence[str]
) -> tuple[list[str], set[str]]:
    """Sentences for the top of the page, and the keys of LOSS_LABELS that are marked."""
    warnings = [
        f"These results were measured in different ways and are not comparable. {difference}"
        for difference in differences
    ]
    warnings += [f"{run.name}: {text}" for run in runs for text in run.summary.missing]
    warnings += [
        f"{run.name}: {line}" for run in runs for line in footnotes(run.summary.results or {})
    ]
    reasons = loss_differences(runs)
    warnings += [
        f"{MARK} {LOSS_LABELS[key]} is not comparable: {'; '.join(reasons[key])}."
        for key in reasons
    ]
    kl_warnings = [
        f"{run.name}: {MARK} {line}"
        for run in runs
        for line in kl_footnotes(run.summary.results, run.recipe)
    ]
    return warnings + kl_warnings, {*reasons, *(["kl"] if kl_warnings else [])}


def _results_rows(
    runs: Sequence[ComparedRun], forced: bool, marked_losses: Collection[str]
) -> list[list[object]]:
    """Rows of results and costs, one column per run. forced: mark all results."""
    summaries = [run.summary for run in runs]
    rows: list[list[object]] = []
    for name in dict.fromkeys(b.name for summary in summaries for b in summary.benchmarks):
        all_results = [summary.results or {} for summary in summaries]
        label = f"{name} {MARK}" if forced else mark_benchmark(name, *all_results)
        for prefix, model in (("ROUGE-L", "student"), ("ROUGE-L of the teacher", "teacher")):
            scores = (_score(summary, name, model) for summary in summaries)
            rows.append([f"{prefix}, {label}", *scores])
    for key, label in LOSS_LABELS.items():
        is_marked = forced or key in marked_losses
        losses = (format_number(run.student_results.get(key), 3) for run in runs)
        rows.append([f"{label} {MARK}" if is_marked else label, *losses])

    # Costs, as far as they are known.
    infos = [summary.train_info for summary in summaries]
    steps = (f"{s.curves.last_step:,}" if s.curves is not None else ABSENT for s in summaries)
    times = (format_duration(info["seconds"]) if "seconds" in info else ABSENT for info in infos)
    rows += [
        ["optimizer steps", *steps],
        ["time of training", *times],
        ["time, all steps", *(format_duration(summary.total_seconds) for summary in summaries)],
        ["ranks", *(info.get("ranks", ABSENT) for info in infos)],
    ]
    if any(info.get("teacher_ranks") for info in infos):
        rows.append(
            ["ranks of the teacher alone", *(info.get("teacher_ranks", ABSENT) for info in infos)]
        )
    for label, key in (("host", "peak_host_bytes"), ("GPU", "peak_device_bytes")):
        sizes = (format_size(info.get(key)) for info in infos)
        rows.append([f"peak {label} memory of a rank", *sizes])
    return rows


def _score(summary: RunSummary, benchmark: str, model: str) -> str:
    """ROUGE-L of a model with its interval."""
    items = next((entry for entry in summary.benchmarks if entry.name == benchmark), None)
    if summary.results is None or items is None or model not in items.intervals:
        return ABSENT
    entry = summary.results["models"][model]["benchmarks"][benchmark]
    low, high = items.intervals[model]
    return f"{format_score(entry)} ({low:.2f} to {high:.2f})"


def _common_items(runs: Sequence[ComparedRun], *, forced: bool) -> tuple[list[dict[str, Any]], str]:
    """The students' answers of all runs to common items, by benchmark; or why there are none."""
    evaluated = [
        run
        for run in runs
        if any("student" in benchmark.intervals for benchmark in run.summary.benchmarks)
    ]
    if len(evaluated) < 2:
        return [], "Fewer than two of these runs have answers of their students."
    if forced:
        return [], "The runs were evaluated in different ways, so their answers are not shown."
    names = {run.name: run.name for run in evaluated}
    benchmarks = []
    for reference in evaluated[0].summary.benchmarks:
        by_run = {
            run.name: next(b for b in run.summary.benchmarks if b.name == reference.name)
            for run in evaluated
        }
        items_by_run = {
            name: {item.id: item for item in benchmark.items} for name, benchmark in by_run.items()
        }
        common_items = [
            Item(
                item.id,
                item.prompt,
                item.references,
                {name: items[item.id].answers["student"] for name, items in items_by_run.items()},
            )
            for item in reference.items
            if all(item.id in items for items in items_by_run.values())
        ]
        intervals = {name: benchmark.intervals["student"] for name, benchmark in by_run.items()}
        combined = BenchmarkItems(
            reference.name, reference.total, common_items, reference.prompts_digest, intervals
        )
        benchmarks.append(item_data(combined, names))
    return benchmarks, ""


def _dotted_fields(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values of all fields."""
    fields: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            fields += _dotted_fields(value, f"{prefix}{key}.")
        else:
            fields.append((f"{prefix}{key}", value))
    return fields
