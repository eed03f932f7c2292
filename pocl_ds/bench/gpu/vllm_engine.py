"""Part `vllm`: an engine in a process beside this one, as training uses it. Scoring, rollouts, new
weights, and sleep, each checked by log-probabilities.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocl_ds.bench.gpu.random_run import make_tokenizer, write_random_model, write_samples
from pocl_ds.bench.gpu.rows import NotAvailable, Row, RowWriter, require_package
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.models.load import load_model
from pocl_ds.runtime import distributed

TOLERANCE = 2e-2  # nats, in bfloat16


def main(rows: RowWriter) -> None:
    """Write a row for each thing that is measured."""
    try:
        require_package("vllm")
    except NotAvailable as reason:
        rows.write({"name": "vLLM", "skipped": str(reason)})
        return
    on_gpu = distributed.device_type() == "cuda"
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        write_samples(folder / "samples.jsonl", 200)
        tokenizer = make_tokenizer(folder / "samples.jsonl", 2048 if on_gpu else 300)
        layers, width = (16, 2048) if on_gpu else (2, 64)
        write_random_model(folder / "model", tokenizer, layers=layers, width=width, seed=0)
        with closing(open_engine(folder / "model", rows, sleep_level=1)) as engine:
            measure_engine(engine, str(folder / "model"), rows, on_gpu=on_gpu)
        if on_gpu:  # a second engine: the level of sleep is chosen when it opens
            with closing(open_engine(folder / "model", rows, sleep_level=2)) as engine:
                check = partial(check_sleep, engine, str(folder / "model"))
                rows.measure({"name": "sleep level 2"}, check)


def open_engine(path: Path, rows: RowWriter, *, sleep_level: int) -> SubprocessGenerator:
    """Open an engine that may take 0.4 of the device's memory, and write the seconds it took."""
    start = time.monotonic()
    config = GenerationConfig(gpu_memory_utilization=0.4, max_num_seqs=256)
    on_gpu = distributed.device_type() == "cuda"
    engine = SubprocessGenerator(
        str(path),
        config,
        max_length=512,
        threads=max(1, (os.cpu_count() or 1) // 2),
        device="0" if on_gpu else None,
        sleep_level=sleep_level,
        weight_transfer="cuda_ipc" if on_gpu else "file",
    )
    row = {"name": f"open, sleep level {sleep_level}", "seconds": time.monotonic() - start}
    rows.write({**row, "value": f"{row['seconds']:.1f} s"})
    return engine


def measure_engine(
    engine: SubprocessGenerator, path: str, rows: RowWriter, *, on_gpu: bool
) -> None:
    """Throughput of scoring and rollouts, the time of new weights, and sleep."""
    count, prompt_tokens, new_tokens = (512, 128, 128) if on_gpu else (4, 8, 4)
    source = np.random.default_rng(0)
    prompts = source.integers(3, 256, (count, prompt_tokens)).tolist()
    sampling = SamplingParams(1.0, 1.0, new_tokens, seed=0)

    def generate() -> Row:
        engine.generate_ids(prompts[:4], sampling)  # warms up
        start = time.monotonic()
        tokens = sum(map(len, engine.generate_ids(prompts, sampling)))
        return _throughput(tokens, time.monotonic() - start)

    def score() -> Row:
        start = time.monotonic()
        engine.log_probs(prompts, [1] * count)
        return _throughput(count * prompt_tokens, time.monotonic() - start)

    measurements: dict[str, Callable[[], Row]] = {
        f"rollouts: {count} responses of up to {new_tokens} tokens": generate,
        f"scoring: log-probabilities of {count} sequences": score,
        "new weights": partial(check_new_weights, engine, path),
        "sleep level 1": partial(check_sleep, engine, path),
    }
    for name, measurement in measurements.items():
        rows.measure({"name": name}, measurement)


def check_new_weights(engine: SubprocessGenerator, path: str) -> Row:
    """Load scaled weights and then the model's own. Raises RuntimeError if log-probabilities do not
    change, or do not return to what they were.
    """
    weights = _weights(path)
    before = _log_probs(engine)
    engine.load_weights((name, value * 1.5) for name, value in weights.items())
    changed = _log_probs(engine)
    start = time.monotonic()
    engine.load_weights(weights.items())
    seconds = time.monotonic() - start
    if np.abs(changed - before).max() < TOLERANCE:
        raise RuntimeError("the engine keeps its earlier weights")
    _check_equal(_log_probs(engine), before)
    size = sum(value.numel() * value.element_size() for value in weights.values())
    return {
        "seconds": seconds,
        "bytes": size,
        "value": f"{seconds:.2f} s for {size / 2**30:.2f} GiB",
    }


def check_sleep(engine: SubprocessGenerator, path: str) -> Row:
    """Sleep and wake. Raises RuntimeError if the log-probabilities differ after it, NotAvailable on
    a machine where engines do not sleep.
    """
    if not engine.sleep_level:
        raise NotAvailable("engines do not sleep on this machine")
    weights = _weights(path)
    before, free_before = _log_probs(engine), torch.cuda.mem_get_info()[0]
    start = time.monotonic()
    engine.sleep()
    asleep = time.monotonic() - start
    freed = torch.cuda.mem_get_info()[0] - free_before
    start = time.monotonic()
    if engine.sleep_level == 2:  # its weights are gone
        engine.load_weights(weights.items())
    after = _log_probs(engine)
    awake = time.monotonic() - start
    _check_equal(after, before)
    return {
        "sleep_seconds": asleep,
        "wake_seconds": awake,
        "freed_bytes": freed,
        "value": f"{asleep:.2f} s to sleep, {awake:.2f} s to wake, frees {freed / 2**30:.1f} GiB",
    }


def _throughput(tokens: int, seconds: float) -> Row:
    rate = tokens / seconds
    return {"tokens": tokens, "seconds": seconds, "value": f"{rate:,.0f} tokens/s"}


def _weights(path: str) -> dict[str, Tensor]:
    """The model's weights, on the GPU as those of a student in training."""
    model = load_model(path, dtype="auto").to(distributed.device())
    return {name: value.detach() for name, value in model.named_parameters()}


def _log_probs(engine: SubprocessGenerator) -> np.ndarray:
    return np.asarray(engine.log_probs([list(range(3, 60))], [5])[0])


def _check_equal(after: np.ndarray, before: np.ndarray) -> None:
    difference = float(np.abs(after - before).max())
    if difference > TOLERANCE:
        raise RuntimeError(f"log-probabilities differ by up to {difference:.3f} nats afterwards")


if __name__ == "__main__":
    main(RowWriter(Path(sys.argv[1])))
