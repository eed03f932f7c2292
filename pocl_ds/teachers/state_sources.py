"""What the teacher cache is filled from: the teacher's final hidden states for rows of a split, by
transformers (this file) or by vLLM (`vllm_source`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import TeacherCacheConfig, TeacherConfig, ds_config
from pocl_ds.curriculum.micro_batches import MicroBatches, assign_by_tokens
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import sharded_loading, start_deepspeed
from pocl_ds.models.batch_invariance import choose_samples
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import OutputHead, supports_packing
from pocl_ds.models.recipe_model import ModelLoader, zero_sizes
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.invariance import check_teacher, teacher_dtype
from pocl_ds.teachers.routed import free_memory
from pocl_ds.teachers.teacher import OnlineTeacher


class HiddenStateSource(Protocol):
    """A teacher that reads rows of a split. All ranks call every method together."""

    vocab: VocabMap

    def assign(self, lengths: NDArray[np.int64]) -> MicroBatches:
        """Divide samples of these lengths into batches for `states`, as many on each rank."""

    def states(
        self, split: TokenizedSplit, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The states of this rank's rows at their loss tokens, part by part: some of the rows, and
        their states [loss tokens, width].
        """

    def head(self) -> contextlib.AbstractContextManager[OutputHead]:
        """The teacher's output head, with its weights on this rank inside the block."""

    def check(self, split: TokenizedSplit) -> dict[str, Any]:
        """Check on a few rows that the states do not depend on the batch. Returns what the manifest
        records. Raises ModelError on all ranks.
        """

    def close(self) -> None:
        """Free the teacher."""


class TransformersSource:
    """See `HiddenStateSource`: the teacher that also trains online, on all ranks."""

    def __init__(
        self,
        config: TeacherConfig,
        path: str,
        vocab: VocabMap,
        *,
        max_batch_tokens: int,
        load: ModelLoader,
    ) -> None:
        """Load the model in a folder, in shards if ZeRO-3 is configured."""
        teacher_ds_config = ds_config.resolve_teacher(
            config.ds_config,
            dtype=resolve_dtype(config.dtype),
            ranks=distributed.world_size(),
            micro_batch_size=1,
            sizes=zero_sizes(path, config),
        )
        if teacher_ds_config:
            start_deepspeed()
        with sharded_loading(teacher_ds_config):
            model = load(path, config, None)
        self.teacher = OnlineTeacher(model, teacher_ds_config, vocab)
        self.path, self.vocab = path, vocab
        self.packed = supports_packing(model)
        self.max_batch_tokens, self.dtype = max_batch_tokens, teacher_dtype(config)

    def assign(self, lengths: NDArray[np.int64]) -> MicroBatches:
        """See `HiddenStateSource`."""
        return assign_by_tokens(
            lengths,
            ranks=distributed.world_size(),
            max_tokens=max(self.max_batch_tokens, int(lengths.max(initial=1))),
            packed=self.packed,
        )

    def states(
        self, split: TokenizedSplit, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """See `HiddenStateSource`. Without rows it runs one token, as ZeRO-3 needs all ranks."""
        yield rows, self.teacher.outputs(self._batch(split, rows))

    def head(self) -> contextlib.AbstractContextManager[OutputHead]:
        """See `HiddenStateSource`."""
        return self.teacher.head()

    def check(self, split: TokenizedSplit) -> dict[str, Any]:
        """See `HiddenStateSource`."""
        lengths = np.asarray(split.total_tokens, np.int64)
        rows = choose_samples(
            lengths,
            seed=0,
            max_tokens=max(self.max_batch_tokens, int(lengths.max(initial=1))),
            packed=self.packed,
        )
        return check_teacher(
            f"{STEP}: the teacher {self.path}",
            self.teacher,
            split,
            rows,
            lambda batch_rows: self._batch(split, batch_rows),
            dtype=self.dtype,
        )

    def close(self) -> None:
        """See `HiddenStateSource`."""
        self.teacher.close()
        del self.teacher
        free_memory()

    def _batch(self, split: TokenizedSplit, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        return collate(split, rows, packed=self.packed).to(distributed.device())


@dataclass(frozen=True)
class SourceFactory:
    """Opens a teacher as a source of hidden states. path: of the teacher. max_length: tokens of the
    longest sample of all splits. load: see `build_trainer`.
    """

    teacher: TeacherConfig
    path: str
    vocab: VocabMap
    config: TeacherCacheConfig
    max_length: int
    load: ModelLoader

    @contextlib.contextmanager
    def open(
        self, backend: Literal["transformers", "vllm"], split: TokenizedSplit
    ) -> Iterator[HiddenStateSource]:
        """The teacher in one of the backends, within the block. split: to compare vLLM with
        transformers on. All ranks call it together. Raises ModelError or ResourceError.
        """
        source: HiddenStateSource
        if backend == "vllm":
            # Imported only here: transformers needs nothing of it.
            from pocl_ds.teachers.vllm_source import VllmSource

            source = VllmSource(
                self.teacher, self.path, self.vocab, self.config, split, max_length=self.max_length
            )
        else:
            source = TransformersSource(
                self.teacher,
                self.path,
                self.vocab,
                max_batch_tokens=self.config.max_batch_tokens,
                load=self.load,
            )
        try:
            yield source
        finally:
            source.close()
