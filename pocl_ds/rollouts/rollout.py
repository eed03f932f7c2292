"""The student writes responses while it learns: who writes, with which weights, and what that
costs.

Each rank has a writer of its own, a copy of the student outside of ZeRO-3 (vLLM beside the rank, or
transformers in it), which gets the student's weights every so many steps. After each time the
probability of the batch's longest response is compared with the trainer's own: a writer that kept
an old head would go on unseen.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import GenerationConfig, PolicyConfig, StudentConfig
from pocl_ds.curriculum.sampler import Position
from pocl_ds.data.batches import collate
from pocl_ds.data.generated import Sequences, Written
from pocl_ds.data.tokenized import shard_rows
from pocl_ds.engines.engine import Engine
from pocl_ds.errors import ResourceError
from pocl_ds.generation.protocol import Generator, Sampling
from pocl_ds.generation.subprocess_generator import ChildGenerator
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.load import load_tokenizer
from pocl_ds.models.lora import merged
from pocl_ds.models.vocab import Ids
from pocl_ds.runtime import distributed

log = logging.getLogger("pocl_ds")

WRITER = "writer.pt"  # in a checkpoint
NEVER = -1  # in place of the step whose weights a writer has: it has none
# Largest difference between the writer's log-probability of a response and the trainer's, by the
# student's type: so much a token, and so much more, as in a short one errors do not even out.
# Logits near 26 are 0.125 apart in bfloat16.
TOLERANCE = {"float32": (1e-3, 0.0), "bfloat16": (0.1, 0.5), "float16": (0.1, 0.5)}
GPU_TOLERANCE = {
    **TOLERANCE,
    "float32": (1e-2, 0.05),
}  # vLLM's attention multiplies float32 as TF32 there
# What the log says of an engine that shares a GPU with its rank, by its sleep level.
SLEEP = {
    0: "; its engine cannot sleep here and keeps its part of the GPU's memory",
    1: "; between writes its engine sleeps, with its weights in the CPU's memory",
    2: "; between writes its engine sleeps and drops its weights",
}


@dataclass
class Cost:
    """What a step's rollout took."""

    seconds: float = 0.0
    refresh_seconds: float = 0.0  # of them, until the writer had new weights and was compared
    tokens: int = 0
    staleness: int = 0  # steps since the writer got its weights


@dataclass
class Rollout:
    """The writers of all ranks, as one. Every method is called by all ranks together."""

    config: PolicyConfig
    student: StudentConfig
    path: str
    engine: Engine
    split: Sequences
    ids: Ids
    seed: int
    longest: int  # tokens of a prompt and its response
    cost: Cost = field(default_factory=Cost)
    writer: Generator | None = None
    version: int = NEVER  # the step whose weights the writer has
    held: dict[str, torch.Tensor] = field(
        default_factory=dict, repr=False
    )  # these weights on rank 0, for checkpoints

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(self.path, trust_remote_code=self.student.trust_remote_code)
        self.pad_id, self.eos_id = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        self.allowed = self.ids.allowed
        self.module: Any = self.engine.module
        self.on_gpu = distributed.device().type == "cuda"

    def write(self, rows: NDArray[np.int64], position: Position) -> Written:
        """The student's responses to the prompts of some rows, the same on all ranks; the random
        numbers follow from seed, step and place alone.
        """
        start = time.monotonic()
        self.cost = Cost()
        if self.on_gpu and self.config.rollout_backend == "vllm":
            # what torch keeps for later the writer, which wakes up now, could not have
            torch.cuda.empty_cache()
        self._refresh(position.step, rows)
        refreshed = time.monotonic() - start
        mine = shard_rows(len(rows), distributed.rank(), distributed.world_size())
        prompts = [self._prompt(int(rows[place])) for place in mine]
        sampling = Sampling(
            self.config.temperature,
            self.config.top_p,
            self.config.max_new_tokens,
            seed=self.seed * 1_000_003 + position.step,
            first=mine.start,
        )
        responses: list[list[int]] = []
        with distributed.together("write the student's responses"):
            responses = self._writer().write(prompts, sampling)
            self._writer().rest()
        everyone = [one for part in distributed.gather_objects(responses) for one in part]
        written = Written.of(
            self.split,
            rows,
            everyone,
            eos_id=self.eos_id,
            longest=self.longest,
            allowed=self.allowed,
        )
        self.cost = Cost(
            time.monotonic() - start,
            refreshed,
            sum(map(len, everyone)),
            position.step - self.version,
        )
        if self._sleep_level == 2:
            self.version = NEVER
        return written

    def snapshot(self, step: int) -> Callable[[Path], list[Path]]:
        """What writes down for a checkpoint before `step` the weights that the writer has then,
        where the student has newer ones. Rank 0 alone calls it; it may do so later.
        """
        version, held = self.version, {} if self._due(step) else self.held

        def write(folder: Path) -> list[Path]:
            if not held:
                return []
            torch.save({"step": version, "weights": held}, folder / WRITER)
            return [folder / WRITER]

        return write

    def restore(self, folder: Path) -> None:
        """Give the writer the weights that it had when the checkpoint in `folder` was written."""
        if not (folder / WRITER).is_file():
            return
        with distributed.together("give the writer its weights back"):
            state = torch.load(folder / WRITER, map_location="cpu", weights_only=True)
            self._writer().refresh(state["weights"])
            self._writer().rest()
        self.version, self.held = (
            int(state["step"]),
            state["weights"] if distributed.rank() == 0 else {},
        )

    def close(self) -> None:
        """End the writer."""
        if self.writer is not None:
            self.writer.close()

    def _prompt(self, row: int) -> list[int]:
        return [
            int(token) for token in self.split.tokens(row)[: int(self.split.prompt_tokens[row])]
        ]

    def _refresh(self, step: int, rows: NDArray[np.int64]) -> None:
        """Bring the writer the weights of this step, where it has none of since the last multiple
        of sync_weights_every.
        """
        if not self._due(step):
            return
        with distributed.together("open the writer of the student's responses"):
            writer = self._writer()
        whole = self.engine.weights(
            self.module.model
        )  # another process gets them through the CPU's memory
        weights = {
            name: weight.cpu() if self.config.rollout_backend == "vllm" else weight
            for name, weight in whole
        }
        if self.student.lora:
            weights = merged(self.module.model, weights)
        with distributed.together("give the writer the student's weights"):
            writer.refresh(weights)
        lasts = self.config.sync_weights_every > 1 and distributed.rank() == 0
        self.held = {name: weight.cpu() for name, weight in weights.items()} if lasts else {}
        del weights
        self.version = step
        self._compare(int(rows[np.argmax(self.split.loss_tokens[rows])]))

    def _due(self, step: int) -> bool:
        """Whether the writer must have new weights before it writes at a step."""
        every = self.config.sync_weights_every
        return self.version == NEVER or step // every != self.version // every

    @torch.no_grad()
    def _compare(self, row: int) -> None:
        """Raise ResourceError on all ranks where the writer gives a response another probability
        than the student.
        """
        batch, module = (
            collate(self.split, [row], self.pad_id).to(distributed.device()),
            self.module,
        )
        module.eval()
        with module.loss_head.over_all_ids():
            _, _, ce = self.engine(batch, LossTerms("sft"))
        module.train()
        tokens = [int(token) for token in self.split.tokens(row)]
        start = max(1, int(self.split.prompt_tokens[row]))
        with distributed.together("compare the writer with the student"):
            found = -float(np.sum(self._writer().log_probs([tokens], [start])[0], dtype=np.float64))
            a_token, once = (GPU_TOLERANCE if self.on_gpu else TOLERANCE)[self.student.dtype]
            if not abs(found - float(ce)) <= a_token * max(1, batch.labels.numel()) + once:
                raise ResourceError(
                    f"the writer ({self.config.rollout_backend}) gives a response {found:.4f} nats and "
                    f"the student {float(ce):.4f}: it "
                    "did not take the new weights; set policy.rollout_backend=transformers"
                )

    @property
    def _sleep_level(self) -> int:
        """What is asked of an engine between writes: with new weights before each nobody needs the
        old ones.
        """
        if self.config.rollout_backend != "vllm" or not self.on_gpu:
            return 0
        return 2 if self.config.sync_weights_every == 1 else 1

    def _writer(self) -> Generator:
        if self.writer is None:
            settings = GenerationConfig(
                backend="vllm" if self.config.rollout_backend == "vllm" else "transformers",
                max_num_seqs=self.config.max_num_seqs,
                gpu_memory_utilization=self.config.gpu_memory_utilization,
                dtype=self.student.dtype,
            )
            writer = self.writer = self._open(settings)
            note = (
                SLEEP[writer.sleep_level]
                if self.on_gpu and isinstance(writer, ChildGenerator)
                else ""
            )
            log.info(
                "the student's responses are written by %s, with its weights of every %d steps%s",
                self.config.rollout_backend,
                self.config.sync_weights_every,
                note,
            )
        return self.writer

    def _open(self, settings: GenerationConfig) -> Generator:
        trusted = self.student.trust_remote_code
        threads = torch.get_num_threads()
        if settings.backend == "vllm":
            device = _visible(distributed.device().index or 0) if self.on_gpu else None
            return ChildGenerator(
                self.path,
                settings,
                max_length=self.longest,
                threads=threads,
                trust_remote_code=trusted,
                device=device,
                sleep_level=self._sleep_level,
            )
        from pocl_ds.generation.transformers_backend import TransformersGenerator

        tokenizer = load_tokenizer(self.path, trust_remote_code=trusted)
        return TransformersGenerator(
            self.path,
            settings,
            tokenizer,
            max_length=self.longest,
            threads=threads,
            trust_remote_code=trusted,
        )


def _visible(index: int) -> str:
    """A GPU of this process as its children must name it."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[index] if index < len(names) else str(index)
