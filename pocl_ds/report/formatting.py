"""Texts and table rows that both pages share, and escaping of text from data."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pocl_ds.metrics.footnotes import mark_benchmark
from pocl_ds.metrics.result_columns import result_columns
from pocl_ds.report.history import StepCost
from pocl_ds.report.run_summary import MODEL_LABELS, STEP_PARTS, RunSummary
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.runtime.loss_spikes import LossSpikes

ABSENT = "–"
RESULT_LABELS = {"correct": "correct (%)", "rouge_l": "ROUGE-L"}
LOSS_LABELS = {"loss": "held-out loss (nats/token)", "kl": "KL to teacher (nats/token)"}
# Other measures of a benchmark: label, path in its results, decimals.
MEASURES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("correct (%)", ("correct",), 1),
    ("exact match", ("exact_match",), 1),
    ("words", ("words",), 1),
    ("repetition", ("repetition_rate",), 2),
    ("distinct-1", ("distinct_1",), 2),
    ("distinct-2", ("distinct_2",), 2),
    ("loss/token", ("loss",), 3),
    ("KL to teacher", ("kl",), 3),
    ("judge", ("judge", "mean"), 2),
)
COST_HEADER = ["step", "time", "processes", "host memory", "GPU memory"]
MAX_SPIKES = 8  # that are named
# Control characters, and halves of surrogate pairs, which JSON allows and UTF-8 does not.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def escape_html(text: object) -> str:
    """Any text as HTML text or attribute value."""
    return html.escape(UNPRINTABLE.sub("\ufffd", str(text)), quote=True)


def escape_markdown(text: object) -> str:
    """Any text as a cell of a Markdown table: literal, on one line, without links or tags."""
    plain = UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))
    plain = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(plain, quote=False))
    return re.sub(r"(https?):", r"\1&#58;", plain).replace("\n", "<br>")


def format_size(count: int | None) -> str:
    """Bytes as 3.4 GiB or 512 MiB."""
    if count is None:
        return ABSENT
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_number(value: float | None, digits: int) -> str:
    """A number with a fixed number of decimals; a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def format_score(entry: dict[str, Any] | None, measure: str = "rouge_l") -> str:
    """A measure of a benchmark's results, with its deviation over seeds."""
    if entry is None or measure not in entry:
        return ABSENT
    deviation = entry.get(f"{measure}_deviation")
    return format_number(entry[measure], 2) + ("" if deviation is None else f" ± {deviation:.2f}")


def cost_rows(step_costs: Sequence[StepCost]) -> list[list[str]]:
    """Rows for COST_HEADER."""
    return [
        [
            cost.step,
            format_duration(cost.seconds),
            str(cost.processes),
            format_size(cost.host_bytes),
            format_size(cost.device_bytes),
        ]
        for cost in step_costs
    ]


def about_rows(summary: RunSummary, recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value): models, data, method and cost, as far as they are known."""

    def field(section: str, name: str) -> Any:
        return (recipe.get(section) or {}).get(name)

    rows = [
        ("student", field("student", "model")),
        ("teacher", field("teacher", "model")),
        ("data", field("data", "source") or _source_names(field("data", "sources"))),
        ("loss", field("loss", "name")),
        ("policy", field("policy", "name")),
        ("ranking", field("ranking", "strategy")),
    ]
    if summary.plan is not None:
        stages = summary.plan["stages"]
        steps = sum(stage["steps"] for stage in stages)
        rows.append(
            (
                "curriculum",
                f"{stages[-1]['stop']:,} samples in {len(stages)} subsets, {steps:,} optimizer "
                f"steps of {summary.plan['batch_size']} samples",
            )
        )
    if summary.step_costs:
        hours = sum(cost.seconds * cost.processes for cost in summary.step_costs) / 3600
        hours_text = "under 0.01" if hours < 0.01 else f"{hours:,.2f}"
        rows.append(("cost", f"{hours_text} process hours"))
    if summary.history.attempts:
        node_hours, restarts = summary.history.node_hours, summary.history.restarts
        rows.append(("jobs", f"{node_hours:.2f} node hours, {restarts} restarts"))
    return [(label, str(value)) for label, value in rows if value]


def _source_names(sources: Sequence[Mapping[str, Any]] | None) -> str:
    """The sources of a mixture, with their weights."""
    return ", ".join(
        str(source.get("name") or source.get("source"))
        + (f" × {source['weight']:g}" if source.get("weight", 1) != 1 else "")
        for source in sources or ()
    )


def source_rows(summary: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each source of a mixture: training samples, their mean place in the
    ranking, and each model's ROUGE-L on the source's items of the test split.
    """
    rank = summary.manifests.get("rank")
    places = rank.info.get("sources", {}) if rank else {}
    models = summary.results["models"] if summary.results else {}
    scores = {
        model: benchmark["sources"]
        for model, entry in models.items()
        for benchmark in entry["benchmarks"].values()
        if "sources" in benchmark
    }
    models_shown = [model for model in MODEL_LABELS if model in scores]
    header = ["source", "training samples", "mean place"]
    if scores:
        header += ["test items", *(f"ROUGE-L, {MODEL_LABELS[model]}" for model in models_shown)]
    rows = []
    for name in dict.fromkeys([*places, *(name for items in scores.values() for name in items)]):
        place = places.get(name)
        cells = [
            name,
            f"{place['samples']:,}" if place else ABSENT,
            format_number(place and place["mean_place"], 2),
        ]
        entries = [scores[model].get(name) for model in models_shown]
        if scores:
            items = next((entry["samples"] for entry in entries if entry), None)
            cells.append(ABSENT if items is None else f"{items:,}")
        cells += [format_number(entry and entry["rouge_l"], 2) for entry in entries]
        rows.append(cells)
    return header, rows


def results_rows(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Header, and (model, cells): loss and KL in nats per token, correct answers in percent and
    ROUGE-L x100 by benchmark.
    """
    entries = {
        model: results["models"][model] for model in MODEL_LABELS if model in results["models"]
    }
    benchmarks = list(
        dict.fromkeys(name for entry in entries.values() for name in entry["benchmarks"])
    )
    columns = result_columns(results, benchmarks)
    losses = [
        key for key in LOSS_LABELS if any(entry.get(key) is not None for entry in entries.values())
    ]
    header = [
        "model",
        *(LOSS_LABELS[key] for key in losses),
        *(
            f"{RESULT_LABELS[measure]}, {mark_benchmark(name, results)}"
            for measure, name in columns
        ),
    ]
    rows = []
    for model, entry in entries.items():
        cells = [MODEL_LABELS[model], *(format_number(entry.get(key), 3) for key in losses)]
        cells += [format_score(entry["benchmarks"].get(name), key) for key, name in columns]
        rows.append((model, cells))
    return header, rows


def results_note(results: dict[str, Any]) -> str:
    """What the ROUGE-L numbers of a table of results are."""
    seeds = len(results["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"ROUGE-L ×100, {spread}."


def kl_footnotes(results: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> list[str]:
    """Sentences on how the evaluated teacher differs from the one that training used."""
    teacher = recipe.get("teacher") or {}
    entries = (results or {"models": {}})["models"].values()
    if all(entry.get("kl") is None for entry in entries):
        return []
    footnotes = []
    if teacher.get("ensemble"):
        footnotes.append(
            f"KL to teacher is computed with {teacher['model']} alone, while training uses a "
            f"mixture of {1 + len(teacher['ensemble'])} teachers."
        )
    for field in ("by_stage", "by_domain"):
        if teacher.get(field):
            footnotes.append(
                f"KL to teacher is computed with {teacher['model']} alone, while training also "
                f"uses those of teacher.{field}."
            )
    if teacher.get("quantization", "none") != "none":
        footnotes.append(
            "KL to teacher is computed without quantization, while training quantizes the teacher "
            f"to {teacher['quantization']}."
        )
    return footnotes


def headline(summary: RunSummary) -> str:
    """The result in one or two sentences."""
    if summary.results is None:
        return "No result yet: this run has not been evaluated."
    models, benchmark = summary.results["models"], summary.main_benchmark
    rouge = {
        model: entry["benchmarks"][benchmark]["rouge_l"]
        for model, entry in models.items()
        if benchmark in entry["benchmarks"]
    }
    sentences = []
    if "student" in rouge:
        before = f"{rouge['initial']:.1f} before" if "initial" in rouge else ""
        if rouge.get("teacher"):
            text = (
                f"The student reaches {100 * rouge['student'] / rouge['teacher']:.0f}% of the "
                f"teacher's ROUGE-L on {benchmark} ({rouge['student']:.1f} of "
                f"{rouge['teacher']:.1f}"
            )
            text += f"; {before})" if before else ")"
        else:
            text = f"The student's ROUGE-L on {benchmark} is {rouge['student']:.1f}"
            text += f" ({before})" if before else ""
        sentences.append(text + ".")
    loss = {name: entry["loss"] for name, entry in models.items() if entry.get("loss") is not None}
    if "student" in loss:
        text = f"Its held-out loss is {loss['student']:.2f} nats per token"
        labels = {"initial": "before", "teacher": "for the teacher"}
        context = [f"{loss[name]:.2f} {label}" for name, label in labels.items() if name in loss]
        sentences.append(text + (f" ({', '.join(context)})" if context else "") + ".")
    return " ".join(sentences) or "The student was not evaluated."


def benchmark_rows(summary: RunSummary) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Header, and (model, benchmark, cells): all measures of each model on each benchmark, and an
    interval over items. Measures that no model has are left out.
    """
    results = summary.results or {}
    entries = [
        (benchmark, model, results["models"][model]["benchmarks"][benchmark.name])
        for benchmark in summary.benchmarks
        for model in benchmark.intervals
    ]
    measures = [
        measure
        for measure in MEASURES
        if any(_lookup(entry, measure[1]) is not None for _, _, entry in entries)
    ]
    names = [name for name, _, _ in measures]
    header = ["benchmark", "model", "items", "ROUGE-L", "95% interval", *names]
    rows = []
    for benchmark, model, entry in entries:
        low, high = benchmark.intervals[model]
        cells = [
            benchmark.name,
            MODEL_LABELS[model],
            f"{entry['samples']:,}",
            format_score(entry),
            f"{low:.2f} to {high:.2f}",
            *(format_number(_lookup(entry, path), digits) for _, path, digits in measures),
        ]
        rows.append((model, benchmark.name, cells))
    return header, rows


def training_sentence(summary: RunSummary) -> str:
    """Optimizer steps, ranks, padding and loss spikes of a finished training."""
    info = summary.train_info
    if "padding_share" not in info:
        return ""
    share = f"{100 * info['padding_share']:.0f}% of their tokens"
    ranks = "1 rank" if info["ranks"] == 1 else f"{info['ranks']} ranks"
    if own := info.get("teacher_ranks"):
        ranks += f", and the teacher on {'1 rank' if own == 1 else f'{own} ranks'} of its own"
    padding = (
        f"packed without padding, which would be {share}"
        if info["packed"]
        else f"padded; padding is {share}"
    )
    text = f"{info['steps']:,} optimizer steps on {ranks}. Micro-batches were {padding}."
    if info.get("skipped_steps"):
        text += f" {info['skipped_steps']} steps were skipped because of non-finite values."
    return text + _speed_sentence(summary) + _spike_sentence(summary)


def _speed_sentence(summary: RunSummary) -> str:
    """Tokens per second of a rank, MFU, the parts of a step, and the load imbalance, each the
    median of all steps.
    """
    if summary.curves is None:
        return ""
    steps = summary.curves.steps
    seconds = {column: np.median(steps[column]) for column in ("seconds", *STEP_PARTS)}
    rate = np.median(steps["tokens_per_second_per_rank"])
    if not np.isfinite([rate, *seconds.values()]).all():
        return ""  # an older run
    parts = ", ".join(
        f"{column.removesuffix('_seconds')} {100 * seconds[column] / seconds['seconds']:.0f}%"
        for column in STEP_PARTS
    )
    mfu = np.median(steps["mfu"])
    utilization = f" at {100 * mfu:.0f}% MFU" if np.isfinite(mfu) else ""
    text = f" A rank processed {rate:,.0f} tokens per second{utilization}; of a step: {parts}."
    imbalance = np.median(steps["load_imbalance"])
    if np.isfinite(imbalance):
        text += f" The load imbalance of the ranks was {imbalance:.2f}."
    return text


def plan_rows(
    plan: dict[str, Any], visits: Sequence[float] | None
) -> tuple[list[str], list[list[str]]]:
    """Header and one row per stage. visits: mean visits of a sample of each subset."""
    header = ["stage", "samples", "epochs", "optimizer steps", "temperature", "SFT ratio"]
    rows = [
        [
            str(stage["index"] + 1),
            f"{stage['stop'] - stage['start']:,}",
            str(stage["epochs"]),
            f"{stage['steps']:,}",
            f"{stage['temperature']:.3g}",
            f"{stage['sft_ratio']:.3g}",
        ]
        for stage in plan["stages"]
    ]
    if visits:
        header.append("visits of its subset")
        for row, stage in zip(rows, plan["stages"], strict=True):
            row.append(f"{visits[stage['index']]:.1f}")
    return header, rows


def mean_visits(summary: RunSummary) -> list[float] | None:
    """Mean visits of a sample of each subset."""
    if summary.plan is None or summary.sample_visits is None:
        return None
    ends = summary.plan["subset_ends"]
    return [float(summary.sample_visits[start:end].mean()) for start, end in pairwise([0, *ends])]


def package_versions(summary: RunSummary) -> dict[str, str]:
    """Package versions of training, or else of the first finished step."""
    manifest = summary.manifests.get("train") or next(iter(summary.manifests.values()), None)
    return dict(manifest.versions) if manifest else {}


def _lookup(entry: dict[str, Any], path: Sequence[str]) -> float | None:
    """A number in a benchmark's results, None if it is not there."""
    value: Any = entry
    for key in path:
        value = None if value is None else value.get(key)
    return None if value is None else float(value)


def _spike_sentence(summary: RunSummary) -> str:
    """The optimizer steps at which the loss jumped."""
    if summary.curves is None:
        return ""
    columns, detector = summary.curves.steps, LossSpikes()
    spikes = [
        f"{step:.0f}"
        for step, loss, stage in zip(
            columns["step"], columns["loss"], columns["stage"], strict=True
        )
        if detector.update(float(loss), int(stage)) is not None
    ]
    if not spikes:
        return ""
    steps = ", ".join(spikes[:MAX_SPIKES]) + (" and others" if len(spikes) > MAX_SPIKES else "")
    return f" The loss spiked at {len(spikes)} optimizer steps: {steps}."
