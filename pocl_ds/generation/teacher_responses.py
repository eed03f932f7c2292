"""The step generate-teacher: the teacher answers every training prompt once, for sequence-level
distillation (Kim and Rush 2016, arXiv 1606.07947).

The result is a tokenized split with the rows of data/train and the teacher's responses, in the
student's tokens: the two models need not share a vocabulary.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pocl_ds.config import (
    GenerationConfig,
    PolicyConfig,
    PromptConfig,
    StudentConfig,
    TeacherConfig,
)
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.sample_tokenizer import SampleTokenizer, SpecialTokensInText
from pocl_ds.data.split_writer import write_tokenized_split
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.responders import Responder, open_responder
from pocl_ds.models.load import load_tokenizer, resolve_model
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import (
    atomic_directory,
    explain_disk_errors,
    remove_partial_directories,
)
from pocl_ds.workflow.manifest import finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

STEP = "generate-teacher"
BATCHES_PER_CALL = 4  # an engine call gets this many times max_num_seqs prompts


def generate_teacher_responses(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    prompt: PromptConfig,
    template: Literal["student", "own"],
    special_tokens_in_text: SpecialTokensInText = "allow",
    policy: PolicyConfig,
    generation: GenerationConfig,
    seed: int,
    fingerprint: str,
    threads: int | None = None,
) -> None:
    """Write teacher_responses/, whose split `train` has the rows of data/train.

    Responses are saved when they arrive, and an interrupted step continues with the samples that
    have none. template: whose chat template asks the teacher. generation: the engine's settings,
    those of scoring. Does nothing if the step is finished.
    """
    if finished_manifest(run.teacher_responses, fingerprint):
        return
    start, student_path = time.monotonic(), resolve_model(student)
    student_tokenizer = load_tokenizer(
        student_path, trust_remote_code=student.trust_remote_code, revision=student.revision
    )
    responder = open_responder(
        teacher,
        student_tokenizer,
        prompt,
        template=template,
        special_tokens_in_text=special_tokens_in_text,
        max_new_tokens=policy.max_new_tokens,
        generation=generation,
        threads=threads,
        saved="the responses so far are saved",
    )

    # Generate the responses, and tokenize them for the student. Overlong samples are cut, never
    # left out, so that the rows stay the same.
    student_samples = SampleTokenizer(
        student_tokenizer, prompt, special_tokens_in_text=special_tokens_in_text, keep_all=True
    )
    file = run.path / f"teacher_responses-{fingerprint[:16]}.jsonl"
    for abandoned in set(run.path.glob("teacher_responses-*.jsonl")) - {file}:
        abandoned.unlink()  # of another recipe
    responses = ResponseFile(file)
    chunk_size = BATCHES_PER_CALL * generation.max_num_seqs
    try:
        remove_partial_directories(run.teacher_responses)
        with atomic_directory(run.teacher_responses) as folder:
            samples = _answer_samples(run, responder, responses, policy, seed, chunk_size)
            counts = write_tokenized_split(samples, student_samples, folder, "train")
            info: dict[str, float] = {"samples": counts.samples, "tokens": counts.loss_tokens}
            info["seconds"] = time.monotonic() - start
            write_manifest(folder, STEP, fingerprint, info=info)
    finally:
        responder.close()
    responses.path.unlink()
    log.info(
        "%s: %d responses, %.1f tokens on average",
        STEP,
        counts.samples,
        counts.loss_tokens / max(counts.samples, 1),
    )


class ResponseFile:
    """The responses of an unfinished step: a line of JSON for each row, appended as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.responses: dict[int, tuple[str, bool]] = {}  # row -> text, and whether it ended
        data = path.read_bytes() if path.is_file() else b""
        complete = data[: data.rfind(b"\n") + 1]
        for line in complete.splitlines():
            try:
                row, text, ended = json.loads(line)
                self.responses[row] = str(text), bool(ended)
            except (ValueError, TypeError):  # a damaged line: its row is answered again
                continue
        # A kill may have left half a line.
        if len(complete) < len(data):
            with path.open("r+b") as stream:
                stream.truncate(len(complete))
        if self.responses:
            log.info("%s: %s has %d responses", STEP, path, len(self.responses))

    def append(self, row: int, text: str, ended: bool) -> None:
        """Add a row's response. Raises ResourceError if the disk is full."""
        self.responses[row] = text, ended
        with explain_disk_errors(self.path), self.path.open("ab") as stream:
            stream.write(json.dumps([row, text, ended]).encode() + b"\n")


def _answer_samples(
    run: RunDirectory,
    responder: Responder,
    file: ResponseFile,
    policy: PolicyConfig,
    seed: int,
    chunk_size: int,
) -> Iterator[Sample]:
    """The training samples with the teacher's response as their reference."""
    path = run.data / "train.jsonl"
    total = sum(1 for _ in read_sample_file(path))
    rows_and_samples, truncated = enumerate(read_sample_file(path)), 0
    with Progress(total, "responses", STEP) as progress:
        while chunk := list(itertools.islice(rows_and_samples, chunk_size)):
            # Generate the responses that a chunk lacks.
            missing = [entry for entry in chunk if entry[0] not in file.responses]
            progress.advance(len(chunk) - len(missing))
            for run_of_rows in _consecutive(missing):
                first_row = run_of_rows[0][0]
                sampling = SamplingParams(
                    policy.temperature,
                    policy.top_p,
                    policy.max_new_tokens,
                    seed=seed,
                    first_index=first_row,
                )
                samples = [sample for _, sample in run_of_rows]
                for index, text, ended in responder.respond(samples, sampling, progress.advance):
                    file.append(first_row + index, text, ended)
            # Yield them as references, and count those that the token limit cut.
            for row, sample in chunk:
                text, ended = file.responses.pop(row)
                truncated += not ended
                yield sample.with_response(text, ended=ended)
    if truncated:
        log.info(
            "%s: %d of %d responses reached policy.max_new_tokens=%d without an EOS: the student "
            "does not learn to end after them",
            STEP,
            truncated,
            total,
            policy.max_new_tokens,
        )


def _consecutive(entries: Sequence[tuple[int, Sample]]) -> list[list[tuple[int, Sample]]]:
    """Rows and samples, divided where a row does not follow the one before."""
    groups: list[list[tuple[int, Sample]]] = []
    for entry in entries:
        if groups and entry[0] == groups[-1][-1][0] + 1:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups
