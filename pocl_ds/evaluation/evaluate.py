"""The step `evaluate`: answers of every model by benchmark and seed, and the table of results.

Each part is a file with its own manifest, so an interrupted evaluation repeats only what is
missing, and another model or seed adds to what exists. Loss and KL: see `held_out_loss`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocl_ds.config import (
    EvaluateConfig,
    PromptConfig,
    TeacherEndpointConfig,
    semantic_fields,
)
from pocl_ds.data.conversation import Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer, SpecialTokensInText
from pocl_ds.evaluation.answer_writer import AnswerWriter
from pocl_ds.evaluation.answers import (
    HELD_OUT_LOSS,
    answer_settings,
    answers_file,
    answers_manifest,
    read_answers,
    summarize_answers,
)
from pocl_ds.evaluation.benchmarks import (
    TEST_SPLIT,
    benchmark_samples,
    check_benchmark_names,
    count_seen_in_training,
    external_benchmarks,
)
from pocl_ds.evaluation.evaluated_models import model_identity
from pocl_ds.evaluation.harness_results import harness_file, read_harness_results
from pocl_ds.evaluation.judge import summarize_verdicts, verdicts_file
from pocl_ds.evaluation.rouge_tokenizers import benchmark_rouge_tokenizers, tokenizer_footnote
from pocl_ds.evaluation.verification import (
    check_references,
    summarize_verification,
    verification_file,
)
from pocl_ds.generation.endpoint_generator import EndpointGenerator
from pocl_ds.generation.protocol import TextGenerator
from pocl_ds.generation.reused_generator import ReusedGenerator
from pocl_ds.metrics.rouge_tokenizer import AUTO
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import embedding_rows, load_model_config, load_tokenizer
from pocl_ds.models.token_checks import check_sequences
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import read_json, write_json
from pocl_ds.workflow.manifest import MANIFEST, fingerprint, read_part, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

RESULTS = "results.json"
BenchmarkSeed = tuple[str, int]


def generate_answers(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    *,
    model: str,
    path: str,
    generators: ReusedGenerator,
    rouge_tokenizer: str = AUTO,
    special_tokens_in_text: SpecialTokensInText = "allow",
    chat_template: str | None = None,
    end_of_turn_ids: Sequence[int] = (),
    threads: int | None = None,
    shard: tuple[int, int] = (0, 1),
    trust_remote_code: bool = False,
    endpoint: TeacherEndpointConfig | None = None,
) -> None:
    """Generate and score one model's answers to every benchmark with every seed.

    Writes evaluation/MODEL/BENCHMARK-seedS.jsonl. Finished files are reused. One engine generates
    all answers.

    Args:
        path: folder or Hub name of the model.
        generators: opens the model. The caller closes it, after the last model.
        rouge_tokenizer: of ROUGE-L; `auto` decides by benchmark, see `rouge_tokenizers`.
        special_tokens_in_text: `data.special_tokens_in_text`, as for training.
        chat_template: asks the model in place of its own.
        end_of_turn_ids: ids that end an answer, besides those that tokenizer and model name.
        shard: (I, N) for part I of N of all (benchmark, seed) pairs; parts have about as many
            answers.
        trust_remote_code: run Python code that comes with the model.
        endpoint: servers that run the model, of which `path` has the tokenizer.

    Raises:
        RecipeError: a benchmark's name cannot be a file name.
        DataError: a benchmark has an item without a reference, or without one to verify answers by,
            or is not available.
        ArtifactError: a benchmark has no items.
    """
    check_benchmark_names(config.benchmarks)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    samples = {name: benchmark_samples(run, config, name) for name in config.benchmarks}
    for name, items in samples.items():
        check_references(config, name, items)

    # Find the files of this shard that are missing or were generated differently.
    common = {**answer_settings(prompt, config), "dtype": resolve_dtype(config.generation.dtype)}
    settings = {
        name: {**common, "rouge_tokenizer": tokenizer}
        for name, tokenizer in benchmark_rouge_tokenizers(
            run, config, samples, rouge_tokenizer
        ).items()
    }
    prompt_settings: list[Any] = [chat_template, sorted(end_of_turn_ids), special_tokens_in_text]
    prompt_settings += [semantic_fields(endpoint), path] if endpoint else []
    fingerprints = _fingerprints(path, config, prompt, prompt_settings, settings, samples)
    pairs = select_shard({pair: len(samples[pair[0]]) for pair in fingerprints}, *shard)
    pending = [pair for pair in pairs if not _is_finished(run, model, pair, fingerprints[pair])]
    if not pending:
        return

    # Tokenize the prompts before the engine takes the memory.
    sample_tokenizer = SampleTokenizer(
        tokenizer, prompt, special_tokens_in_text=special_tokens_in_text
    )
    writers = {
        name: AnswerWriter(sample_tokenizer, config, settings[name], name, model, samples[name])
        for name in dict.fromkeys(name for name, _ in pending)
    }
    own_rows = {path: embedding_rows(load_model_config(path, trust_remote_code=trust_remote_code))}
    for name, writer in writers.items():
        check_sequences(writer.prompts, tokenizer, own_rows, f"a prompt of benchmark {name}")
    max_length = prompt.max_prompt_tokens + config.max_new_tokens
    generator: TextGenerator
    if endpoint:
        saved = "finished files of answers are saved"
        generator = EndpointGenerator(endpoint, path, tokenizer, max_length=max_length, saved=saved)
    else:
        generator = generators.open(
            path,
            config.generation,
            tokenizer,
            max_length=max_length,
            threads=threads,
            trust_remote_code=trust_remote_code,
            alternative="evaluate.generation.backend=transformers",
            end_of_turn_ids=end_of_turn_ids,
        )

    # Write one file after the other.
    total = sum(len(samples[name]) for name, _ in pending)
    with (
        contextlib.closing(generator) if endpoint else contextlib.nullcontext(),
        Progress(total, "answers", f"evaluate {model}") as progress,
    ):
        for name, seed in pending:
            file = answers_file(run, model, name, seed)
            expected = fingerprints[name, seed]
            writers[name].write(file, generator, seed, expected, progress.advance)


def select_shard(
    sizes: Mapping[BenchmarkSeed, int], shard: int, shards: int
) -> list[BenchmarkSeed]:
    """The (benchmark, seed) pairs of one of several shards, in their order.

    The largest pairs are assigned first, each to the shard with the fewest answers.
    """
    loads, shard_of_pair = [0] * shards, dict[BenchmarkSeed, int]()
    for pair in sorted(sizes, key=lambda pair: -sizes[pair]):
        smallest = loads.index(min(loads))
        loads[smallest] += sizes[pair]
        shard_of_pair[pair] = smallest
    return [pair for pair in sizes if shard_of_pair[pair] == shard]


def summarize_results(
    run: RunDirectory, config: EvaluateConfig, models: list[str], *, fingerprint: str | None = None
) -> dict[str, Any]:
    """Write evaluation/results.json: means and deviations over seeds by model and benchmark.

    Its `footnotes` hold sentences by benchmark, which every table of the numbers must show.

    Args:
        fingerprint: finishes the step with a manifest; None leaves it unfinished.

    Returns:
        The results.

    Raises:
        ArtifactError: answers of a model are missing, unfinished or damaged.
    """
    losses: dict[str, Any] = {}
    seconds = 0.0
    manifest = read_part(run.evaluation, f"{HELD_OUT_LOSS}.manifest.json")
    if config.held_out_loss and manifest is not None:
        losses = read_json(run.evaluation / HELD_OUT_LOSS)
        seconds = manifest.info["seconds"]

    # Collect the numbers of each model.
    seen_counts = count_seen_in_training(run, external_benchmarks(run, config))
    entries: dict[str, Any] = {}
    for model in models:
        entries[model], model_seconds = _model_results(
            run, config, model, losses.get(model, {}), seen_counts
        )
        seconds += model_seconds
    footnotes = {
        name: notes
        for name in (config.benchmarks if models else ())
        if (notes := _footnotes([entry["benchmarks"][name] for entry in entries.values()]))
    }

    # Remove the manifest first: it may belong to the results of another recipe.
    results = {"seeds": list(config.seeds), "footnotes": footnotes, "models": entries}
    (run.evaluation / MANIFEST).unlink(missing_ok=True)
    write_json(run.evaluation / RESULTS, results)
    if fingerprint is not None:
        write_manifest(
            run.evaluation,
            "evaluate",
            fingerprint,
            files=[run.evaluation / RESULTS, *_parts(run, config, models)],
            info={"seconds": seconds},
        )
    return results


def _parts(run: RunDirectory, config: EvaluateConfig, models: Sequence[str]) -> list[Path]:
    """The files from which the results are summarized. The step is unfinished without them."""
    parts = [run.evaluation / HELD_OUT_LOSS] if config.held_out_loss else []
    if config.harness:
        parts += [harness_file(run, model) for model in models]
    for model, benchmark, seed in itertools.product(models, config.benchmarks, config.seeds):
        parts.append(answers_file(run, model, benchmark, seed))
        if config.benchmarks[benchmark].verify:
            parts.append(verification_file(run, model, benchmark, seed))
        if config.judge:
            parts.append(verdicts_file(run, model, benchmark, seed))
    return [path for path in parts if path.is_file()]


def _model_results(
    run: RunDirectory,
    config: EvaluateConfig,
    model: str,
    losses: Mapping[str, Any],
    seen_counts: Mapping[str, int],
) -> tuple[dict[str, Any], float]:
    """One model's entry in results.json, and the seconds that its answers took."""
    entry = {key: losses[key] for key in ("loss", "tokens", "kl") if key in losses}
    test_losses, seconds = dict(entry), 0.0
    entry["benchmarks"] = {}
    for name, benchmark in config.benchmarks.items():
        files = [answers_file(run, model, name, seed) for seed in config.seeds]
        manifests = [answers_manifest(file) for file in files]
        numbers = summarize_answers([read_answers(file) for file in files], manifests)
        numbers |= summarize_verification(run, config, model, name)
        is_test_split = benchmark.source == TEST_SPLIT
        benchmark_losses = (
            test_losses if is_test_split else losses.get("benchmarks", {}).get(name, {})
        )
        numbers |= {key: benchmark_losses[key] for key in ("loss", "kl") if key in benchmark_losses}
        if (verdicts := summarize_verdicts(run, config, model, name)) is not None:
            numbers["judge"] = verdicts
        if name in seen_counts:
            numbers["seen_in_training"] = seen_counts[name]
        entry["benchmarks"][name] = numbers
        seconds += sum(manifest.info["seconds"] for manifest in manifests if manifest)
    harness = read_harness_results(run, model) if config.harness else {}
    if harness:
        entry["harness"] = {task: result["means"] for task, result in harness.items()}
    return entry, seconds


def _footnotes(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Footnotes of one benchmark, from its entries of all models."""
    items, footnotes = entries[0]["samples"], []
    cut = sorted({entry["cut_prompts"] for entry in entries})  # models may have other tokenizers
    if cut[-1]:
        counts = f"{cut[0]} to {cut[-1]}" if len(cut) > 1 else str(cut[-1])
        footnotes.append(f"{counts} of {items} prompts cut by prompt.max_prompt_tokens")
    if seen_count := entries[0].get("seen_in_training"):
        footnotes.append(f"{seen_count} of {items} items seen in training")
    if "unfinished_thoughts" in entries[0]:
        shares = [entry.get("unfinished_thoughts", 0.0) for entry in entries]
        text = "answers after the thoughts alone are compared"
        if max(shares) > 0:
            percent = " to ".join(f"{share:.1f}%" for share in sorted({min(shares), max(shares)}))
            text += f"; {percent} of a model's responses never end their thought and have none"
        footnotes.append(text)
    if footnote := tokenizer_footnote(entries[0]["rouge_tokenizer"]):
        footnotes.append(footnote)
    return footnotes


def _fingerprints(
    path: str,
    config: EvaluateConfig,
    prompt: PromptConfig,
    prompt_settings: Sequence[Any],
    settings: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Sample]],
) -> dict[BenchmarkSeed, str]:
    """Everything that answers depend on, by benchmark and seed. prompt_settings: of prompts, in
    addition to `prompt`; settings: by benchmark.
    """
    common = [
        model_identity(path),
        semantic_fields(config.generation),
        semantic_fields(prompt),
        *prompt_settings,
    ]
    return {
        (name, seed): fingerprint(
            [*common, settings[name], seed, [replace(item, place="").to_json() for item in items]]
        )
        for name, items in samples.items()
        for seed in config.seeds
    }


def _is_finished(run: RunDirectory, model: str, pair: BenchmarkSeed, expected: str) -> bool:
    manifest = answers_manifest(answers_file(run, model, *pair))
    return manifest is not None and manifest.fingerprint == expected
