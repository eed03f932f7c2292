"""Workloads of the benchmarks: two models with random weights, and batches of random tokens.

A: SmolLM2-135M and its 20-layer student, 8 instruction samples per step (1,100 tokens, 310 of
them responses; 1,752 with padding). S: the same samples, models of a third of the size, 12 layers
into 8. B: two-layer models of width 256 with 151,936 ids, 4 x 512 tokens, all of them responses:
the head is nearly all of the work. tail: narrow models, in which attention costs as much as the
rest at about 1,000 tokens, and 16 samples of 77 to 3,220 tokens, the quantiles of a log-normal
distribution. 4k, 16k, 64k: one sample of so many tokens, three quarters of them its response, for
models of 2 and 4 layers of width 128. tiny: a small A, for tests.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pocl_ds.runtime.distributed import device


@dataclass(frozen=True)
class Workload:
    """Two models and a batch. lengths: (prompt tokens, all tokens) of each sample.

    micro_batch_tokens: budget of a rank's micro-batch; None for the batch in one.
    """

    name: str
    teacher: Mapping[str, Any]  # fields of the family's configuration
    student: Mapping[str, Any]
    lengths: tuple[tuple[int, int], ...]
    family: str = "llama"
    micro_batch_tokens: int | None = None

    @property
    def configs(self) -> tuple[Any, Any]:
        """Configurations of the teacher and the student."""
        ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
        teacher, student = (
            AutoConfig.for_model(self.family, **shape, **ids)
            for shape in (self.teacher, self.student)
        )
        return teacher, student

    @property
    def tokens(self) -> int:
        """Tokens of a step, without padding."""
        return sum(total for _, total in self.lengths)

    @property
    def loss_tokens(self) -> int:
        """Loss tokens of a step; token 0 is never one, since nothing precedes it."""
        return sum(total - max(prompt, 1) for prompt, total in self.lengths)


_SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_SMALL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_WIDE = {
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "num_hidden_layers": 2,
}
# Heads of width 32, the smallest that vLLM supports on a CPU.
_TINY = {
    **_WIDE,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_LONG = {
    **_TINY,
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 1 << 17,
}
_NARROW = {
    **_WIDE,
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 4096,
}
# Prompt tokens and all tokens of eight instruction samples.
_INSTRUCTION_LENGTHS = (
    *((157, 219), (137, 190), (119, 165), (101, 140)),
    *((86, 120), (75, 105), (64, 90), (51, 71)),
)
_TAIL_LENGTHS = tuple(
    (20, round(500 * math.exp(NormalDist().inv_cdf((place + 0.5) / 16)))) for place in range(16)
)

WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            "A",
            {**_SMOL, "num_hidden_layers": 30},
            {**_SMOL, "num_hidden_layers": 20},
            _INSTRUCTION_LENGTHS,
        ),
        Workload(
            "S",
            {**_SMOL, **_SMALL, "num_hidden_layers": 12},
            {**_SMOL, **_SMALL, "num_hidden_layers": 8},
            _INSTRUCTION_LENGTHS,
        ),
        Workload("B", _WIDE, _WIDE, ((0, 512),) * 4),
        Workload(
            "tail",
            {**_NARROW, "num_hidden_layers": 6},
            {**_NARROW, "num_hidden_layers": 4},
            _TAIL_LENGTHS,
            micro_batch_tokens=8192,
        ),
        Workload(
            "tiny",
            {**_TINY, "num_hidden_layers": 3},
            {**_TINY, "num_hidden_layers": 2},
            ((5, 9), (3, 8), (6, 7), (2, 4)),
        ),
        *(
            Workload(
                f"{size}k",
                {**_LONG, "num_hidden_layers": 4},
                {**_LONG, "num_hidden_layers": 2},
                ((size << 8, size << 10),),
            )
            for size in (4, 16, 64)
        ),
    )
}


def random_samples(work: Workload, steps: int, seed: int = 0) -> list[list[tuple[int, list[int]]]]:
    """For every step, the prompt tokens and the ids of each sample."""
    source = np.random.default_rng(seed)
    size = work.student["vocab_size"]
    return [
        [(prompt, source.integers(3, size, total).tolist()) for prompt, total in work.lengths]
        for _ in range(steps)
    ]


def write_models(work: Workload, folder: Path) -> tuple[Path, Path]:
    """Write the teacher and the student, each with a tokenizer that has one word per id."""
    paths = write_configs(work, folder)
    for seed, (path, config) in enumerate(zip(paths, work.configs, strict=True)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return paths


def write_configs(work: Workload, folder: Path) -> tuple[Path, Path]:
    """Write the configuration and the tokenizer of the teacher and the student, without weights.

    The tokenizer has one word per id.
    """
    words = {f"w{i}": i for i in range(work.student["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w1",
        pad_token="w2",
        unk_token="w0",
    )
    paths = folder / "teacher", folder / "student"
    for path, config in zip(paths, work.configs, strict=True):
        config.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def write_batches(work: Workload, path: Path, steps: int) -> None:
    """Write the batches as JSON, for programs that do not import this package."""
    path.write_text(json.dumps(random_samples(work, steps)))


def flops(work: Workload) -> float:
    """FLOPs of a distillation step without padding, with heads at loss positions only.

    Forward takes 2 per weight and token, backward 4; the teacher runs forward only; attention
    covers each sample alone.
    """
    total, tokens = 0.0, sum(length for _, length in work.lengths)
    for shape, passes in ((work.teacher, 1), (work.student, 3)):
        d, layers = shape["hidden_size"], shape["num_hidden_layers"]
        kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
        weights = layers * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate_size"])
        # Causal attention: half of each square.
        attention = layers * sum(2 * length * (length + 1) * d for _, length in work.lengths)
        head = d * shape["vocab_size"] * work.loss_tokens
        total += passes * (2 * weights * tokens + attention + 2 * head)
    return total


def gemm_rate(threads: int, seconds: float = 1.0) -> float:
    """FLOP/s of matrix products on this machine, the best of shapes like those of these models;
    float32 on a CPU, bfloat16 on a GPU.
    """
    torch.set_num_threads(threads)
    own_device, best = device(), 0.0
    on_gpu = own_device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    shapes = (
        [(8192, 8192, 8192)] if on_gpu else [(1024, 1024, 1024), (512, 576, 1536), (512, 1536, 576)]
    )
    for m, k, n in shapes:
        a, b = (
            torch.randn(m, k, device=own_device, dtype=dtype),
            torch.randn(k, n, device=own_device, dtype=dtype),
        )
        torch.mm(a, b)
        wait()
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(shapes):
            torch.mm(a, b)
            rounds += 1
            wait()
        best = max(best, 2.0 * m * k * n * rounds / (time.perf_counter() - start))
    return best
