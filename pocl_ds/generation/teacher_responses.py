"""The step generate-teacher: the teacher answers every training prompt once, for sequence-level
distillation (Kim and Rush 2016, arXiv 1606.07947).

The result is a tokenized split with the rows of data/train and the teacher's responses, in the
student's tokens: the two models need not share a vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping
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
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, SamplingParams, decode_response
from pocl_ds.models.load import load_teacher_tokenizer, load_tokenizer, resolve_model
from pocl_ds.models.token_checks import check_sequences, read_embedding_rows
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import atomic_directory
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

    template: whose chat template asks the teacher. generation: the engine's settings, those of
    scoring. Does nothing if the step is finished.
    """
    if finished_manifest(run.teacher_responses, fingerprint):
        return

    # Load both tokenizers. Overlong samples are cut, never dropped, so that the rows stay the same.
    start, path, student_path = time.monotonic(), resolve_model(teacher), resolve_model(student)
    student_tokenizer = load_tokenizer(
        student_path, trust_remote_code=student.trust_remote_code, revision=student.revision
    )
    teacher_tokenizer = load_teacher_tokenizer(path, teacher, student_tokenizer, template)

    # Generate the responses, and tokenize them for the student.
    rows = read_embedding_rows([(teacher, path)])
    generator = open_generator(
        path,
        generation.model_copy(update={"dtype": teacher.dtype}),
        teacher_tokenizer,
        threads=threads,
        max_length=prompt.max_prompt_tokens + policy.max_new_tokens,
        trust_remote_code=teacher.trust_remote_code,
        revision=teacher.revision,
        alternative="score.generation.backend=transformers",
    )
    tokenizer = SampleTokenizer(
        teacher_tokenizer, prompt, special_tokens_in_text=special_tokens_in_text, keep_all=True
    )
    chunk_size = BATCHES_PER_CALL * generation.max_num_seqs
    try:
        with atomic_directory(run.teacher_responses) as folder:
            samples = _answer_samples(run, tokenizer, generator, policy, seed, chunk_size, rows)
            student_samples = SampleTokenizer(
                student_tokenizer,
                prompt,
                special_tokens_in_text=special_tokens_in_text,
                keep_all=True,
            )
            counts = write_tokenized_split(samples, student_samples, folder, "train")
            info: dict[str, float] = {"samples": counts.samples, "tokens": counts.loss_tokens}
            info["seconds"] = time.monotonic() - start
            write_manifest(folder, STEP, fingerprint, info=info)
    finally:
        generator.close()
    log.info(
        "%s: %d responses, %.1f tokens on average",
        STEP,
        counts.samples,
        counts.loss_tokens / max(counts.samples, 1),
    )


def _answer_samples(
    run: RunDirectory,
    tokenizer: SampleTokenizer,
    generator: Generator,
    policy: PolicyConfig,
    seed: int,
    chunk_size: int,
    rows: Mapping[str, int],
) -> Iterator[Sample]:
    """The training samples with the teacher's response as their reference.

    rows: rows of the teacher's embedding, by its path.
    """
    path = run.data / "train.jsonl"
    total = sum(1 for _ in read_sample_file(path))
    samples, first_index, truncated = read_sample_file(path), 0, 0
    with Progress(total, "responses", STEP) as progress:
        while chunk := list(itertools.islice(samples, chunk_size)):
            # Generate the responses of a chunk.
            sampling = SamplingParams(
                policy.temperature,
                policy.top_p,
                policy.max_new_tokens,
                seed=seed,
                first_index=first_index,
            )
            prompts = [tokenizer.tokenize_prompt(sample) for sample in chunk]
            check_sequences(prompts, tokenizer.tokenizer, rows, "a prompt of the teacher")
            responses = generator.generate_ids(prompts, sampling, progress.advance)
            # Yield them as references, and count those that the token limit cut.
            for sample, ids in zip(chunk, responses, strict=True):
                ended = bool(ids) and ids[-1] in generator.stop_token_ids
                truncated += not ended
                text = decode_response(tokenizer.tokenizer, ids, generator.stop_token_ids)
                yield sample.with_response(text, ended=ended)
            first_index += len(chunk)
    if truncated:
        log.info(
            "%s: %d of %d responses reached policy.max_new_tokens=%d without an EOS: the student "
            "does not learn to end after them",
            STEP,
            truncated,
            total,
            policy.max_new_tokens,
        )
