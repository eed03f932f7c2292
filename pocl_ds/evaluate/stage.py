"""The evaluation stage: answers of each model, then held-out measures, then one table (METHOD 5).

Every (model, benchmark, seed) is a file with a manifest of its own, so an interrupted evaluation repeats only what is
unfinished. One vLLM engine lives in a process: the pipeline starts one process a model.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.artifacts import (
    RunDirectory,
    atomic_write,
    damaged_files,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.data.encode import Encoder
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluate.benchmarks import Question, check_names, load_questions, source_digest
from pocl_ds.evaluate.tables import table
from pocl_ds.generation import open_generator
from pocl_ds.generation.protocol import Generator, Sampling
from pocl_ds.metrics.rouge import rouge_l_many
from pocl_ds.metrics.text import exact_match, repetition_rate
from pocl_ds.models.load import load_tokenizer
from pocl_ds.tracking import Progress

log = logging.getLogger("pocl_ds")

# Prompts handed to the engine at once, in units of its sequences in flight: large enough to keep it full, small enough
# for progress to be seen.
ROUNDS = 4

HELD_OUT_RESULT = "held_out"


def answer(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    *,
    model: str,
    model_path: str,
    tokenizer_path: str,
    fingerprint: str,
    threads: int | None = None,
) -> None:
    """One model answers every benchmark under every seed: evaluation/{model}/{benchmark}-seed{seed}.jsonl.

    model: `teacher`, `initial`, `student` or `baseline`. Finished results are kept; where all are, no model is loaded.
    Raises DataError for a benchmark that cannot be read.
    """
    left = unfinished(run, config, model=model, fingerprint=fingerprint)
    if not left:
        log.info("answers of the %s are there already", model)
        return
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = functools.cache(lambda: Encoder(tokenizer, prompt))
    questions = {
        name: load_questions(run, name, config.benchmarks[name], encoder, config.samples)
        for name in dict.fromkeys(name for name, _ in left)
    }
    total = sum(len(questions[name]) for name, _ in left)
    max_length = prompt.max_prompt_tokens + config.max_new_tokens
    generator = open_generator(model_path, config.generation, tokenizer, max_length=max_length, threads=threads)
    try:
        with Progress(total, "answers", f"evaluate {model}") as progress:
            for name, seed in left:
                _answer_one(run, config, generator, questions[name], (model, name, seed), fingerprint, progress, tokenizer)
    finally:
        generator.close()


def unfinished(run: RunDirectory, config: EvaluateConfig, *, model: str, fingerprint: str) -> list[tuple[str, int]]:
    """The (benchmark, seed) pairs that a model has not answered yet under this fingerprint."""
    check_names(config.benchmarks)
    left = []
    for name, source in config.benchmarks.items():
        digest = source_digest(run, source)
        for seed in config.seeds:
            manifest = read_manifest(run.evaluation / model, _manifest_name(name, seed))
            current = manifest is not None and manifest.fingerprint == fingerprint and manifest.info.get("source") == digest
            if manifest is None or not current or damaged_files(run.evaluation / model, manifest, checksums=False):
                left.append((name, seed))
    return left


def _answer_one(
    run: RunDirectory,
    config: EvaluateConfig,
    generator: Generator,
    questions: list[Question],
    key: tuple[str, str, int],
    fingerprint: str,
    progress: Progress,
    tokenizer: Any,
) -> None:
    """Generate and write one (model, benchmark, seed)."""
    model, name, seed = key
    start = time.monotonic()
    directory = run.evaluation / model
    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens, seed)
    path = directory / f"{name}-seed{seed}.jsonl"
    sums = 0.0
    with atomic_write(path) as stream:
        for part in _parts(questions, ROUNDS * config.generation.max_sequences):
            responses = generator.generate([question.prompt for question in part], sampling)
            scores = rouge_l_many(responses, [question.references for question in part])
            for question, response, rouge in zip(part, responses, scores, strict=True):
                line = {
                    "id": question.id,
                    "prompt": tokenizer.decode(question.prompt),
                    "response": response,
                    "references": question.references,
                    "rouge_l": float(rouge),
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                sums += float(rouge)
            progress.advance(len(part), benchmark=name, seed=seed)
    mean = 100 * sums / len(questions)
    info = {
        "model": model,
        "benchmark": name,
        "seed": seed,
        "samples": len(questions),
        "rouge_l": mean,
        "source": source_digest(run, config.benchmarks[name]),
        "seconds": time.monotonic() - start,
    }
    write_manifest(directory, "evaluate", fingerprint, info=info, files=[path], name=_manifest_name(name, seed))
    log.info("%s on %s, seed %d: ROUGE-L %.2f over %d answers", model, name, seed, mean, len(questions))


def summarise(
    run: RunDirectory,
    config: EvaluateConfig,
    fingerprint: str,
    *,
    models: Sequence[str] | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Join all answers and held-out measures into evaluation/results.json and seal the folder.

    models: those that were evaluated (default: config.models). fingerprints: of each model's answers and of `held_out`,
    where they are not `fingerprint`. ROUGE-L, exact match and repetition are x100; `sd` is the sample standard deviation
    over seeds, null for one seed. Raises ArtifactError naming the first result that is unfinished.
    """
    models = list(config.models if models is None else models)
    done = read_manifest(run.evaluation)
    if done is not None and done.fingerprint == fingerprint and done.info.get("models") == models:
        return dict(read_json(run.evaluation / "results.json"))
    prints = {name: fingerprint for name in [*models, HELD_OUT_RESULT]} | dict(fingerprints or {})
    held_out = _held_out_result(run, prints[HELD_OUT_RESULT]) if config.loss else {}
    seconds = float(held_out.get("seconds", 0.0))
    results: dict[str, Any] = {"seeds": list(config.seeds), "models": {}}
    if held_out:
        results["held_out"] = {key: held_out[key] for key in ("samples", "tokens", "ids")}
    for model in models:
        left = unfinished(run, config, model=model, fingerprint=prints[model])
        if left:
            raise ArtifactError(f"evaluation/{model}/{left[0][0]}-seed{left[0][1]}.jsonl is not finished: "
                                f"run `pocl evaluate --model {model}`")
        measures = {name: _benchmark(run.evaluation / model, name, config.seeds) for name in config.benchmarks}
        seconds += sum(measure.pop("seconds") for measure in measures.values())
        results["models"][model] = {"held_out": held_out.get("models", {}).get(model), "benchmarks": measures}
    results["table"] = table(results)
    write_json(run.evaluation / "results.json", results)
    write_manifest(run.evaluation, "evaluate", fingerprint, info={"models": models, "seconds": seconds})
    return results


def _held_out_result(run: RunDirectory, fingerprint: str) -> dict[str, Any]:
    manifest = read_manifest(run.evaluation, f"{HELD_OUT_RESULT}.manifest.json")
    if manifest is None or manifest.fingerprint != fingerprint or damaged_files(run.evaluation, manifest):
        raise ArtifactError("evaluation/held_out.json is not finished: run `pocl evaluate`")
    return dict(read_json(run.evaluation / f"{HELD_OUT_RESULT}.json")) | {"seconds": manifest.info.get("seconds", 0.0)}


def _benchmark(directory: Path, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Measures of one model on one benchmark, over seeds."""
    by_seed, seconds, samples = {}, 0.0, 0
    for seed in seeds:
        manifest = read_manifest(directory, _manifest_name(name, seed))
        if manifest is None or damaged_files(directory, manifest):
            raise ArtifactError(f"{directory / name}-seed{seed}.jsonl differs from its manifest: remove it and evaluate again")
        lines = [json.loads(line) for line in (directory / f"{name}-seed{seed}.jsonl").open(encoding="utf-8")]
        samples = len(lines)
        seconds += float(manifest.info["seconds"])
        by_seed[seed] = {
            "rouge_l": 100 * statistics.fmean(line["rouge_l"] for line in lines),
            "exact_match": 100 * statistics.fmean(float(exact_match(line["response"], line["references"])) for line in lines),
            "words": statistics.fmean(len(line["response"].split()) for line in lines),
            "repetition": 100 * statistics.fmean(repetition_rate(line["response"]) for line in lines),
        }
    measures: dict[str, Any] = {"samples": samples, "seconds": seconds}
    for key in ("rouge_l", "exact_match", "words", "repetition"):
        values = [values[key] for values in by_seed.values()]
        measures[key] = {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": {str(seed): value for seed, value in zip(by_seed, values, strict=True)},
        }
    return measures


def _parts(questions: list[Question], size: int) -> Iterator[list[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _manifest_name(benchmark: str, seed: int) -> str:
    return f"{benchmark}-seed{seed}.manifest.json"
