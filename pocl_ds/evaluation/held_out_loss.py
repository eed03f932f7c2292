"""Loss per token of every model on held-out responses and benchmarks' references, and its KL
divergence from the teacher (METHOD 5).

Models are loaded one after the other. The teacher's hidden states at loss positions (n x d numbers)
wait in a temporary file, so its body runs once and only its head stays beside each student; logits
exist a chunk of positions at a time.

Shapes: n loss tokens (responses and their EOS), d width of a model, v ids that take part.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import EvaluateConfig, GenerationConfig, PromptConfig
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.records import Sample
from pocl_ds.data.tokenized import SampleTokenizer, TokenizedSplit, write_tokenized_split
from pocl_ds.errors import ArtifactError, DataError, ModelError
from pocl_ds.evaluation.benchmarks import HELD_OUT, chosen, split_ids
from pocl_ds.models.attention import FAMILIES, PER_SAMPLE
from pocl_ds.models.heads import (
    OutputHead,
    has_known_head,
    hidden_states,
    identity_head,
    output_head,
)
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer
from pocl_ds.models.vocab import (
    IncompatibleTokenizers,
    VocabMap,
    VocabularyAlignment,
    align_vocabularies,
)
from pocl_ds.runtime.distributed import device
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import explain_disk_errors, write_json
from pocl_ds.workflow.manifest import damaged_files, read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

RESULT, SCRATCH = "held_out.json", ".references-"
# Bytes for one chunk of logits, and the rows of v float32 numbers that are alive in it: logits,
# log-probabilities and probabilities of both sides, and their product.
CHUNK_BYTES, ROWS_ALIVE = 256 << 20, 8
TEACHER = "teacher"
OF_BENCHMARK = "benchmark/"  # before a benchmark's name, which may itself be `test`


def held_out(
    run: RunDirectory,
    config: EvaluateConfig,
    paths: Mapping[str, str],
    *,
    prompt: PromptConfig,
    benchmarks: Mapping[str, Sequence[Sample]],
    fingerprint: str,
    threads: int | None = None,
    trusted: Collection[str] = (),
) -> None:
    """Write evaluation/held_out.json: {name: {"loss", "tokens", "kl", "benchmarks": {benchmark:
    {"loss", "tokens", "kl"}}}}.

    paths: name (`teacher`, `initial`, `student`, `baseline`) -> folder or Hub name. benchmarks:
    each item counts once a reference. Both measures are nats per loss token at temperature = 1, over the
    ids that teacher and students share; the outer ones are of data/test, and missing where it is
    empty. Without a teacher there is no `kl`. A teacher with another tokenizer is left out.
    trusted: the models whose own code may run. Raises DataError where there is no token to measure.
    """
    name = f"{RESULT}.manifest.json"
    done = read_manifest(run.evaluation, name)
    if (
        done is not None
        and done.fingerprint == fingerprint
        and not damaged_files(run.evaluation, done)
    ):
        log.info("held-out loss is there already")
        return
    start = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    load, info = _Loader(dict(paths), config.generation.dtype, trusted), dict[str, Any]()
    try:
        ids = load.ids()
    except IncompatibleTokenizers:
        log.info(
            "teacher and student have different tokenizers: the students' loss is measured, "
            "without the teacher's and a KL"
        )
        students = {name: path for name, path in paths.items() if name != TEACHER}
        load, info["kl"] = _Loader(students, config.generation.dtype, trusted), False
        ids = load.ids()
    with explain_disk_errors(run.evaluation):
        run.evaluation.mkdir(parents=True, exist_ok=True)
        for left in run.evaluation.glob(
            f"{SCRATCH}*"
        ):  # of a process that was killed: a teacher's states fill a disk
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=run.evaluation) as folder:
            sets = _sets(run, config, load.encoder(prompt), benchmarks, Path(folder))
            for batches in sets.values():
                batches.check_labels(ids)
            measured = _measure_all(Path(folder), load, sets, ids)
    write_json(run.evaluation / RESULT, measured)
    info |= {
        "samples": len(sets[HELD_OUT].rows) if HELD_OUT in sets else 0,
        "ids": int(ids.allowed.sum()),
        "seconds": time.monotonic() - start,
    }
    write_manifest(
        run.evaluation,
        "held_out",
        fingerprint,
        info=info,
        files=[run.evaluation / RESULT],
        name=name,
    )


def token_sums(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    ids: VocabMap,
    teacher_hidden: Tensor | None = None,
    teacher: OutputHead | None = None,
    *,
    is_teacher: bool = False,
) -> tuple[float, float]:
    """Sums over n tokens of the cross-entropy and of KL(teacher || model), in nats at temperature = 1.

    hidden: [n, d]; labels: [n]; teacher_hidden: [n, d']; is_teacher: hidden and head are the
    teacher's own. Log-probabilities are float32, sums float64. An id masked on both sides adds
    exactly zero.
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

    def __init__(self, paths: dict[str, str], dtype: str, trusted: Collection[str]) -> None:
        self.paths, self.dtype, self.trusted = paths, dtype, trusted
        self.students = [name for name in paths if name != TEACHER]

    def model(self, name: str) -> Any:
        path, trusted = self.paths[name], name in self.trusted
        held = load_model_config(path, trust_remote_code=trusted).model_type in FAMILIES
        model: Any = load_model(
            path,
            dtype=self.dtype,
            attention=PER_SAMPLE if held else None,
            trust_remote_code=trusted,
        )
        return model.to(device()).eval().requires_grad_(False)

    def tokenizer(self, name: str) -> Any:
        return load_tokenizer(self.paths[name], trust_remote_code=name in self.trusted)

    def rows(self, name: str) -> int:
        config = load_model_config(self.paths[name], trust_remote_code=name in self.trusted)
        return int(config.get_text_config(decoder=True).vocab_size)

    def encoder(self, prompt: PromptConfig) -> SampleTokenizer:
        """Of the students' tokenizer, in which data/test is written too; references are cut, never
        left out.
        """
        return SampleTokenizer(
            self.tokenizer((self.students or [TEACHER])[0]),
            prompt.model_copy(update={"overlong": "truncate"}),
        )

    def ids(self) -> VocabMap:
        """The ids that all models share, so that every number is over the same set."""
        rows = {name: self.rows(name) for name in self.paths}
        if TEACHER not in self.paths:
            return VocabMap(min(rows.values()))
        teacher = self.tokenizer(TEACHER)
        found: list[VocabularyAlignment] = [
            align_vocabularies(teacher, self.tokenizer(name), rows[TEACHER], rows[name])
            for name in self.students
        ]
        if not found:
            return VocabMap(rows[TEACHER])
        size = min(vocabulary.size for vocabulary in found)
        shared = np.ones(size, bool)
        for vocabulary in found:
            if vocabulary.shared is not None:
                shared &= vocabulary.shared[:size]
        mapped = found[0].teacher_ids  # all students of a run share one tokenizer
        one = VocabularyAlignment(
            size, None if shared.all() else shared, "", None if mapped is None else mapped[:size]
        )
        return VocabMap.from_alignment(one).to(device())


class _Batches:
    """Rows of an encoded split in batches of like lengths, always the same ones in the same order."""

    def __init__(
        self,
        name: str,
        split: TokenizedSplit,
        rows: Sequence[int],
        pad: int,
        generation: GenerationConfig,
    ) -> None:
        self.name, self.split, self.pad = name, split, pad
        kept = np.array(rows, np.int64)
        self.rows: NDArray[np.int64] = kept[
            np.argsort(self.split.total_tokens[kept], kind="stable")
        ]
        lengths = self.split.loss_tokens[self.rows]
        self.tokens = int(np.maximum(lengths, 0).sum())
        if not self.tokens:
            raise DataError(
                f"{name} holds no tokens to measure: raise data.test_fraction, name data.test, or "
                f"set "
                "evaluate.held_out_loss=false"
            )
        self.limit, self.most = generation.max_num_batched_tokens, generation.max_num_seqs

    def __iter__(self) -> Iterator[Batch]:
        pending: list[int] = []
        for row in self.rows:  # ascending lengths: the newest is the width
            full = (len(pending) + 1) * int(self.split.total_tokens[row]) > self.limit or len(
                pending
            ) == self.most
            if pending and full:
                yield collate(self.split, pending, self.pad).to(device())
                pending = []
            pending.append(int(row))
        yield collate(self.split, pending, self.pad).to(device())

    def check_labels(self, ids: VocabMap) -> None:
        """Raises ModelError where a response holds a token that takes no part in the softmax, as
        its loss would be infinite, or a prompt one that the teacher cannot read.
        """
        found = self.split.find_disallowed_token(
            ids.allowed, prompts=ids.teacher_readable, rows=self.rows
        )
        if found is not None:
            raise ModelError(
                f"{self.name} sample {self.split.ids[found[0]].decode()} holds token id "
                f"{found[1]}, which teacher and student do "
                "not share: choose a pair that shares its tokenizer, or set evaluate.held_out_loss=false"
            )


def _sets(
    run: RunDirectory,
    config: EvaluateConfig,
    encoder: SampleTokenizer,
    benchmarks: Mapping[str, Sequence[Sample]],
    folder: Path,
) -> dict[str, _Batches]:
    """What is measured on: the test split where it has samples, and the references of each
    benchmark, encoded in `folder`.
    """
    manifest = read_manifest(run.data)
    if manifest is None:
        raise ArtifactError(f"{run.data} holds no finished data: run `pocl preprocess` first")
    pad, generation = int(manifest.info["pad_id"]), config.generation
    split, sets = TokenizedSplit.open(run.data, HELD_OUT), dict[str, _Batches]()
    if len(split):
        sets[HELD_OUT] = _Batches(
            "the test split", split, chosen(split_ids(split), config.max_samples), pad, generation
        )
    for number, (name, samples) in enumerate(benchmarks.items()):
        single = (
            replace(sample, references=(text,)) for sample in samples for text in sample.references
        )
        counts = write_tokenized_split(single, encoder, folder, str(number), texts=False)
        if counts.truncated:
            log.warning(
                "benchmark %s: %d of %d references are cut, or their prompts, for loss and KL: "
                "raise prompt.max_length "
                "or prompt.max_prompt_tokens",
                name,
                counts.truncated,
                counts.samples,
            )
        encoded = TokenizedSplit.open(folder, str(number))
        sets[f"{OF_BENCHMARK}{name}"] = _Batches(
            f"benchmark {name}", encoded, range(len(encoded)), pad, generation
        )
    return sets


def _measure_all(
    folder: Path, load: _Loader, sets: dict[str, _Batches], ids: VocabMap
) -> dict[str, Any]:
    """Each model is loaded once, the teacher first; its hidden states wait in `folder`."""
    measured: dict[str, Any] = {}
    teacher: OutputHead | None = None
    states: dict[str, Tensor] = {}
    if TEACHER in load.paths:
        teacher, states = _teacher(folder, load, sets, ids)
        measured[TEACHER] = _entry(TEACHER, None, teacher, states, sets, ids)
    for name in load.students:
        model = load.model(name)
        measured[name] = _entry(name, model, teacher, states, sets, ids)
        del model
        gc.collect()
    return measured


def _entry(
    name: str,
    model: Any,
    teacher: OutputHead | None,
    states: dict[str, Tensor],
    sets: dict[str, _Batches],
    ids: VocabMap,
) -> dict[str, Any]:
    """What is written down of a model: of the test split, and by benchmark."""
    entry: dict[str, Any] = {"benchmarks": {}}
    for key, batches in sets.items():
        loss, divergence = _measure(name, model, teacher, states.get(key), batches, ids)
        found = {"loss": loss, "tokens": batches.tokens}
        if teacher is not None:
            found["kl"] = 0.0 if model is None else divergence
        if key == HELD_OUT:
            entry |= found
        else:
            entry["benchmarks"][key.removeprefix(OF_BENCHMARK)] = found
    return entry


def _teacher(
    folder: Path, load: _Loader, sets: dict[str, _Batches], ids: VocabMap
) -> tuple[OutputHead, dict[str, Tensor]]:
    """The teacher's head and its hidden states [n, d] at loss positions, mapped from files; its
    body is freed.
    """
    model = load.model(TEACHER)
    head = _head(model)
    dtype = getattr(torch, load.dtype)
    found: dict[str, Tensor] = {}
    for number, (key, batches) in enumerate(sets.items()):
        path = folder / f"hidden-{number}"
        with path.open(
            "wb"
        ) as stream:  # with its room: a write to a mapped file that finds none ends the process
            if size := batches.tokens * head.width * dtype.itemsize:
                os.posix_fallocate(stream.fileno(), 0, size)
        states = torch.from_file(
            str(path), shared=True, size=batches.tokens * head.width, dtype=dtype
        ).view(-1, head.width)
        done = 0
        with (
            torch.inference_mode(),
            Progress(len(batches.rows), "samples", f"{batches.name}, teacher") as progress,
        ):
            for batch in batches:
                hidden = _states(
                    model, replace(batch, input_ids=ids.teacher_inputs(batch.input_ids))
                )
                states[done : done + len(hidden)] = hidden.to(states.device)
                done += len(hidden)
                progress.advance(len(batch.rows))
        found[key] = states
    return head, found


@torch.inference_mode()
def _measure(
    name: str,
    model: Any,
    teacher: OutputHead | None,
    states: Tensor | None,
    batches: _Batches,
    ids: VocabMap,
) -> tuple[float, float]:
    """Loss and KL per token of a model; of the teacher itself (model None) from its kept hidden
    states.
    """
    loss = divergence = 0.0
    done = 0
    head = teacher if model is None else _head(model)
    if head is None:
        raise ValueError("a model or a teacher is needed")
    with Progress(
        len(batches.rows), "samples", f"{batches.name}, {name}", silent=model is None
    ) as progress:
        for batch in batches:
            count = len(batch.labels)
            kept = None if states is None else states[done : done + count].to(device())
            hidden = kept if model is None and kept is not None else _states(model, batch)
            one, two = token_sums(
                hidden,
                head,
                batch.labels,
                ids,
                None if model is None else kept,
                teacher,
                is_teacher=model is None,
            )
            loss, divergence, done = loss + one, divergence + two, done + count
            progress.advance(len(batch.rows), loss=loss / done)
    loss, divergence = loss / batches.tokens, divergence / batches.tokens
    beside = "" if teacher is None or model is None else f", KL to the teacher {divergence:.4f}"
    log.info("%s, %s: loss %.4f%s a token", batches.name, name, loss, beside)
    return loss, divergence


def _states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states that predict the batch's loss tokens: [n, d]."""
    return batch.at_loss_positions(hidden_states(model, *batch.inputs, split=has_known_head(model)))


def _head(model: Any) -> OutputHead:
    """The model's head; of a family that is not known what stands for one."""
    return output_head(model) if has_known_head(model) else identity_head(model)
