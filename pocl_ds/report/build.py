"""The step `report`: report/report.html and report/report.md of a run."""

from __future__ import annotations

import logging

from pocl_ds.config import ReportConfig
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.report.markdown import markdown_page
from pocl_ds.report.page import html_page
from pocl_ds.report.run_summary import RunSummary, read_run_summary
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import Manifest, damaged_files, read_manifest, write_manifest
from pocl_ds.workflow.manifest import fingerprint as digest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def build_report(
    run: RunDirectory, config: ReportConfig, *, recipe_yaml: str, fingerprint: str
) -> Manifest:
    """Write both pages, unless they are up to date. Missing parts of the run are named.

    Raises:
        ArtifactError: a finished result is damaged.
    """
    recipe = parse_yaml(recipe_yaml)
    summary = read_run_summary(
        run, config, seed=int(recipe["seed"]), window=int(recipe["train"]["length_window"])
    )

    # Reuse the report if the run has not changed since.
    inputs = _input_digests(summary)
    finished = read_manifest(run.report)
    if (
        finished
        and finished.fingerprint == fingerprint
        and finished.info.get("inputs") == inputs
        and not damaged_files(run.report, finished)
    ):
        return finished

    # Create both pages before writing either, so that an error leaves the old ones.
    name = str(recipe["name"])
    html = html_page(summary, name=name, recipe_yaml=recipe_yaml)
    markdown = markdown_page(
        summary, name=name, recipe_yaml=recipe_yaml, num_examples=config.num_examples
    )
    for file, content in ((HTML_FILE, html), (MARKDOWN_FILE, markdown)):
        with atomic_write(run.report / file) as stream:
            stream.write(content)
    for sentence in summary.missing:
        log.info("report: %s", sentence)
    info = {
        "inputs": inputs,
        "missing": summary.missing,
        "examples": len(summary.examples(config.num_examples)),
        "samples": len(summary.samples.rows) if summary.samples else 0,
        "bytes": len(html.encode()),
    }
    files = [run.report / HTML_FILE, run.report / MARKDOWN_FILE]
    return write_manifest(run.report, "report", fingerprint, info=info, files=files)


def _input_digests(summary: RunSummary) -> dict[str, str]:
    """What identifies the state of the run: finished steps, optimizer steps, ranked stages, job
    attempts.
    """
    inputs = {
        step: digest([manifest.fingerprint, manifest.files])
        for step, manifest in summary.manifests.items()
    }
    inputs["steps"] = str(0 if summary.curves is None else len(summary.curves.steps["step"]))
    inputs["ranked_stages"] = str([ranking.stage for ranking in summary.stage_rankings])
    inputs["attempts"] = str(
        [(entry["label"], entry["number"], entry["end"]) for entry in summary.history.attempts]
    )
    return inputs
