"""Held-out loss per token of every model, and its KL divergence from the teacher (METHOD 5).

Models are loaded one after the other. The teacher's hidden states at loss positions (n x d numbers) wait in a temporary
file, so its body runs once and only its head stays beside each student; logits exist a chunk of positions at a time.

Shapes: n loss tokens (responses and their EOS), d width of a model, v ids that take part.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.artifacts import (
    RunDirectory,
    damaged_files,
    disk_faults,
    read_manifest,
    write_json,
    write_manifest,
)
from pocl_ds.config import EvaluateConfig
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.encode import EncodedSplit
from pocl_ds.distributed import device
from pocl_ds.errors import ArtifactError, DataError, ModelError
from pocl_ds.evaluate.benchmarks import HELD_OUT, chosen, split_ids
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.heads import Head, head_of, hidden_states, splits, unsplit
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer
from pocl_ds.models.vocabulary import DifferentTokenizers, Ids, Vocabulary, reconcile
from pocl_ds.tracking import Progress

log = logging.getLogger("pocl_ds")

RESULT = "held_out.json"
# Bytes for one chunk of logits, and the rows of v float32 numbers that are alive in it: logits, log-probabilities and
# probabilities of both sides, and their product.
CHUNK_BYTES, ROWS_ALIVE = 256 << 20, 8
TEACHER = "teacher"


def held_out(
    run: RunDirectory,
    config: EvaluateConfig,
    paths: Mapping[str, str],
    *,
    fingerprint: str,
    threads: int | None = None,
) -> None:
    """Write evaluation/held_out.json: {name: {"loss", "tokens", "kl"}}.

    paths: name (`teacher`, `initial`, `student`, `baseline`) -> folder or Hub name. Both measures are nats per loss
    token of data/test at tau = 1, over the ids that teacher and students share. Without a teacher there is no `kl`.
    A teacher with another tokenizer is left out. Raises DataError where the split is empty.
    """
    name = f"{RESULT}.manifest.json"
    done = read_manifest(run.evaluation, name)
    if done is not None and done.fingerprint == fingerprint and not damaged_files(run.evaluation, done):
        log.info("held-out loss is there already")
        return
    start = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    load, info = _Loader(dict(paths), config.generation.dtype), dict[str, Any]()
    batches = _Batches(run, config)
    try:
        ids = load.ids()
    except DifferentTokenizers:
        log.info("teacher and student have different tokenizers: the students' loss is measured, without the teacher's and a KL")
        students = {name: path for name, path in paths.items() if name != TEACHER}
        load, info["kl"] = _Loader(students, config.generation.dtype), False
        ids = load.ids()
    batches.check_labels(ids)
    measured = _measure_all(run, load, batches, ids)
    write_json(run.evaluation / RESULT, measured)
    info |= {"samples": len(batches.rows), "ids": int(ids.allowed.sum()), "seconds": time.monotonic() - start}
    write_manifest(run.evaluation, "held_out", fingerprint, info=info, files=[run.evaluation / RESULT], name=name)


def token_sums(
    hidden: Tensor, head: Head, labels: Tensor, ids: Ids, teacher_hidden: Tensor | None = None, teacher: Head | None = None,
    *, is_teacher: bool = False,
) -> tuple[float, float]:
    """Sums over n tokens of the cross-entropy and of KL(teacher || model), in nats at tau = 1.

    hidden: [n, d]; labels: [n]; teacher_hidden: [n, d']; is_teacher: hidden and head are the teacher's own. Log-probabilities
    are float32, sums float64. An id masked on both sides adds exactly zero.
    """
    logits = ids.teacher_logits if is_teacher else ids.student_logits
    loss = divergence = 0.0
    rows = max(1, CHUNK_BYTES // (4 * ROWS_ALIVE * ids.size))
    for part in (slice(i, i + rows) for i in range(0, len(labels), rows)):
        log_q = torch.log_softmax(logits(head, hidden[part]).float(), dim=-1)
        loss -= float(log_q.gather(-1, labels[part, None]).double().sum())
        if teacher is None or teacher_hidden is None:
            continue
        log_p = torch.log_softmax(ids.teacher_logits(teacher, teacher_hidden[part]).float(), dim=-1)
        difference = log_p - log_q
        if ids.masked is not None:
            difference = difference.masked_fill(ids.masked, 0.0)  # -inf - -inf
        divergence += float((log_p.exp() * difference).sum(dim=-1).double().sum())
    return loss, divergence


class _Loader:
    """Loads the models of an evaluation by their names."""

    def __init__(self, paths: dict[str, str], dtype: str) -> None:
        self.paths, self.dtype = paths, dtype
        self.students = [name for name in paths if name != TEACHER]

    def model(self, name: str) -> Any:
        model: Any = load_model(self.paths[name], dtype=self.dtype, attention=PER_SAMPLE)
        return model.to(device()).eval().requires_grad_(False)

    def ids(self) -> Ids:
        """The ids that all models share, so that every number is over the same set."""
        rows = {
            name: int(load_model_config(path).get_text_config(decoder=True).vocab_size) for name, path in self.paths.items()
        }
        if TEACHER not in self.paths:
            return Ids(min(rows.values()))
        teacher = load_tokenizer(self.paths[TEACHER])
        found: list[Vocabulary] = [
            reconcile(teacher, load_tokenizer(self.paths[name]), rows[TEACHER], rows[name]) for name in self.students
        ]
        if not found:
            return Ids(rows[TEACHER])
        size = min(vocabulary.size for vocabulary in found)
        shared = np.ones(size, bool)
        for vocabulary in found:
            if vocabulary.shared is not None:
                shared &= vocabulary.shared[:size]
        mapped = found[0].teacher_ids  # all students of a run share one tokenizer
        one = Vocabulary(size, None if shared.all() else shared, "", None if mapped is None else mapped[:size])
        return Ids.of(one).to(device())


class _Batches:
    """The test split in batches of like lengths, always the same ones in the same order."""

    def __init__(self, run: RunDirectory, config: EvaluateConfig) -> None:
        manifest = read_manifest(run.data)
        if manifest is None:
            raise ArtifactError(f"{run.data} holds no finished data: run `pocl data` first")
        self.pad = int(manifest.info["pad_id"])
        self.split = EncodedSplit.open(run.data, HELD_OUT)
        kept = np.array(chosen(split_ids(self.split), config.samples), np.int64)
        self.rows: NDArray[np.int64] = kept[np.argsort(self.split.total_tokens[kept], kind="stable")]
        lengths = self.split.total_tokens[self.rows] - np.maximum(self.split.prompt_tokens[self.rows], 1)
        self.tokens = int(np.maximum(lengths, 0).sum())
        if not self.tokens:
            raise DataError("the test split holds no tokens to measure: raise data.test_fraction or name data.test")
        self.limit, self.most = config.generation.max_batched_tokens, config.generation.max_sequences

    def __iter__(self) -> Iterator[Batch]:
        pending: list[int] = []
        for row in self.rows:  # ascending lengths: the newest is the width
            full = (len(pending) + 1) * int(self.split.total_tokens[row]) > self.limit or len(pending) == self.most
            if pending and full:
                yield collate(self.split, pending, self.pad).to(device())
                pending = []
            pending.append(int(row))
        yield collate(self.split, pending, self.pad).to(device())

    def check_labels(self, ids: Ids) -> None:
        """Raises ModelError where a test token takes no part in the softmax: its loss would be infinite.

        Where ids are mapped, prompts count too: the teacher has to read them.
        """
        found = self.split.first_outside(ids.allowed, prompts=ids.teacher_ids is not None, rows=self.rows)
        if found is not None:
            raise ModelError(
                f"test sample {self.split.ids[found[0]].decode()} holds token id {found[1]}, which teacher and student do not "
                "share: choose a pair that shares its tokenizer, or set evaluate.loss=false"
            )


def _measure_all(run: RunDirectory, load: _Loader, batches: _Batches, ids: Ids) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {}
    with disk_faults(run.evaluation):
        run.evaluation.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".teacher-", dir=run.evaluation) as folder:
            teacher, states = None, None
            if TEACHER in load.paths:
                teacher, states = _teacher(Path(folder), load, batches, ids)
                loss, _ = _measure(TEACHER, None, teacher, states, batches, ids)
                measured[TEACHER] = {"loss": loss, "tokens": batches.tokens, "kl": 0.0}
            for name in load.students:
                model = load.model(name)
                loss, divergence = _measure(name, model, teacher, states, batches, ids)
                measured[name] = {"loss": loss, "tokens": batches.tokens, **({"kl": divergence} if teacher else {})}
                del model
                gc.collect()
            del states
    return measured


def _teacher(folder: Path, load: _Loader, batches: _Batches, ids: Ids) -> tuple[Head, Tensor]:
    """The teacher's head and its hidden states [n, d] at loss positions, mapped from a file; its body is freed."""
    model = load.model(TEACHER)
    head = _head(model)
    width, dtype = head.width, getattr(torch, load.dtype)
    path = folder / "hidden"
    with path.open("wb") as stream:
        stream.truncate(batches.tokens * width * dtype.itemsize)
    states = torch.from_file(str(path), shared=True, size=batches.tokens * width, dtype=dtype).view(-1, width)
    done = 0
    with torch.inference_mode(), Progress(len(batches.rows), "samples", "held-out, teacher") as progress:
        for batch in batches:
            hidden = _states(model, replace(batch, input_ids=ids.teacher_inputs(batch.input_ids)))
            states[done : done + len(hidden)] = hidden.to(states.device)
            done += len(hidden)
            progress.advance(len(batch.rows))
    return head, states


@torch.inference_mode()
def _measure(
    name: str, model: Any, teacher: Head | None, states: Tensor | None, batches: _Batches, ids: Ids
) -> tuple[float, float]:
    """Loss and KL per token of a model; of the teacher itself (model None) from its kept hidden states."""
    loss = divergence = 0.0
    done = 0
    head = teacher if model is None else _head(model)
    if head is None:
        raise ValueError("a model or a teacher is needed")
    with Progress(len(batches.rows), "samples", f"held-out, {name}", silent=model is None) as progress:
        for batch in batches:
            count = len(batch.labels)
            kept = None if states is None else states[done : done + count].to(device())
            hidden = kept if model is None and kept is not None else _states(model, batch)
            one, two = token_sums(hidden, head, batch.labels, ids, None if model is None else kept, teacher,
                                  is_teacher=model is None)
            loss, divergence, done = loss + one, divergence + two, done + count
            progress.advance(len(batch.rows), loss=loss / done)
    log.info("%s: held-out loss %.4f, KL to the teacher %.4f a token", name, loss / batches.tokens, divergence / batches.tokens)
    return loss / batches.tokens, divergence / batches.tokens


def _states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states that predict the batch's loss tokens: [n, d]."""
    return batch.at_loss_positions(hidden_states(model, *batch.inputs, split=splits(model)))


def _head(model: Any) -> Head:
    """The model's head; of a family that is not known what stands for one."""
    return head_of(model) if splits(model) else unsplit(model)
