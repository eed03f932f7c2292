"""The stage `respond`: the teacher answers every training prompt once, for sequence-level
distillation (Kim and Rush 2016).

The result is an encoded split like data/train, row by row, with the teacher's responses in the
student's tokens: the two need not share a vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from pocl_ds.config import (
    GenerationConfig,
    PolicyConfig,
    PromptConfig,
    StudentConfig,
    TeacherConfig,
)
from pocl_ds.data.records import Sample, read_normalised
from pocl_ds.data.tokenized import Encoder, encode_split
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, Sampling, decode
from pocl_ds.models.load import load_tokenizer, resolve_model
from pocl_ds.runtime.tracking import Progress
from pocl_ds.workflow.run_dir import RunDirectory, atomic_directory, whole_result, write_manifest

log = logging.getLogger("pocl_ds")

STAGE = "generate-teacher"
ROUNDS = 4  # calls of the engine hold so many times max_num_seqs prompts


def respond(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    prompt: PromptConfig,
    policy: PolicyConfig,
    generation: GenerationConfig,
    seed: int,
    fingerprint: str,
    threads: int | None = None,
) -> None:
    """Write responses/, whose split `train` has the rows of data/train. generation: the engine, as
    scoring has it.
    """
    if whole_result(run.teacher_responses, fingerprint):
        return
    start, path, student_path = time.monotonic(), resolve_model(teacher), resolve_model(student)
    asked = load_tokenizer(
        path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision
    )
    learns = load_tokenizer(
        student_path, trust_remote_code=student.trust_remote_code, revision=student.revision
    )
    whole = prompt.model_copy(update={"overlong": "truncate"})  # rows stay those of data/train
    generator = open_generator(
        path,
        generation.model_copy(update={"dtype": teacher.dtype}),
        asked,
        threads=threads,
        max_length=prompt.max_prompt_tokens + policy.max_new_tokens,
        trust_remote_code=teacher.trust_remote_code,
        revision=teacher.revision,
        instead="score.generation.backend=transformers",
    )
    try:
        with atomic_directory(run.teacher_responses) as folder:
            samples = _answered(
                run,
                Encoder(asked, whole),
                generator,
                policy,
                seed,
                ROUNDS * generation.max_num_seqs,
            )
            counts = encode_split(samples, Encoder(learns, whole), folder, "train")
            write_manifest(
                folder,
                STAGE,
                fingerprint,
                info={
                    "samples": counts.samples,
                    "tokens": counts.response_tokens,
                    "seconds": time.monotonic() - start,
                },
            )
    finally:
        generator.close()
    log.info(
        "respond: %d responses, %.1f tokens on average",
        counts.samples,
        counts.response_tokens / max(counts.samples, 1),
    )


def _answered(
    run: RunDirectory,
    encoder: Encoder,
    generator: Generator,
    policy: PolicyConfig,
    seed: int,
    size: int,
) -> Iterator[Sample]:
    """The training samples with the teacher's response as their reference."""
    path = run.data / "train.jsonl"
    total = sum(1 for _ in read_normalised(path))
    samples, first, cut = read_normalised(path), 0, 0
    with Progress(total, "responses", STAGE) as progress:
        while part := list(itertools.islice(samples, size)):
            sampling = Sampling(
                policy.temperature, policy.top_p, policy.max_new_tokens, seed=seed, first=first
            )
            for sample, ids in zip(
                part,
                generator.write([encoder.prompt(sample) for sample in part], sampling),
                strict=True,
            ):
                ended = bool(ids) and ids[-1] in generator.stops
                cut += not ended
                yield replace(
                    sample,
                    references=(decode(encoder.tokenizer, ids, generator.stops),),
                    ended=ended,
                )
            first += len(part)
            progress.advance(len(part))
    if cut:
        log.info(
            "respond: %d of %d responses were cut at policy.max_new_tokens=%d: the student is not "
            "taught to end there",
            cut,
            total,
            policy.max_new_tokens,
        )
