"""`pocl estimate` against what a step takes: predicted and measured peak of memory on this machine's
CPU, and FLOPs.

Three pairs of models on one and two ZeRO-3 ranks, the teacher live and stored. What a rank takes
before any model is there (interpreter, libraries, process group) is measured; the rest is predicted
from the two configurations. FLOPs are held against torch's own counter.
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

from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.curriculum.micro_batches import deal
from pocl_ds.errors import RecipeError
from pocl_ds.models.cost import activation_bytes, model_shape
from pocl_ds.models.estimate import Choice, training_memory
from pocl_ds.models.heads import head_of, hidden_states
from pocl_ds.models.quiet import quiet

# torch's counter knows the kernels of GPUs only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        sdpa_flop_count(query, key, value)
    )
}
NAMES, RANKS, STEPS = ("S", "A", "B"), (1, 2), 3


def run(
    arguments: Sequence[str] = (), out: Callable[[str], None] = print, *, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Print and return a row for each pair, number of ranks and mode. arguments: names of
    workloads; S, A and B without.
    """
    for name in arguments:
        if name not in WORKLOADS:
            raise RecipeError(f"there is no workload {name!r}: take {', '.join(WORKLOADS)}")
    rows = []
    out(f"{'workload, ranks, teacher':<28}{'predicted':>12}{'measured':>12}   measured/predicted")
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        for name in arguments or NAMES:
            folder = Path(folder_name) / name
            with quiet():
                write_models(WORKLOADS[name], folder)
            for ranks in RANKS:
                base = max(_peaks("idle", name, folder, ranks, steps))
                for mode, variant in (
                    ("online", "zero3"),
                    ("cached_hidden_states", "zero3+stored"),
                ):
                    if (
                        mode == "cached_hidden_states"
                    ):  # what teaching takes must not count: it is another process, in a run too
                        _peaks(variant, name, folder, ranks, 1)
                        shutil.rmtree(folder / f"run-{variant}-{ranks}" / "train")
                    predicted = (
                        sum(predict(WORKLOADS[name], ranks, mode, base * 2**20).values()) / 2**20
                    )
                    measured = max(_peaks(variant, name, folder, ranks, steps))
                    rows.append(
                        {
                            "name": name,
                            "ranks": ranks,
                            "mode": mode,
                            "predicted": predicted,
                            "measured": measured,
                            "base": base,
                        }
                    )
                    out(
                        f"{f'{name}, {ranks}, {mode}':<28}{predicted:>8.0f} MiB{measured:>8.0f} "
                        f"MiB   {measured / predicted:.3f}"
                    )
            counted, formula = flops(WORKLOADS[name])
            out(
                f"{name}: forward of the student {counted / 1e9:.2f} GFLOP by torch's counter, "
                f"{formula / 1e9:.2f} by formula: "
                f"{formula / counted:.4f}"
            )
    return rows


def _peaks(variant: str, name: str, folder: Path, ranks: int, steps: int) -> list[float]:
    """MiB of each rank at its fullest."""
    arguments = [variant, name, str(folder), str(steps), str(folder / "out.json")]
    found = run_ranks(
        variant,
        "pocl_ds.bench.step_worker",
        arguments,
        folder / "out.json",
        ranks=ranks,
        threads=max(1, (os.cpu_count() or 1) // ranks),
    )
    return [float(peak) for peak in found["peaks_mib"]]


def predict(work: Workload, ranks: int, mode: str, base: float) -> dict[str, float]:
    """Bytes of one rank at its fullest, by what holds them, as `pocl estimate` has them; base: without
    a model.
    """
    lengths = np.array([whole for _, whole in work.lengths], np.int64)
    mine = deal(
        lengths,
        ranks=ranks,
        micro_batch_size=max(1, len(lengths) // ranks),
        micro_batch_tokens=None,
        packed=True,
    )[0][0]
    loss_tokens = sum(work.lengths[i][1] - max(work.lengths[i][0], 1) for i in mine)
    student, teacher = (LlamaConfig(**shape) for shape in (work.student, work.teacher))

    def activations(of: Sequence[int], checkpointing: bool) -> float:
        return activation_bytes(
            student, of, dtype=torch.float32, attention="per_sample", checkpointing=checkpointing
        )

    choice = Choice(len(mine), mode=mode, dtype="float32", teacher_dtype="float32")
    return training_memory(
        model_shape(student),
        model_shape(teacher),
        choice,
        ranks,
        lengths[mine].tolist(),
        loss_tokens,
        activations,
        base,
        gloo=True,
    )


def flops(work: Workload) -> tuple[float, float]:
    """Forward of the student over the workload: by torch's counter, attention at half its square,
    and by our formula.
    """
    config: Any = LlamaConfig(**work.student)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="per_sample").eval()
    lengths = tuple(whole for _, whole in work.lengths)
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.no_grad():
        states = hidden_states(model, ids, None, positions, lengths)
        head_of(model).product(states[0, : work.loss_tokens])
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "attention" in str(op))
    return sum(counts.values()) - attention / 2, model_shape(config).forward_flops(
        lengths, work.loss_tokens
    )
