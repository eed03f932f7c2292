"""The stage `evaluate` (METHOD 5): answers by benchmark and seed, loss and KL on references, and
the table of results.

Each part is a file with a manifest of its own, so an interrupted evaluation repeats only what is
missing, and another model or seed adds to what is there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig, PromptConfig, TeacherConfig, semantic_fields
from pocl_ds.data.records import Sample
from pocl_ds.data.tokenized import SampleTokenizer, TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluation.answers import (
    answers_file,
    answers_manifest,
    read_answers,
    settings,
    summary,
)
from pocl_ds.evaluation.benchmarks import HELD_OUT as TEST
from pocl_ds.evaluation.benchmarks import (
    check_names,
    chosen,
    questions,
    seen_in_training,
    split_ids,
)
from pocl_ds.evaluation.held_out_loss import held_out as measure
from pocl_ds.evaluation.judge import summarize_verdicts
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, SamplingParams
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.metrics.text import exact_match
from pocl_ds.models.load import load_tokenizer
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import atomic_write, read_json, write_json
from pocl_ds.workflow.manifest import MANIFEST, fingerprint, read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory, read_models

log = logging.getLogger("pocl_ds")

HELD_OUT, RESULTS = "held_out.json", "results.json"
# Prompts handed to the engine at once, in units of its sequences in flight: enough to keep it full,
# few enough for progress to be seen.
ROUNDS = 4


def model_path(run: RunDirectory, model: str) -> str:
    """Where a model of the run lies: teacher, initial, student or baseline. Raises ArtifactError
    where it is not there yet.
    """
    if model in ("teacher", "initial"):
        path = read_models(run)["teacher" if model == "teacher" else "student"]
        if path is None:
            raise ArtifactError("this recipe has no teacher: leave it out of evaluate.models")
        return str(path)
    folder = (run.train if model == "student" else run.baseline) / "final"
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is missing: run `pocl {'train' if model == 'student' else 'baseline'}` first"
        )
    return str(folder)


def answer(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    *,
    model: str,
    path: str,
    threads: int | None = None,
    shard: tuple[int, int] = (0, 1),
    trust_remote_code: bool = False,
) -> None:
    """Let one model answer every benchmark with every seed that is not answered yet; one engine
    serves all.

    shard: (I, N): only the I-th of N parts of all (benchmark, seed) pairs, parts of about as many
    answers. Writes evaluation/MODEL/BENCHMARK-seedS.jsonl with the score of each item.
    """
    check_names(config.benchmarks)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    encoder = SampleTokenizer(tokenizer, prompt)
    asked = {name: questions(run, config, name) for name in config.benchmarks}
    how = settings(prompt, config)
    prints = {
        (name, seed): fingerprint(
            [
                _identity(path),
                semantic_fields(config.generation),
                semantic_fields(prompt),
                how,
                seed,
                [s.to_json() for s in samples],
            ]
        )
        for name, samples in asked.items()
        for seed in config.seeds
    }
    todo = [
        key
        for key in share({key: len(asked[key[0]]) for key in prints}, *shard)
        if not _answered(run, model, key, prints)
    ]
    if not todo:
        return
    prompts = {
        name: _prompts(encoder, name, model, asked[name])
        for name in dict.fromkeys(name for name, _ in todo)
    }
    generator = open_generator(
        path,
        config.generation,
        tokenizer,
        max_length=prompt.max_prompt_tokens + config.max_new_tokens,
        threads=threads,
        trust_remote_code=trust_remote_code,
        alternative="evaluate.generation.backend=transformers",
    )
    try:
        with Progress(
            sum(len(asked[name]) for name, _ in todo), "answers", f"evaluate {model}"
        ) as progress:
            for name, seed in todo:
                file = answers_file(run, model, name, seed)
                ids, cut = prompts[name]
                info = _write_answers(
                    file, asked[name], ids, generator, encoder, config, seed, progress
                )
                info |= {"benchmark": name, "seed": seed, "settings": how, "cut_prompts": cut}
                write_manifest(
                    file.parent,
                    "answers",
                    prints[name, seed],
                    files=[file],
                    name=f"{file.name}.manifest.json",
                    info=info,
                )
    finally:
        generator.close()


def share(sizes: dict[tuple[str, int], int], number: int, count: int) -> list[tuple[str, int]]:
    """The `number`-th of `count` parts of the keys, in their order; the largest are dealt first,
    each to the lightest part.
    """
    loads, parts = [0] * count, dict[tuple[str, int], int]()
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[key]
        parts[key] = lightest
    return [key for key in sizes if parts[key] == number]


def held_out(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    paths: dict[str, str],
    *,
    teacher: TeacherConfig | None = None,
    threads: int | None = None,
    trusted: Collection[str] = (),
) -> None:
    """Loss a token on data/test and on every benchmark's references, and KL(teacher || model) where
    there is a teacher.

    teacher: as the recipe has it; where the model that is measured is not what training asked, the
    log says so. trusted: the models whose own code may run.
    """
    if not config.held_out_loss:
        return
    if teacher and "teacher" in paths and teacher.ensemble:
        log.warning(
            "KL to the teacher is to %s alone, not to the mixture of %d that training asked",
            teacher.model,
            1 + len(teacher.ensemble),
        )
    if teacher and "teacher" in paths and teacher.quantization != "none":
        log.warning(
            "the teacher is evaluated as its model is, not quantised to %s as training asked it",
            teacher.quantization,
        )
    split = TokenizedSplit.open(run.data, TEST)
    benchmarks = {
        name: questions(run, config, name)
        for name, one in config.benchmarks.items()
        if one.source != TEST
    }
    if not len(split) and not benchmarks:
        return
    ids = split_ids(split)
    stamp = fingerprint(
        [
            {name: _identity(path) for name, path in paths.items()},
            config.generation.dtype,
            semantic_fields(prompt),
            [ids[row] for row in chosen(ids, config.max_samples)],
            {name: [s.to_json() for s in samples] for name, samples in benchmarks.items()},
        ]
    )
    measure(
        run,
        config,
        paths,
        prompt=prompt,
        benchmarks=benchmarks,
        fingerprint=stamp,
        threads=threads,
        trusted=trusted,
    )


def summarise(
    run: RunDirectory, config: EvaluateConfig, models: list[str], *, fingerprint: str | None = None
) -> dict[str, Any]:
    """Gather evaluation/results.json: by model and benchmark the mean and deviation over seeds, and
    what belongs beside it (`metrics.marks`). fingerprint: seals the stage.
    """
    losses = (
        read_json(run.evaluation / HELD_OUT)
        if config.held_out_loss and (run.evaluation / HELD_OUT).is_file()
        else {}
    )
    results: dict[str, Any] = {"seeds": list(config.seeds), "marks": {}, "models": {}}
    seen = seen_in_training(
        run,
        {
            name: questions(run, config, name)
            for name, one in config.benchmarks.items()
            if one.source != TEST
        },
    )
    measuring = read_manifest(run.evaluation, f"{HELD_OUT}.manifest.json") if losses else None
    seconds = measuring.info["seconds"] if measuring else 0.0
    for model in models:
        entry: dict[str, Any] = dict(losses.get(model, {}))
        references = entry.pop("benchmarks", {})
        entry["benchmarks"] = {}
        for name, benchmark in config.benchmarks.items():
            files = [answers_file(run, model, name, seed) for seed in config.seeds]
            manifests = [answers_manifest(file) for file in files]
            found = summary([read_answers(file) for file in files], manifests)
            measured = dict(entry) if benchmark.source == TEST else references.get(name, {})
            found |= {key: measured[key] for key in ("loss", "kl") if key in measured}
            if (
                config.judge is not None
                and (verdict := summarize_verdicts(run, config, model, name)) is not None
            ):
                found["judge"] = verdict
            if name in seen:
                found["seen_in_training"] = seen[name]
            entry["benchmarks"][name] = found
            seconds += sum(manifest.info["seconds"] for manifest in manifests if manifest)
        results["models"][model] = entry
    for name in config.benchmarks if models else ():
        if marks := _marks([results["models"][model]["benchmarks"][name] for model in models]):
            results["marks"][name] = marks
    (run.evaluation / MANIFEST).unlink(missing_ok=True)  # of what another recipe found
    write_json(run.evaluation / RESULTS, results)
    if fingerprint is not None:
        write_manifest(
            run.evaluation,
            "evaluate",
            fingerprint,
            files=[run.evaluation / RESULTS],
            info={"seconds": seconds},
        )
    return results


def _prompts(
    encoder: SampleTokenizer, name: str, model: str, samples: Sequence[Sample]
) -> tuple[list[list[int]], int]:
    """A benchmark's prompts as this model reads them, and how many were cut: their ends, a chat
    template's too, are missing.
    """
    ids, cut = encoder.tokenize_prompts(samples)
    if cut:
        log.warning(
            "benchmark %s, %s: %d of %d prompts are cut to prompt.max_prompt_tokens=%d and "
            "answered without their ends: "
            "raise it",
            name,
            model,
            cut,
            len(ids),
            encoder.config.max_prompt_tokens,
        )
    return ids, cut


def _marks(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be said beside a benchmark's numbers wherever they stand, from its entries of all
    models.
    """
    cut, items = sorted({entry["cut_prompts"] for entry in entries}), entries[0]["samples"]
    marks = []
    if cut[-1]:  # a teacher may have other tokens
        counts = f"{cut[0]} to {cut[-1]}" if len(cut) > 1 else str(cut[-1])
        marks.append(f"{counts} of {items} prompts cut by prompt.max_prompt_tokens")
    if seen := entries[0].get("seen_in_training"):
        marks.append(f"{seen} of {items} items seen in training")
    return marks


def _write_answers(
    file: Path,
    samples: Sequence[Sample],
    prompts: Sequence[list[int]],
    generator: Generator,
    encoder: SampleTokenizer,
    config: EvaluateConfig,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Answer and score, an item a line; what there is to say of it: seconds, tokens."""
    start, before, writing = time.monotonic(), generator.processed_tokens, 0.0
    size = ROUNDS * config.generation.max_num_seqs
    with atomic_write(file) as stream:
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            sampling = SamplingParams(
                config.temperature, config.top_p, config.max_new_tokens, seed=seed, first_index=first
            )
            began = time.monotonic()
            texts = generator.generate(
                prompts[first : first + size],
                sampling,
                lambda finished: progress.advance(finished, seed=seed),
            )
            writing += time.monotonic() - began
            for sample, text in zip(part, texts, strict=True):
                record = {
                    "id": sample.id,
                    "prompt": encoder.template.render(sample),
                    "instruction": sample.instruction,
                    "input": sample.input,
                    "response": text,
                    "references": sample.references,
                    "rouge_l": rouge_l(text, sample.references),
                    "exact_match": exact_match(text, sample.references),
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    seconds, tokens = time.monotonic() - start, generator.processed_tokens - before
    return {
        "seconds": seconds,
        "answers_per_second": len(samples) / seconds,
        "tokens": tokens,
        "generation_seconds": writing,
        "tokens_per_second": tokens / max(writing, 1e-9),
    }


def _identity(path: str) -> Any:
    """What tells one model folder from another: names, sizes and times of its weight files; a Hub
    name itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _answered(
    run: RunDirectory, model: str, key: tuple[str, int], prints: dict[tuple[str, int], str]
) -> bool:
    file = answers_file(run, model, *key)
    manifest = answers_manifest(file)
    return manifest is not None and manifest.fingerprint == prints[key] and file.is_file()
