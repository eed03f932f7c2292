"""Loss per token of every model on held-out responses and on benchmarks' references, and its KL
divergence from the teacher (docs/method.md, eq. 2 and 11).

Models are loaded one after the other. The teacher's hidden states at loss positions go to a
temporary file, so its backbone runs once and only its head stays in memory with each student. One
chunk of logits exists at a time.

Shapes: n loss tokens (responses and their EOS), d width of a model, v ids that models share.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pocl_ds.config import EvaluateConfig, PromptConfig, TeacherConfig, semantic_fields
from pocl_ds.data.batches import Batch
from pocl_ds.data.conversation import Sample
from pocl_ds.data.sample_tokenizer import SpecialTokensInText
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.evaluation.answers import HELD_OUT_LOSS
from pocl_ds.evaluation.benchmarks import TEST_SPLIT, external_benchmarks
from pocl_ds.evaluation.evaluated_models import TEACHER, ModelLoader, model_identity
from pocl_ds.evaluation.held_out_data import HeldOutReader, HeldOutSet
from pocl_ds.losses.divergences import fkl, log_probabilities
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import (
    OutputHead,
    has_known_head,
    hidden_states,
    identity_head,
    output_head,
)
from pocl_ds.models.vocab import IncompatibleTokenizers, VocabMap
from pocl_ds.runtime.distributed import device
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import explain_disk_errors, write_json
from pocl_ds.workflow.manifest import fingerprint, read_part, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

TEMPORARY_PREFIX = ".references-"
# Bytes of one chunk, and how many float32 rows of v numbers it holds at once: logits and
# log-probabilities of both models, the teacher's probabilities, and products.
CHUNK_BYTES, FLOAT32_ROWS = 256 << 20, 8


def measure_held_out_loss(
    run: RunDirectory,
    config: EvaluateConfig,
    prompt: PromptConfig,
    paths: Mapping[str, str],
    *,
    teacher: TeacherConfig | None = None,
    teacher_template: Literal["student", "own"] = "student",
    special_tokens_in_text: SpecialTokensInText = "allow",
    threads: int | None = None,
    trusted: Collection[str] = (),
) -> None:
    """Write evaluation/held_out_loss.json: {model: {"loss", "tokens", "kl", "benchmarks":
    {benchmark: {"loss", "tokens", "kl"}}, "samples": {"ids", "tokens", "loss", "kl"}}}.

    Loss and KL are in nats per loss token at temperature 1, over the ids that teacher and students
    share. The outer ones are those of data/test, and missing if it is empty; `samples` are its
    samples with the sums over the tokens of each. Benchmarks count every
    reference. There is no KL without a teacher; a teacher with another tokenizer is left out. A
    finished result is reused.

    Args:
        paths: model (`teacher`, `initial`, `student`, `baseline`) -> folder or Hub name.
        teacher: as the recipe has it, for a warning if training uses another teacher.
        teacher_template: whose template writes the prompts that the teacher reads, as in training.
        special_tokens_in_text: `data.special_tokens_in_text`, as for training.
        trusted: the models whose own Python code may run.

    Raises:
        DataError: there is no token to compute a loss of.
        ModelError: the data holds a token that teacher and student do not share.
    """
    if not config.held_out_loss:
        return
    if teacher and TEACHER in paths:
        _warn_of_other_teacher(teacher)

    # Stop if there is nothing to measure, or the result is up to date.
    test_split = TokenizedSplit.open(run.data, TEST_SPLIT)
    benchmarks = external_benchmarks(run, config)
    if not len(test_split) and not benchmarks:
        return
    texts = teacher_template, special_tokens_in_text
    expected = _fingerprint(config, prompt, texts, paths, test_split, benchmarks)
    manifest_name = f"{HELD_OUT_LOSS}.manifest.json"
    manifest = read_part(run.evaluation, manifest_name)
    if manifest is not None and manifest.fingerprint == expected:
        log.info("the held-out loss is up to date")
        return

    # Measure, and write the result with its manifest.
    start = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    models = ModelLoader(dict(paths), resolve_dtype(config.generation.dtype), trusted)
    reader = HeldOutReader(run, config, prompt, benchmarks, special_tokens_in_text)
    losses, info = _measure(run, models, reader, own_prompts=teacher_template == "own")
    write_json(run.evaluation / HELD_OUT_LOSS, losses)
    write_manifest(
        run.evaluation,
        "held_out_loss",
        expected,
        info={**info, "seconds": time.monotonic() - start},
        files=[run.evaluation / HELD_OUT_LOSS],
        name=manifest_name,
    )


def token_losses(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    ids: VocabMap,
    teacher_hidden: Tensor | None = None,
    teacher: OutputHead | None = None,
    *,
    is_teacher: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL(teacher || model) of each of n tokens, in nats: [n] float64 on the CPU.

    The temperature is 1. Log-probabilities are float32.

    Args:
        hidden: [n, d] hidden states of the model.
        labels: [n] token ids.
        teacher_hidden: [n, d'] hidden states of the teacher; None gives a KL of 0.
        is_teacher: `hidden` and `head` are the teacher's own.
    """
    logits = ids.teacher_logits if is_teacher else ids.student_logits
    loss, divergence = (torch.zeros(len(labels), dtype=torch.float64) for _ in range(2))
    rows = max(1, CHUNK_BYTES // (4 * FLOAT32_ROWS * ids.size))
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        log_q = log_probabilities(logits(head, hidden[part]), 1.0, torch.float32)
        loss[part] = -log_q.gather(-1, labels[part, None])[:, 0].double().cpu()
        if teacher is not None and teacher_hidden is not None:
            teacher_logits = ids.teacher_logits(teacher, teacher_hidden[part])
            log_p = log_probabilities(teacher_logits, 1.0, torch.float32)
            divergence[part] = fkl(log_p, log_q).double().cpu()
    return loss, divergence


def _warn_of_other_teacher(teacher: TeacherConfig) -> None:
    """Warn if the teacher that is evaluated is not exactly the one of training."""
    if teacher.ensemble:
        log.warning(
            "the KL to the teacher is computed with %s alone, while training uses a mixture of %d "
            "teachers",
            teacher.model,
            1 + len(teacher.ensemble),
        )
    if teacher.routes_field:
        log.warning(
            "the KL to the teacher is computed with %s alone, while training also uses those of %s",
            teacher.model,
            teacher.routes_field,
        )
    if teacher.quantization != "none":
        log.warning(
            "the teacher is evaluated without quantization, while training quantizes it to %s",
            teacher.quantization,
        )


def _fingerprint(
    config: EvaluateConfig,
    prompt: PromptConfig,
    texts: tuple[str, str],
    paths: Mapping[str, str],
    test_split: TokenizedSplit,
    benchmarks: Mapping[str, Sequence[Sample]],
) -> str:
    rows = select_by_hash(test_split.ids, config.max_samples)
    return fingerprint(
        [
            "sums of each sample",
            {model: model_identity(path) for model, path in paths.items()},
            resolve_dtype(config.generation.dtype),
            semantic_fields(prompt),
            texts,
            [bytes(test_split.ids[row]).decode() for row in rows],
            {name: [sample.to_json() for sample in items] for name, items in benchmarks.items()},
        ]
    )


def _measure(
    run: RunDirectory, models: ModelLoader, reader: HeldOutReader, *, own_prompts: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of held_out_loss.json, and what its manifest records.

    own_prompts: the teacher reads prompts of its own template.
    """
    # Find the ids that all models share; leave out a teacher that splits text differently.
    info: dict[str, Any] = {}
    try:
        ids = models.shared_ids()
    except IncompatibleTokenizers:
        log.info(
            "teacher and student have different tokenizers: only the students' loss is measured, "
            "without a KL to the teacher"
        )
        info["kl"] = False
        students = {name: path for name, path in models.paths.items() if name != TEACHER}
        models = ModelLoader(students, models.dtype, models.trusted)
        ids = models.shared_ids()

    with explain_disk_errors(run.evaluation):
        # Remove the files of a killed process: a teacher's hidden states can fill a disk.
        run.evaluation.mkdir(parents=True, exist_ok=True)
        for abandoned in run.evaluation.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=run.evaluation) as temporary:
            folder = Path(temporary)
            sets = reader.read(models, ids, folder, own_prompts=own_prompts)
            losses = _measure_models(folder, models, sets, ids)
    info["samples"] = sum(len(held_out.rows) for held_out in sets if held_out.benchmark is None)
    info["ids"] = int(ids.allowed.sum())
    return losses, info


def _measure_models(
    folder: Path, models: ModelLoader, sets: Sequence[HeldOutSet], ids: VocabMap
) -> dict[str, Any]:
    """Load each model once, the teacher first, and measure it. Temporary files are in `folder`."""
    losses: dict[str, Any] = {}
    teacher: OutputHead | None = None
    teacher_states: Sequence[Tensor | None] = [None] * len(sets)
    if TEACHER in models.paths:
        teacher, teacher_states = _run_teacher(folder, models, sets, ids)
        losses[TEACHER] = _measure_model(TEACHER, None, teacher, teacher_states, sets, ids)
    for name in models.students:
        model = models.model(name)
        losses[name] = _measure_model(name, model, teacher, teacher_states, sets, ids)
        del model
        gc.collect()
    return losses


def _measure_model(
    name: str,
    model: Any,
    teacher: OutputHead | None,
    teacher_states: Sequence[Tensor | None],
    sets: Sequence[HeldOutSet],
    ids: VocabMap,
) -> dict[str, Any]:
    """A model's entry in held_out_loss.json. model: None for the teacher."""
    entry: dict[str, Any] = {"benchmarks": {}}
    for held_out, states in zip(sets, teacher_states, strict=True):
        sums = _measure_set(name, model, teacher, states, held_out, ids)
        tokens, loss, divergence = (sum(values) for values in sums.values())
        numbers: dict[str, Any] = {"loss": loss / tokens, "tokens": tokens}
        if teacher is not None:
            numbers["kl"] = divergence / tokens
        if held_out.benchmark is None:
            sample_ids = [bytes(held_out.split.ids[row]).decode() for row in held_out.rows]
            entry |= {**numbers, "samples": {"ids": sample_ids, **sums}}
        else:
            entry["benchmarks"][held_out.benchmark] = numbers
    return entry


def _run_teacher(
    folder: Path, models: ModelLoader, sets: Sequence[HeldOutSet], ids: VocabMap
) -> tuple[OutputHead, list[Tensor]]:
    """The teacher's head, and its hidden states [n, d] for each set, mapped from files.

    Its backbone is freed.
    """
    model = models.model(TEACHER)
    head = _head(model)
    dtype = getattr(torch, models.dtype)
    all_states = []
    for number, held_out in enumerate(sets):
        # Reserve the file's space: a write to a mapped file on a full disk kills the process.
        path, count = folder / f"hidden-{number}", held_out.loss_tokens * head.width
        with path.open("wb") as stream:
            if count:
                os.posix_fallocate(stream.fileno(), 0, count * dtype.itemsize)
        states = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        states = states.view(-1, head.width)

        # Fill it in the order of the batches.
        start = 0
        with (
            torch.inference_mode(),
            Progress(len(held_out.rows), "samples", f"{held_out.label}, teacher") as progress,
        ):
            for batch in held_out.teacher_batches(ids):
                hidden = _loss_states(model, batch)
                states[start : start + len(hidden)] = hidden.to(states.device)
                start += len(hidden)
                progress.advance(len(batch.rows))
        all_states.append(states)
    return head, all_states


@torch.inference_mode()
def _measure_set(
    name: str,
    model: Any,
    teacher: OutputHead | None,
    teacher_states: Tensor | None,
    held_out: HeldOutSet,
    ids: VocabMap,
) -> dict[str, list[Any]]:
    """Loss tokens of each row, and the sums of loss and KL over them: `tokens`, `loss`, `kl`.

    model: None for the teacher, whose hidden states exist already.
    """
    is_teacher = model is None
    head = teacher if is_teacher else _head(model)
    assert head is not None
    places = {int(row): place for place, row in enumerate(held_out.rows)}
    sums = torch.zeros(3, len(places), dtype=torch.float64)  # tokens, loss, KL
    done = 0
    with Progress(
        len(held_out.rows), "samples", f"{held_out.label}, {name}", silent=is_teacher
    ) as progress:
        for batch in held_out:
            stored = None
            if teacher_states is not None:
                stored = teacher_states[done : done + len(batch.labels)].to(device())
            if is_teacher and stored is not None:
                losses = token_losses(stored, head, batch.labels, ids, is_teacher=True)
            else:
                hidden = _loss_states(model, batch)
                losses = token_losses(hidden, head, batch.labels, ids, stored, teacher)
            batch_places = torch.tensor([places[row] for row in batch.rows])
            of_token = batch_places[batch.sample_of_token.cpu()]
            sums.index_add_(1, of_token, torch.stack([torch.ones_like(losses[0]), *losses]))
            done += len(batch.labels)
            progress.advance(len(batch.rows), loss=float(sums[1].sum()) / done)
    _, loss, divergence = (sums.sum(1) / done).tolist()
    kl = "" if teacher is None or is_teacher else f" kl_to_teacher={divergence:.4f}"
    log.info("%s, %s: loss=%.4f%s (nats per token)", held_out.label, name, loss, kl)
    return {"tokens": sums[0].int().tolist(), "loss": sums[1].tolist(), "kl": sums[2].tolist()}


def _loss_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states that predict the batch's loss tokens: [n, d]."""
    return batch.at_loss_positions(hidden_states(model, *batch.inputs, split=has_known_head(model)))


def _head(model: Any) -> OutputHead:
    """The model's head; for an unknown family one that passes the model's own logits on."""
    return output_head(model) if has_known_head(model) else identity_head(model)
