"""Answers that are right or wrong (`verify` of a benchmark): the number that an answer ends with,
or code that passes tests.

The verdicts are separate files, one line an item, with their manifests.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.thought_spans import answer_of
from pocl_ds.errors import ArtifactError, DataError
from pocl_ds.evaluation.answers import answers_file, answers_manifest, read_answers
from pocl_ds.evaluation.code_sandbox import LIMITS, check_sandbox, run_tests
from pocl_ds.metrics.numbers import last_number
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import Manifest, fingerprint, read_part, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

# A block of Markdown; the end of an answer ends an open one.
CODE_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
VERSION = 1  # of the rules below; another one verifies answers again


def check_sandboxed_benchmarks(config: EvaluateConfig) -> None:
    """Raise ResourceError if a benchmark needs a sandbox for code and there is none here."""
    if any(benchmark.verify == "code" for benchmark in config.benchmarks.values()):
        check_sandbox()


def check_references(config: EvaluateConfig, name: str, samples: Sequence[Sample]) -> None:
    """Raise DataError if an item has no reference that an answer could be verified by."""
    if config.benchmarks[name].verify != "number":
        return
    for sample in samples:
        texts = list(sample.references)
        if config.span == "answer":
            texts = [answer_of(text, prompt_opens_thought=False)[0] for text in texts]
        if all(last_number(text) is None for text in texts):
            raise DataError(
                f"benchmark {name}, {sample.label}: the reference "
                f"{sample.references[0][:60]!r} has no number, and verify=number needs one: "
                "correct it, or remove the item"
            )


def verification_file(run: RunDirectory, model: str, benchmark: str, seed: int) -> Path:
    """The file that says which of a model's answers are correct."""
    return run.evaluation / model / "verified" / f"{benchmark}-seed{seed}.jsonl"


def verification_manifest(file: Path) -> Manifest | None:
    """The manifest of such a file; None if that is unfinished or damaged."""
    return read_part(file.parent, f"{file.name}.manifest.json")


def verify_answers(run: RunDirectory, config: EvaluateConfig, models: Sequence[str]) -> None:
    """Verify the answers of these models to all benchmarks with `verify`.

    Writes evaluation/MODEL/verified/BENCHMARK-seedS.jsonl with one line per item: id, correct, and
    what is wrong (null for a correct answer). Finished files are reused. Raises ResourceError if
    there is no sandbox for code, ArtifactError if answers are missing.
    """
    for name, benchmark in config.benchmarks.items():
        for model in models if benchmark.verify else ():
            for seed in config.seeds:
                _verify_file(run, model, name, seed, str(benchmark.verify))


def summarize_verification(
    run: RunDirectory, config: EvaluateConfig, model: str, benchmark: str
) -> dict[str, Any]:
    """Percentage of correct answers: mean, standard deviation over seeds (n - 1), and by seed.
    Empty if the benchmark is not verified.
    """
    if config.benchmarks[benchmark].verify is None:
        return {}
    files = [verification_file(run, model, benchmark, seed) for seed in config.seeds]
    shares = [100 * statistics.fmean(read_verification(file).values()) for file in files]
    return {
        "correct": statistics.fmean(shares),
        "correct_deviation": statistics.stdev(shares) if len(shares) > 1 else None,
        "correct_by_seed": shares,
    }


def read_verification(file: Path) -> dict[str, bool]:
    """Item id -> whether the answer is correct. Raises ArtifactError if the file is missing,
    unfinished or damaged.
    """
    if verification_manifest(file) is None:
        raise ArtifactError(
            f"{file} is missing, unfinished or damaged: run `pocl evaluate` with `verify` of the "
            "benchmark first"
        )
    with file.open(encoding="utf-8") as stream:
        records = [json.loads(line) for line in stream]
    return {record["id"]: bool(record["correct"]) for record in records}


def number_fault(answer: str, references: Sequence[str]) -> str | None:
    """What is wrong with an answer that should end with the number of a reference; else None."""
    number = last_number(answer)
    if number is None:
        return "no number"
    return None if number in map(last_number, references) else f"another number ({number})"


def code_fault(answer: str, tests: Sequence[str]) -> str | None:
    """What is wrong with code that should pass all tests; else None. Runs the code."""
    return run_tests(code_of(answer), "\n".join(tests))


def code_of(answer: str) -> str:
    """The longest block of code in an answer; all of it if it has no block."""
    return max(CODE_BLOCK.findall(answer), key=len, default=answer)


def _verify_file(run: RunDirectory, model: str, benchmark: str, seed: int, kind: str) -> None:
    source, file = (path(run, model, benchmark, seed) for path in (answers_file, verification_file))
    records, manifest = read_answers(source), answers_manifest(source)
    expected = fingerprint(
        [VERSION, kind, LIMITS if kind == "code" else {}, manifest and manifest.files]
    )
    finished = verification_manifest(file)
    if finished and finished.fingerprint == expected:
        return

    def verify(record: dict[str, Any]) -> str | None:
        answer = record.get("answer", record["response"])
        references = record.get("reference_answers", record["references"])
        return (number_fault if kind == "number" else code_fault)(answer, references)

    # Programs run side by side, each in its own process.
    pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    faults: list[str | None] = []
    try:
        with Progress(len(records), "answers", f"verify {model} {benchmark}") as progress:
            for fault in pool.map(verify, records):
                faults.append(fault)
                progress.advance(seed=seed)
    finally:
        pool.shutdown(cancel_futures=True)
    with atomic_write(file) as stream:
        for record, fault in zip(records, faults, strict=True):
            line = {"id": record["id"], "correct": fault is None, "fault": fault}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = Counter(fault.partition(" (")[0] for fault in faults if fault is not None)
    info = {
        "verify": kind,
        "items": len(faults),
        "correct": faults.count(None),
        "faults": dict(counts),
    }
    name = f"{file.name}.manifest.json"
    write_manifest(file.parent, "verify", expected, files=[file], name=name, info=info)
    log.info(
        "verify %s %s seed=%d: %d of %d answers are correct%s",
        model,
        benchmark,
        seed,
        faults.count(None),
        len(faults),
        "".join(f", {count} {fault}" for fault, count in counts.most_common()),
    )
