"""The stage `evaluate` (METHOD 5): answers by benchmark and seed, held-out loss and KL, and the table of results.

Each part is a file with a manifest of its own, so an interrupted evaluation repeats only what is missing, and another
model or seed adds to what is there.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from pocl_ds.artifacts import (
    Manifest,
    RunDirectory,
    atomic_write,
    fingerprint,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from pocl_ds.config import EvaluateConfig, PromptConfig, lasting
from pocl_ds.data.encode import EncodedSplit, Encoder
from pocl_ds.data.samples import Sample, read_normalised, read_samples
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluate.benchmarks import check_names, chosen, split_ids
from pocl_ds.evaluate.held_out import held_out as measure
from pocl_ds.generation.open import open_generator
from pocl_ds.generation.protocol import Sampling
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.metrics.text import exact_match, repetition_rate
from pocl_ds.models.load import load_tokenizer
from pocl_ds.tracking import Progress

log = logging.getLogger("pocl_ds")

HELD_OUT, RESULTS = "held_out.json", "results.json"
# Prompts handed to the engine at once, in units of its sequences in flight: enough to keep it full, few enough for
# progress to be seen.
ROUNDS = 4


def model_path(run: RunDirectory, model: str) -> str:
    """Where a model of the run lies: teacher, initial, student or baseline. Raises ArtifactError where it is not there yet."""
    if model in ("teacher", "initial"):
        path = read_json(run.models / "models.json")["teacher" if model == "teacher" else "student"]
        if path is None:
            raise ArtifactError("this recipe has no teacher: leave it out of evaluate.models")
        return str(path)
    folder = (run.train if model == "student" else run.baseline) / "final"
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is missing: run `pocl {'train' if model == 'student' else 'baseline'}` first")
    return str(folder)


def answer(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    *,
    model: str,
    path: str,
    threads: int | None = None,
) -> None:
    """Let one model answer every benchmark with every seed that is not answered yet; one engine serves all.

    Writes evaluation/MODEL/BENCHMARK-seedS.jsonl with the score of each item.
    """
    check_names(config.benchmarks)
    tokenizer = load_tokenizer(path)
    encoder = Encoder(tokenizer, prompt)
    asked = {name: _questions(run, source, config.samples) for name, source in config.benchmarks.items()}
    prints = {
        (name, seed): fingerprint([_identity(path), lasting(config.generation), lasting(prompt), config.temperature,
                                   config.top_p, config.max_new_tokens, seed, [s.to_json() for s in samples]])
        for name, samples in asked.items() for seed in config.seeds
    }  # fmt: skip
    todo = [key for key in prints if not _answered(run, model, *key, prints[key])]
    if not todo:
        return
    generator = open_generator(
        path, config.generation, tokenizer, max_length=max(prompt.max_length, prompt.max_prompt_tokens + config.max_new_tokens),
        threads=threads, instead="evaluate.generation.backend=transformers",
    )
    try:
        with Progress(sum(len(asked[name]) for name, _ in todo), "answers", f"evaluate {model}") as progress:
            for name, seed in todo:
                start = time.monotonic()
                file = answers_file(run, model, name, seed)
                size = ROUNDS * config.generation.max_sequences
                with atomic_write(file) as stream:
                    for first in range(0, len(asked[name]), size):
                        part = asked[name][first : first + size]
                        sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens, seed=seed, first=first)
                        texts = generator.generate([encoder.prompt(sample) for sample in part], sampling)
                        for sample, text in zip(part, texts, strict=True):
                            record = {
                                "id": sample.id, "prompt": encoder.template.text(sample), "instruction": sample.instruction,
                                "response": text, "references": sample.references,
                                "rouge_l": rouge_l(text, sample.references),
                                "exact_match": exact_match(text, sample.references),
                            }  # fmt: skip
                            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                        progress.advance(len(part), benchmark=name, seed=seed)
                seconds = time.monotonic() - start
                write_manifest(
                    file.parent, "answers", prints[name, seed], files=[file], name=f"{file.name}.manifest.json",
                    info={"seconds": seconds, "answers_per_second": len(asked[name]) / seconds},
                )
    finally:
        generator.close()


def answers_file(run: RunDirectory, model: str, benchmark: str, seed: int) -> Path:
    """Where the answers of one model to one benchmark with one seed lie."""
    return run.evaluation / model / f"{benchmark}-seed{seed}.jsonl"


def held_out(run: RunDirectory, config: EvaluateConfig, paths: dict[str, str], *, threads: int | None = None) -> None:
    """Loss a token on data/test, and KL(teacher || model) a token where there is a teacher: see `held_out.held_out`."""
    split = EncodedSplit.open(run.data, "test")
    if not config.loss or not len(split):
        return
    ids = split_ids(split)
    stamp = fingerprint([{name: _identity(path) for name, path in paths.items()}, config.generation.dtype,
                         [ids[row] for row in chosen(ids, config.samples)]])  # fmt: skip
    measure(run, config, paths, fingerprint=stamp, threads=threads)


def summarise(run: RunDirectory, config: EvaluateConfig, models: list[str], *, fingerprint: str) -> dict[str, Any]:
    """Gather evaluation/results.json: by model and benchmark the mean and deviation over seeds. Seals the stage."""
    losses = read_json(run.evaluation / HELD_OUT) if config.loss and (run.evaluation / HELD_OUT).is_file() else {}
    results: dict[str, Any] = {"seeds": list(config.seeds), "models": {}}
    seconds = 0.0
    for model in models:
        entry: dict[str, Any] = dict(losses.get(model, {}))
        entry["benchmarks"] = {}
        for benchmark in config.benchmarks:
            runs = [_read_answers(answers_file(run, model, benchmark, seed)) for seed in config.seeds]
            entry["benchmarks"][benchmark] = _statistics(runs)
            for seed in config.seeds:
                file = answers_file(run, model, benchmark, seed)
                manifest = read_manifest(file.parent, f"{file.name}.manifest.json")
                seconds += manifest.info["seconds"] if manifest else 0
        results["models"][model] = entry
    write_json(run.evaluation / RESULTS, results)
    write_manifest(run.evaluation, "evaluate", fingerprint, files=[run.evaluation / RESULTS], info={"seconds": seconds})
    return results


def _questions(run: RunDirectory, source: str, limit: int | None) -> list[Sample]:
    """A benchmark's samples: at most `limit`, chosen by the hash of their ids, so that a cut does not follow a file's order."""
    samples = list(read_normalised(run.data / "test.jsonl") if source == "test" else read_samples(source))
    if not samples:
        raise ArtifactError(f"benchmark {source!r} holds no samples: give data.test_fraction or evaluate.benchmarks")
    return [samples[position] for position in chosen([sample.id for sample in samples], limit)]


def _identity(path: str) -> Any:
    """What tells one model folder from another: names, sizes and times of its weight files; a Hub name itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _answered(run: RunDirectory, model: str, benchmark: str, seed: int, stamp: str) -> bool:
    file = answers_file(run, model, benchmark, seed)
    manifest: Manifest | None = read_manifest(file.parent, f"{file.name}.manifest.json")
    return manifest is not None and manifest.fingerprint == stamp and file.is_file()


def _read_answers(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl evaluate --model {path.parent.name}` first")
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _statistics(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, ROUGE-L and exact match times 100."""
    rouge = [100 * statistics.fmean(record["rouge_l"] for record in records) for records in runs]
    exact = [100 * statistics.fmean(record["exact_match"] for record in records) for records in runs]
    texts = [record["response"] for records in runs for record in records]
    return {
        "samples": len(runs[0]),
        "rouge_l": statistics.fmean(rouge),
        "rouge_l_deviation": statistics.stdev(rouge) if len(rouge) > 1 else None,
        "rouge_l_by_seed": rouge,
        "exact_match": statistics.fmean(exact),
        "words": statistics.fmean(len(text.split()) for text in texts),
        "repetition_rate": statistics.fmean(repetition_rate(text) for text in texts),
    }
