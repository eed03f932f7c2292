"""`pocl estimate` against measurements: predicted and measured peak memory of a training step on
this machine's CPU, and FLOPs.

Three pairs of models on one and two ZeRO-3 ranks, with an online and a cached teacher. The memory
of a rank without any model (interpreter, libraries, process group) is measured; all else is
predicted from the two configurations. FLOPs are compared with torch's own counter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig

from pocl_ds.bench.arguments import choose_names
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.curriculum.micro_batches import assign_micro_batches
from pocl_ds.models.cost import activation_bytes, model_shape
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.memory import TrainingSetup, training_memory
from pocl_ds.models.quiet import quiet

# torch's counter knows the kernels of GPUs only.
_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION = {
    _CPU_KERNEL: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
}
NAMES, RANKS, STEPS = ("S", "A", "B"), (1, 2), 3
VARIANTS = {"online": "zero3", "cached_hidden_states": "zero3+cached"}


def run(
    arguments: Sequence[str] = (), out: Callable[[str], None] = print, *, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Print and return a row for each pair of models, number of ranks and teacher mode. arguments:
    names of workloads, S, A and B by default.
    """
    names = choose_names(arguments, WORKLOADS, NAMES)
    rows = []
    out(f"{'workload, ranks, teacher':<28}{'predicted':>12}{'measured':>12}   measured/predicted")
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        for name in names:
            folder = Path(folder_name) / name
            with quiet():
                write_models(WORKLOADS[name], folder)
            for ranks in RANKS:
                rows += _compare_memory(name, folder, ranks, steps, out)
            counted, formula = flops(WORKLOADS[name])
            out(
                f"{name}: forward of the student {counted / 1e9:.2f} GFLOP by torch's counter, "
                f"{formula / 1e9:.2f} by formula: {formula / counted:.4f}"
            )
    return rows


def _compare_memory(
    name: str, folder: Path, ranks: int, steps: int, out: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Predicted and measured MiB of the fullest rank, for each teacher mode."""
    rows = []
    base = max(_peak_mib("idle", name, folder, ranks, steps))
    for mode, variant in VARIANTS.items():
        if mode == "cached_hidden_states":
            # Write the cache first: in a run that is another process, whose memory does not count.
            _peak_mib(variant, name, folder, ranks, 1)
            shutil.rmtree(folder / f"run-{variant}-{ranks}" / "train")
        predicted = sum(predict(WORKLOADS[name], ranks, mode, base * 2**20).values()) / 2**20
        measured = max(_peak_mib(variant, name, folder, ranks, steps))
        row = {"name": name, "ranks": ranks, "mode": mode, "base": base}
        rows.append({**row, "predicted": predicted, "measured": measured})
        out(
            f"{f'{name}, {ranks}, {mode}':<28}{predicted:>8.0f} MiB{measured:>8.0f} MiB   "
            f"{measured / predicted:.3f}"
        )
    return rows


def _peak_mib(variant: str, name: str, folder: Path, ranks: int, steps: int) -> list[float]:
    """Peak memory of each rank in MiB."""
    result = folder / "out.json"
    record = run_ranks(
        variant,
        "pocl_ds.bench.step_worker",
        [variant, name, str(folder), str(steps), str(result)],
        result,
        ranks=ranks,
        threads=max(1, (os.cpu_count() or 1) // ranks),
    )
    return [float(peak) for peak in record["peaks_mib"]]


def predict(work: Workload, ranks: int, mode: str, base: float) -> dict[str, float]:
    """Peak bytes of one rank, by what occupies them, as in `pocl estimate`. base: bytes without a
    model.
    """
    # The first rank's first micro-batch is the largest.
    lengths = np.array([length for _, length in work.lengths], np.int64)
    micro_batch = assign_micro_batches(
        lengths,
        ranks=ranks,
        micro_batch_size=max(1, len(lengths) // ranks),
        micro_batch_tokens=None,
        packed=True,
    )[0][0]
    samples = [work.lengths[i] for i in micro_batch]
    loss_tokens = sum(length - max(prompt, 1) for prompt, length in samples)
    student, teacher = (LlamaConfig(**shape) for shape in (work.student, work.teacher))

    # What the student's forward keeps for backward.
    def activations(sizes: Sequence[int], checkpointing: bool) -> float:
        return activation_bytes(
            student,
            sizes,
            dtype=torch.float32,
            attention="per_sample",
            checkpointing=checkpointing,
        )

    setup = TrainingSetup(
        len(micro_batch), teacher_mode=mode, dtype="float32", teacher_dtype="float32"
    )
    return training_memory(
        model_shape(student),
        model_shape(teacher),
        setup,
        ranks,
        lengths[micro_batch].tolist(),
        loss_tokens,
        activations,
        base,
        gloo=True,
    )


def flops(work: Workload) -> tuple[float, float]:
    """FLOPs of the student's forward over the workload: by torch's counter, with half of the
    square of attention, and by the formula of `pocl estimate`.
    """
    config: Any = LlamaConfig(**work.student)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="per_sample").eval()
    lengths = tuple(length for _, length in work.lengths)
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.no_grad():
        states = hidden_states(model, ids, None, positions, lengths)
        output_head(model).product(states[0, : work.loss_tokens])
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "attention" in str(op))
    return sum(counts.values()) - attention / 2, model_shape(config).forward_flops(
        lengths, work.loss_tokens
    )
