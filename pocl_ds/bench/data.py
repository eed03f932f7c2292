"""Records per second and peak memory of `pocl preprocess` beside `datasets.map`.

All contenders read the same file of conversations of 200 tokens, with the same tokenizer and chat
template, each in its own processes, one after the other, for several rounds, so that other work on
the machine affects all of them. `map` makes token ids alone; `map with mask` also the mask of the
response, as TRL's SFTTrainer does, which is what training needs. `pocl` also splits by prompt,
compares training with the held-out splits, and checks every response.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.bench.rouge import texts
from pocl_ds.data.tokenize_workers import PARALLELISM_VARIABLE
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet
from pocl_ds.resources import module_command

SIZES, ROUNDS = (10_000, 100_000), 3
MIN_RECORDS, MAX_RECORDS = 100, 100_000_000
POCL, MAP, MAP_WITH_MASK = "pocl", "map", "map with mask"
CONTENDERS = (POCL, MAP, MAP_WITH_MASK)
NUM_PROCESSES = (1, 2)
# Words of a question and of an answer; with the template and the tokenizer of `write_tokenizer`
# about 200 tokens together.
QUESTION_WORDS, ANSWER_WORDS, SHARD_RECORDS = 74, 100, 10_000
VOCABULARY = 8000
SAMPLE_SECONDS = 0.25  # between two measurements of memory
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(
    arguments: Sequence[str] = (), out: Callable[[str], None] = print, *, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Print and return a row for each size and contender.

    arguments: numbers of records, 10k and 100k by default; `--tokenizer DIR` for a tokenizer with a
    chat template in place of a small one. Raises RecipeError for another argument.
    """
    sizes, tokenizer = _parse(arguments)
    out(
        f"{os.cpu_count() or 1} cores; {rounds} rounds in turn, medians (min..max); memory: the "
        "peak of all processes together, shared pages counted once; CPU: the time of all "
        "processes for a record, which other work on the machine affects less"
    )
    out(
        f"{'records':>9}  {'contender':<15}  {'processes':>9}  {'records/s':>24}  "
        f"{'of map':>18}  {'CPU':>7}  {'peak':>9}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            write_tokenizer(tokenizer)
        for size in sizes:
            source = folder / "records.jsonl"
            write_records(source, size)
            for row in _measure_size(size, source, tokenizer, folder, rounds):
                rows.append(row)
                out(
                    f"{size:>9}  {row['contender']:<15}  {row['processes']:>9}  "
                    f"{_spread(row['rates'], '.0f'):>24}  {_spread(row['of_map'], '.2f'):>18}  "
                    f"{row['cpu_us']:>4.0f} us  {row['peak_mib']:>5.0f} MiB"
                )
    return rows


def _parse(arguments: Sequence[str]) -> tuple[tuple[int, ...], Path | None]:
    words, tokenizer = list(map(str, arguments)), None
    if "--tokenizer" in words:
        place = words.index("--tokenizer")
        if place + 1 == len(words) or not os.path.isdir(words[place + 1]):
            raise RecipeError("--tokenizer needs a folder with a tokenizer and a chat template")
        tokenizer = Path(words[place + 1])
        del words[place : place + 2]
    sizes = parse_integers(words, "records", minimum=MIN_RECORDS) or SIZES
    if max(sizes) > MAX_RECORDS:
        raise RecipeError(f"{max(sizes)} records are too many: give at most {MAX_RECORDS}")
    return sizes, tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(2000, 100, seed=0), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    with quiet():
        wrapped.save_pretrained(folder)


def write_records(path: Path, count: int) -> None:
    """Write conversations of one question and one answer."""
    with path.open("w", encoding="utf-8") as stream:
        for start in range(0, count, SHARD_RECORDS):
            number = min(SHARD_RECORDS, count - start)
            for question, answer in zip(
                texts(number, QUESTION_WORDS, seed=2 * start + 1),
                texts(number, ANSWER_WORDS, seed=2 * start + 2),
                strict=True,
            ):
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                stream.write(json.dumps({"messages": messages}) + "\n")


def _measure_size(
    size: int, source: Path, tokenizer: Path, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    """A row for each contender and number of processes."""
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    cpu_times: dict[tuple[str, int], list[float]] = defaultdict(list)
    peaks: dict[tuple[str, int], float] = defaultdict(float)
    for _ in range(rounds):
        for processes in NUM_PROCESSES:
            for contender in CONTENDERS:
                work = folder / "work"
                work.mkdir()
                seconds, cpu, peak = _run_worker(contender, processes, source, tokenizer, work)
                shutil.rmtree(work)
                rates[contender, processes].append(size / seconds)
                cpu_times[contender, processes].append(1e6 * cpu / size)
                peaks[contender, processes] = max(peaks[contender, processes], peak)
    return [
        {
            "records": size,
            "contender": contender,
            "processes": processes,
            "rates": values,
            "of_map": [a / b for a, b in zip(values, rates[MAP, processes], strict=True)],
            "cpu_us": min(cpu_times[contender, processes]),
            "peak_mib": peaks[contender, processes],
        }
        for (contender, processes), values in rates.items()
    ]


def _run_worker(
    contender: str, processes: int, source: Path, tokenizer: Path, work: Path
) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the work, without imports, and peak memory of all its processes
    in MiB.
    """
    arguments = [contender, str(processes), str(source), str(tokenizer), str(work)]
    with (work / "stdout").open("w+") as stdout:
        process = subprocess.Popen(
            [*module_command("pocl_ds.bench.data_worker"), *arguments],
            stdout=stdout,
            # One thread per process in all of them.
            env={**os.environ, PARALLELISM_VARIABLE: "false", "OMP_NUM_THREADS": "1"},
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _memory_mib(psutil.Process(process.pid)))
            time.sleep(SAMPLE_SECONDS)
        stdout.seek(0)
        if process.returncode:
            raise RuntimeError(f"{contender} failed with exit code {process.returncode}")
        seconds, cpu = stdout.read().split()[-2:]
        return float(seconds), float(cpu), peak


def _memory_mib(parent: psutil.Process) -> float:
    """Memory of a process and its children: each shared page is divided among those that use it."""
    total = 0
    with suppress(psutil.Error):
        processes: Iterable[psutil.Process] = [parent, *parent.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 2**20


def _spread(values: Sequence[float], format: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{format}} ({low:{format}}..{high:{format}})"
