"""Texts that both pages share: the headline, cells of tables, and what makes foreign text harmless."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pocl_ds.metrics.footnotes import mark_benchmark
from pocl_ds.report.history import Spent
from pocl_ds.report.run_summary import MODELS, Facts
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.runtime.loss_spikes import LossSpikes

ABSENT = "–"
# Of a benchmark's results beside ROUGE-L: what a reader calls it, where it stands, and its
# decimals.
MEASURES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("exact match", ("exact_match",), 1),
    ("words", ("words",), 1),
    ("repetition", ("repetition_rate",), 2),
    ("distinct-1", ("distinct_1",), 2),
    ("distinct-2", ("distinct_2",), 2),
    ("loss/token", ("loss",), 3),
    ("KL to teacher", ("kl",), 3),
    ("judge", ("judge", "mean"), 2),
)
# What a page cannot hold: control characters, and halves of surrogate pairs, which JSON allows and
# UTF-8 does not.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def escaped(text: object) -> str:
    """Any text as HTML text or attribute."""
    return html.escape(UNPRINTABLE.sub("\ufffd", str(text)), quote=True)


def markdown_cell(text: object) -> str:
    """Any text as one cell of a Markdown table: literal, on one line, without links, images or
    tags.
    """
    plain = UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))
    plain = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(plain, quote=False))
    return re.sub(r"(https?):", r"\1&#58;", plain).replace("\n", "<br>")


def size(count: int | None) -> str:
    """Bytes as a person writes them: 3.4 GiB."""
    if count is None:
        return ABSENT
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def spent_rows(spent: list[Spent]) -> list[list[str]]:
    """Stage, time, processes, and the peak memory of one of them on host and GPU."""
    return [
        [
            one.stage,
            format_duration(one.seconds),
            str(one.processes),
            size(one.host_bytes),
            size(one.device_bytes),
        ]
        for one in spent
    ]


def about_rows(facts: Facts, recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What was distilled with what, and what that took, as far as the run knows."""
    part = {
        name: recipe.get(name) or {}
        for name in ("student", "teacher", "loss", "policy", "data", "ranking")
    }
    rows = [
        ("student", part["student"].get("model")),
        ("teacher", part["teacher"].get("model")),
        ("data", part["data"].get("source")),
        ("loss", part["loss"].get("name")),
        ("responses", part["policy"].get("name")),
        ("order", part["ranking"].get("strategy")),
    ]
    if facts.plan is not None:
        stages = facts.plan["stages"]
        rows.append(
            (
                "curriculum",
                f"{stages[-1]['stop']:,} samples in {len(stages)} subsets, "
                f"{sum(stage['steps'] for stage in stages):,} steps of {facts.plan['batch_size']} "
                f"samples",
            )
        )
    if facts.spent:
        hours = sum(one.seconds * one.processes for one in facts.spent) / 3600
        rows.append(
            ("cost", "under 0.01 process hours" if hours < 0.01 else f"{hours:,.2f} process hours")
        )
    if facts.history.attempts:
        rows.append(
            (
                "jobs",
                f"{facts.history.node_hours:.2f} node hours, {facts.history.restarts} restarts",
            )
        )
    return [(name, str(value)) for name, value in rows if value]


def results_rows(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Header, and (model, cells) for each model: loss and KL in nats per token, ROUGE-L x100 by
    benchmark.
    """
    models = [name for name in MODELS if name in results["models"]]
    benchmarks = list(
        dict.fromkeys(name for model in models for name in results["models"][model]["benchmarks"])
    )
    entries = {model: results["models"][model] for model in models}
    measures = [
        key
        for key in ("loss", "kl")
        if any(entry.get(key) is not None for entry in entries.values())
    ]
    names = {"loss": "held-out loss (nats/token)", "kl": "KL to teacher (nats/token)"}
    header = [
        "model",
        *(names[key] for key in measures),
        *(f"ROUGE-L, {marked(name, results)}" for name in benchmarks),
    ]
    rows = []
    for model, entry in entries.items():
        cells = [MODELS[model], *(number(entry.get(key), 3) for key in measures)]
        rows.append(
            (model, cells + [_spread(entry["benchmarks"].get(name)) for name in benchmarks])
        )
    return header, rows


def kl_lines(results: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> list[str]:
    """Where "KL to teacher" in the results is not to what training asked."""
    teacher = recipe.get("teacher") or {}
    if all(entry.get("kl") is None for entry in (results or {"models": {}})["models"].values()):
        return []
    found = []
    if teacher.get("ensemble"):
        found.append(
            f"KL to teacher is to {teacher['model']} alone, not to the mixture of "
            f"{1 + len(teacher['others'])} that "
            "training asked."
        )
    if teacher.get("quantization", "none") != "none":
        found.append(
            f"KL to teacher is to the teacher as its model is, not quantised to "
            f"{teacher['quantization']} as training "
            "asked it."
        )
    return found


def headline(facts: Facts) -> str:
    """The result in one or two sentences, as far as the run has come."""
    if facts.results is None:
        return "No result yet: this run has not been evaluated."
    models = facts.results["models"]
    rouge = {
        name: entry["benchmarks"][facts.benchmark]["rouge_l"]
        for name, entry in models.items()
        if facts.benchmark in entry["benchmarks"]
    }
    sentences = []
    if "student" in rouge:
        if rouge.get("teacher"):
            text = (
                f"The student reaches {100 * rouge['student'] / rouge['teacher']:.0f}% of the "
                f"teacher's ROUGE-L on "
                f"{facts.benchmark} ({rouge['student']:.1f} of {rouge['teacher']:.1f}"
            )
            text += f"; {rouge['initial']:.1f} before)" if "initial" in rouge else ")"
        else:
            text = f"The student's ROUGE-L on {facts.benchmark} is {rouge['student']:.1f}"
            text += f" ({rouge['initial']:.1f} before)" if "initial" in rouge else ""
        sentences.append(text + ".")
    loss = {name: entry["loss"] for name, entry in models.items() if entry.get("loss") is not None}
    if "student" in loss:
        text = f"Its held-out loss is {loss['student']:.2f} nats per token"
        beside = (("initial", "before"), ("teacher", "for the teacher"))
        others = [f"{loss[name]:.2f} {word}" for name, word in beside if name in loss]
        sentences.append(text + (f" ({', '.join(others)})" if others else "") + ".")
    return " ".join(sentences) or "The student itself was not among the models that were evaluated."


def detail_rows(facts: Facts) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Header, and (model, benchmark, cells): each benchmark's numbers for each model, with an
    interval over its items.

    A measure that no model has is left out.
    """
    found = [
        (benchmark, model, (facts.results or {})["models"][model]["benchmarks"][benchmark.name])
        for benchmark in facts.benchmarks
        for model in benchmark.intervals
    ]
    measures = [
        one
        for one in MEASURES
        if any(_measured(entry, one[1]) is not None for _, _, entry in found)
    ]
    header = [
        "benchmark",
        "model",
        "items",
        "ROUGE-L",
        "95% interval",
        *(name for name, _, _ in measures),
    ]
    rows = []
    for benchmark, model, entry in found:
        low, high = benchmark.intervals[model]
        rows.append(
            (
                model,
                benchmark.name,
                [
                    benchmark.name,
                    MODELS[model],
                    f"{entry['samples']:,}",
                    _spread(entry),
                    f"{low:.2f} to {high:.2f}",
                    *(number(_measured(entry, keys), digits) for _, keys, digits in measures),
                ],
            )
        )
    return header, rows


def _measured(entry: dict[str, Any], keys: Sequence[str]) -> float | None:
    """A number of a benchmark's results, None where it is not there."""
    found: Any = entry
    for key in keys:
        found = None if found is None else found.get(key)
    return None if found is None else float(found)


def training_line(facts: Facts) -> str:
    """How the samples lay in micro-batches, as far as training recorded it."""
    info = facts.manifests["train"].info if "train" in facts.manifests else {}
    if "padding_share" not in info:
        return ""
    share = f"{100 * info['padding_share']:.0f}% of their tokens"
    ranks = "1 rank" if info["ranks"] == 1 else f"{info['ranks']} ranks"
    lay = (
        f"packed without padding, which would be {share}"
        if info["packed"]
        else f"padded; padding is {share}"
    )
    left_out = (
        f" {info['skipped_steps']} were left out, for numbers that were not finite."
        if info.get("skipped_steps")
        else ""
    )
    return f"{info['steps']:,} steps on {ranks}; micro-batches were {lay}.{left_out}" + _spikes(
        facts
    )


def _spikes(facts: Facts) -> str:
    """The steps whose loss jumped, at most a few of them by number."""
    if facts.curves is None:
        return ""
    columns, spikes = facts.curves.steps, LossSpikes()
    rows = zip(columns["step"], columns["loss"], columns["stage"], strict=True)
    found = [
        f"{step:.0f}"
        for step, loss, stage in rows
        if spikes.update(float(loss), int(stage)) is not None
    ]
    named = ", ".join(found[:8]) + (" and others" if len(found) > 8 else "")
    return f" The loss spiked at {len(found)} steps: {named}." if found else ""


def plan_rows(
    plan: dict[str, Any], seen: Sequence[float] | None
) -> tuple[list[str], list[list[str]]]:
    """Header and one row a stage. seen: mean draws of a sample of each subset."""
    header = [
        "stage",
        "samples",
        "epochs",
        "steps",
        "temperature",
        "SFT ratio",
        *(["its subset was seen"] if seen else []),
    ]
    rows = [
        [
            str(stage["index"] + 1),
            f"{stage['stop'] - stage['start']:,}",
            str(stage["epochs"]),
            f"{stage['steps']:,}",
            f"{stage['temperature']:.3g}",
            f"{stage['sft_ratio']:.3g}",
            *([f"{seen[stage['index']]:.1f} times"] if seen else []),
        ]
        for stage in plan["stages"]
    ]
    return header, rows


def mean_seen(facts: Facts) -> list[float] | None:
    """How often a sample of each subset was drawn, on average."""
    if facts.plan is None or facts.seen is None:
        return None
    stops = [int(stage["stop"]) for stage in facts.plan["stages"]]
    return [float(facts.seen[a:b].mean()) for a, b in pairwise([0, *stops])]


def versions(facts: Facts) -> dict[str, str]:
    """Packages of the run: those of training, else of the first finished stage."""
    manifest = facts.manifests.get("train") or next(iter(facts.manifests.values()), None)
    return dict(manifest.versions) if manifest else {}


def number(value: float | None, digits: int) -> str:
    """Fixed decimals, or a dash."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def _spread(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ABSENT
    deviation = entry.get("rouge_l_deviation")
    return number(entry["rouge_l"], 2) + ("" if deviation is None else f" ± {deviation:.2f}")
