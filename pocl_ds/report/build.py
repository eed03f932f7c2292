"""The stage `report`: report/report.html and report/report.md from a run's artifacts."""

from __future__ import annotations

import logging

from pocl_ds.config import ReportConfig
from pocl_ds.config.yaml_io import plain_value
from pocl_ds.report.markdown import markdown_page
from pocl_ds.report.page import html_page
from pocl_ds.report.run_summary import read_facts
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import Manifest, damaged_files, read_manifest, write_manifest
from pocl_ds.workflow.manifest import fingerprint as result_digest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

PAGE, TEXT = "report.html", "report.md"


def build_report(
    run: RunDirectory, config: ReportConfig, *, recipe_yaml: str, fingerprint: str
) -> Manifest:
    """Write both pages. Parts that the run lacks are left out, and named; a report of a run that
    went on is built anew.

    Raises ArtifactError where a finished artifact is damaged.
    """
    recipe = plain_value(recipe_yaml)
    facts = read_facts(
        run, config, seed=int(recipe["seed"]), window=int(recipe["train"]["length_window"])
    )
    inputs = {
        stage: result_digest([found.fingerprint, found.files])
        for stage, found in facts.manifests.items()
    }
    inputs["steps"] = str(0 if facts.curves is None else len(facts.curves.steps["step"]))
    inputs["attempts"] = str(
        [
            (attempt["label"], attempt["number"], attempt["end"])
            for attempt in facts.history.attempts
        ]
    )
    done = read_manifest(run.report)
    if (
        done
        and done.fingerprint == fingerprint
        and done.info.get("inputs") == inputs
        and not damaged_files(run.report, done)
    ):
        return done
    name = str(recipe["name"])
    page = html_page(facts, name=name, recipe_yaml=recipe_yaml)
    text = markdown_page(facts, name=name, recipe_yaml=recipe_yaml, examples=config.num_examples)
    for file, content in ((PAGE, page), (TEXT, text)):
        with atomic_write(run.report / file) as stream:
            stream.write(content)
    for sentence in facts.missing:
        log.info("report: %s", sentence)
    info = {
        "inputs": inputs,
        "missing": facts.missing,
        "examples": len(facts.examples(config.num_examples)),
        "samples": len(facts.samples.rows) if facts.samples else 0,
        "bytes": len(page.encode()),
    }
    files = [run.report / PAGE, run.report / TEXT]
    return write_manifest(run.report, "report", fingerprint, info=info, files=files)
