"""The teacher's final hidden states by vLLM: engines in processes next to the ranks, each with a
share of the rows. With tensor parallelism the first of each `tensor_parallel_size` ranks of a node
has an engine, which computes on the GPUs of all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import GenerationConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.curriculum.micro_batches import MicroBatches, assign_by_tokens
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import PoclError, RecipeError
from pocl_ds.generation.backends import check_backend, check_length_dependence
from pocl_ds.generation.invariance import load_reference_model
from pocl_ds.generation.vllm_hidden_states import (
    ALTERNATIVE,
    MAX_NUM_SEQS,
    HiddenStateProcess,
)
from pocl_ds.losses.cross_tokenizer import label_log_probs
from pocl_ds.models.batch_invariance import LogProbs, check_batch_invariance, choose_samples
from pocl_ds.models.checkpoint_head import load_output_head
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.log_probs import LOGIT_ROWS, response_log_probs
from pocl_ds.models.quantization import quantization_method
from pocl_ds.models.recipe_model import read_model_config
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.invariance import teacher_dtype

log = logging.getLogger("pocl_ds")

# Tokens that an engine gets at a time, in forward passes of max_batch_tokens: an engine without
# waiting sequences is underused.
PASSES_PER_BATCH = 16


class VllmSource:
    """See `HiddenStateSource`."""

    process: HiddenStateProcess | None = None  # on a rank with an engine

    def __init__(
        self,
        teacher: TeacherConfig,
        path: str,
        vocab: VocabMap,
        config: TeacherCacheConfig,
        split: TokenizedSplit,
        *,
        max_length: int,
    ) -> None:
        """Open the engines. path: of the teacher. split: to compare with transformers on.
        max_length: tokens of the longest sample. Raises RecipeError, ModelError or ResourceError
        on all ranks.
        """
        self.teacher, self.path, self.vocab, self.config = teacher, path, vocab, config
        self.dtype = teacher_dtype(teacher)
        self.max_tokens = max(config.max_batch_tokens, max_length)
        self._head: OutputHead | None = None
        with distributed.raise_on_all_ranks("open the teacher in vLLM"):
            # Find out which ranks have an engine.
            has_engine = first_of_group(config.tensor_parallel_size)
        engines = [rank for rank, has in enumerate(distributed.gather_objects(has_engine)) if has]
        self.engines = {rank: number for number, rank in enumerate(engines)}

        with self._closed_on_failure(), distributed.raise_on_all_ranks("open the teacher in vLLM"):
            check_backend("vllm", ALTERNATIVE)
            model_config = read_model_config(path, teacher)
            check_length_dependence("vllm", path, model_config, max_length, ALTERNATIVE)
            lengths = np.asarray(split.total_tokens, np.int64)
            self._rows = choose_samples(
                lengths,
                seed=0,
                max_tokens=self.max_tokens,
                packed=True,
                max_samples=MAX_NUM_SEQS,
            )
            if has_engine:
                # The reference is freed before the engine takes memory.
                self._reference = self._compute_reference(split, model_config)
                self.process = self._start(max_length)
        log.info(
            "%s: the hidden states come from vLLM, as teacher_cache.backend asks for: %d engines "
            "with %d GPUs or CPU processes each",
            STEP,
            len(engines),
            config.tensor_parallel_size,
        )

    def assign(self, lengths: NDArray[np.int64]) -> MicroBatches:
        """See `HiddenStateSource`. Ranks without an engine get empty batches."""
        # Large batches, but not so large that an engine has none.
        share = math.ceil(int(lengths.sum()) / len(self.engines))
        most = max(self.max_tokens, min(PASSES_PER_BATCH * self.max_tokens, share))
        batches = assign_by_tokens(lengths, ranks=len(self.engines), max_tokens=most, packed=True)
        nothing = [np.empty(0, np.int64)] * len(batches[0])
        return [
            batches[self.engines[rank]] if rank in self.engines else nothing
            for rank in range(distributed.world_size())
        ]

    def states(
        self, split: TokenizedSplit, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """See `HiddenStateSource`. The engine computes the next part meanwhile."""
        if self.process is None or not len(rows):
            return
        inputs = [self._inputs(split, int(row)) for row in rows]
        sequences = [ids for ids, _, _ in inputs]
        start = 0
        for count, states in self.process.hidden_states(
            sequences, [positions for _, positions, _ in inputs]
        ):
            yield rows[start : start + count], states
            start += count

    @contextlib.contextmanager
    def head(self) -> Iterator[OutputHead]:
        """See `HiddenStateSource`. It is read from the checkpoint, not from the engine, whose head
        may be divided or quantized.
        """
        if self._head is None:
            self._head = load_output_head(
                self.path,
                dtype=resolve_dtype(self.teacher.dtype),
                device=distributed.device(),
                trust_remote_code=self.teacher.trust_remote_code,
                revision=self.teacher.revision,
            )
        yield self._head

    def check(self, split: TokenizedSplit) -> dict[str, Any]:
        """See `HiddenStateSource`. A small teacher is compared with transformers too."""
        with distributed.raise_on_all_ranks("check the teacher's outputs in vLLM"):
            if self.process is None:
                return {}

            def log_probs(places: Sequence[int]) -> list[NDArray[Any]]:
                return self._log_probs(split, [self._rows[place] for place in places])

            return check_batch_invariance(
                f"{STEP}: the teacher in vLLM",
                [split.ids[row].decode() for row in self._rows],
                [int(split.loss_tokens[row]) for row in self._rows],
                log_probs,
                dtype=self.dtype,
                on_gpu=distributed.device().type == "cuda",
                remedy=f"set {ALTERNATIVE}",
                reference=self._reference,
            )

    def close(self) -> None:
        """See `HiddenStateSource`."""
        if self.process is not None:
            self.process.close()

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Within the block a failure, also of another rank's engine, closes this rank's."""
        try:
            yield
        except PoclError:
            self.close()
            raise

    def _start(self, max_length: int) -> HiddenStateProcess:
        config = self.config
        settings = GenerationConfig(
            backend="vllm",
            max_num_seqs=min(MAX_NUM_SEQS, config.max_batch_tokens),
            max_num_batched_tokens=config.max_batch_tokens,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            dtype=self.teacher.dtype,
        )
        on_gpu = distributed.device_type() == "cuda"
        return HiddenStateProcess(
            self.path,
            settings,
            max_length=max_length,
            threads=torch.get_num_threads(),
            device=distributed.visible_devices(config.tensor_parallel_size) if on_gpu else None,
            quantization=self.teacher.quantization,
            trust_remote_code=self.teacher.trust_remote_code,
            revision=self.teacher.revision,
        )

    def _inputs(
        self, split: TokenizedSplit, row: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The teacher's token ids of a row up to the last position that is needed, the positions
        whose states predict a loss token, and these tokens.
        """
        ids = self.vocab.teacher_inputs(torch.from_numpy(split.tokens(row).astype(np.int64)))
        # Token 0 has no hidden state before it, so it is never a label.
        places = np.flatnonzero(split.loss_mask(row)[1:]) + 1
        last = int(places[-1]) if len(places) else 1
        return ids.numpy()[:last], places - 1, ids.numpy()[places]

    def _log_probs(self, split: TokenizedSplit, rows: Sequence[int]) -> list[NDArray[Any]]:
        """Log-probabilities of the loss tokens of each row, over all ids of the teacher."""
        device = distributed.device()
        values = []
        for part, states in self.states(split, np.array(rows, np.int64)):
            labels = np.concatenate([self._inputs(split, int(row))[2] for row in part])
            with self.head() as head:
                hidden, ids = states.to(device), torch.from_numpy(labels).to(device)
                values.append(label_log_probs(hidden, ids, head.logits, LOGIT_ROWS).cpu())
        counts = [int(split.loss_tokens[row]) for row in rows]
        return [part.numpy() for part in torch.cat(values).split(counts)]

    def _compute_reference(
        self, split: TokenizedSplit, model_config: Any
    ) -> tuple[str, LogProbs] | None:
        """The log-probabilities of the checked rows under transformers, in float32 on the CPU. None
        if they would take longer than some seconds, or the weights are quantized, and on all ranks
        but the first.
        """
        quantized = self.teacher.quantization != "none" or quantization_method(model_config)
        if distributed.rank() or quantized:
            return None
        tokens = [
            self.vocab.teacher_inputs(torch.from_numpy(split.tokens(row).astype(np.int64))).tolist()
            for row in self._rows
        ]
        model = load_reference_model(
            self.path,
            model_config,
            sum(map(len, tokens)),
            trust_remote_code=self.teacher.trust_remote_code,
            revision=self.teacher.revision,
        )
        if model is None:
            return None
        values = []
        for row, ids in zip(self._rows, tokens, strict=True):
            (of_all_tokens,) = response_log_probs(model, [ids], [1], [np.arange(1)])
            values.append(of_all_tokens[self._inputs(split, row)[1]])
        return "transformers", lambda places: [values[place] for place in places]


def first_of_group(size: int) -> bool:
    """Whether this rank is the first of `size` consecutive ranks of its node, which share an
    engine. Raises RecipeError if the node's ranks cannot be divided into such groups.
    """
    ranks = distributed.ranks_per_node() or distributed.world_size()
    if ranks % size:
        raise RecipeError(
            f"teacher_cache.tensor_parallel_size={size} does not divide the {ranks} ranks of a "
            "node, whose GPUs the engines share: change it, or launch.ranks"
        )
    return int(os.environ.get("LOCAL_RANK", "0")) % size == 0
