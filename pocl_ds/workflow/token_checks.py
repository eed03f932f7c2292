"""Checks that models can read the token ids that a recipe produces, before a model is loaded."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pocl_ds.config import ModelSource, PromptConfig, Recipe, StudentConfig, TeacherConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.preprocess import TEACHER_DIRECTORY
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.teacher_prompts import compare_prompts
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import DataError
from pocl_ds.models.load import load_tokenizer, resolve_model
from pocl_ds.models.token_checks import (
    SHARE_A_TOKENIZER,
    check_sequences,
    check_split,
    read_embedding_rows,
    rows_by_reader,
    warn_of_tokens_beyond_rows,
)
from pocl_ds.models.vocab import VocabMap, align_teacher_vocabularies
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.step_inputs import evaluated_models

log = logging.getLogger("pocl_ds")

# Limits that a short conversation cannot reach.
NO_LIMITS = {"max_prompt_tokens": 1 << 20, "max_length": 1 << 21}


def check_template_tokens(
    recipe: Recipe, student: StudentConfig, teacher: TeacherConfig | None
) -> None:
    """Check the tokens that the template and the tokenizer add to every sample, before the data are
    encoded.

    Raises ModelError if one is beyond the rows of the student's embedding, or of the teacher's
    where the teacher reads prompts in its own tokens.
    """
    sources: list[ModelSource] = [student]
    if teacher and _teacher_reads_its_tokens(recipe):
        sources.append(teacher)
    for source in sources:
        path = resolve_model(source)
        tokenizer = _load_tokenizer(source)
        rows = read_embedding_rows([(source, path)])
        warn_of_tokens_beyond_rows(tokenizer, rows)
        ids = _probe_ids(tokenizer, recipe.prompt)
        label = f"every sample in prompt.template={recipe.prompt.template}"
        check_sequences([ids], tokenizer, rows, label)


def check_data_tokens(
    run: RunDirectory, recipe: Recipe, student: StudentConfig, teacher: TeacherConfig | None
) -> None:
    """Check that student and teacher can read every token of the data, and share those that train.
    Does nothing before `preprocess` has finished.

    Raises ModelError, whose message names the sample and the token.
    """
    if read_manifest(run.data) is None:
        return
    own = (student, resolve_model(student))
    own_rows = read_embedding_rows([own])
    vocab = own_vocab = VocabMap(own_rows[own[1]])
    rows = own_rows
    if teacher and recipe.needs_shared_vocabulary:
        teachers = [(source, resolve_model(source)) for source in teacher.sources]
        vocab = VocabMap.from_alignment(align_teacher_vocabularies(teachers, *own))
        rows = rows_by_reader(vocab, own, teachers)
    tokenizer = _load_tokenizer(student)
    for name in ("train", "validation"):
        check_split(TokenizedSplit.open(run.data, name), vocab, tokenizer, rows)

    # The test split needs shared tokens only for the teacher's loss.
    test = TokenizedSplit.open(run.data, "test")
    check_split(test, own_vocab, tokenizer, own_rows, label="the test split: ")
    if recipe.evaluate.held_out_loss and "teacher" in evaluated_models(recipe):
        members = np.array(select_by_hash(test.ids, recipe.evaluate.max_samples), np.int64)
        check_split(
            test,
            vocab,
            tokenizer,
            rows,
            label="the test split: ",
            members=members,
            remedy=SHARE_A_TOKENIZER,
        )

    # A teacher with another tokenizer reads the same samples in its own tokens.
    if teacher and recipe.cross_tokenizer:
        teacher_rows = read_embedding_rows([(teacher, resolve_model(teacher))])
        teacher_vocab = VocabMap(*teacher_rows.values())
        teacher_tokenizer = _load_tokenizer(teacher)
        for name in ("train", "validation"):
            split = TokenizedSplit.open(run.data / TEACHER_DIRECTORY, name)
            check_split(
                split, teacher_vocab, teacher_tokenizer, teacher_rows, label="for the teacher, "
            )


def _teacher_reads_its_tokens(recipe: Recipe) -> bool:
    """Whether a step gives the teacher prompts in its own tokens and template."""
    return (
        recipe.cross_tokenizer
        or recipe.policy.uses_teacher_responses
        or "teacher" in evaluated_models(recipe)
    )


def _load_tokenizer(source: ModelSource) -> Any:
    return load_tokenizer(
        resolve_model(source),
        trust_remote_code=source.trust_remote_code,
        revision=source.revision,
    )


def _probe_ids(tokenizer: Any, prompt: PromptConfig) -> list[int]:
    """The ids of a short conversation, with what template and tokenizer add; none if the template
    refuses it, since it may accept those of the data.
    """
    sample = Sample.from_instruction("probe", "Hello!", "Hi.")
    encoder = SampleTokenizer(tokenizer, prompt.model_copy(update=NO_LIMITS), keep_all=True)
    try:
        return encoder.tokenize(sample).ids
    except DataError:
        return []


def tell_teacher_prompts(recipe: Recipe, tokenizer: Any, student_tokenizer: Any) -> None:
    """Log what the teacher reads where its own template or BOS differs from the student's.

    tokenizer: the teacher's.
    """
    uses_template = recipe.prompt.template == "chat"
    if uses_template and not getattr(tokenizer, "chat_template", None):
        difference = "the teacher's tokenizer has no chat template"
    elif uses_template and not getattr(student_tokenizer, "chat_template", None):
        return  # an error of the student, which preprocess reports
    else:
        sides = [SampleTokenizer(side, recipe.prompt) for side in (student_tokenizer, tokenizer)]
        difference = compare_prompts(*sides)
    if difference:
        reads = "the student's prompts" if recipe.teacher_template == "student" else "its own"
        log.warning(
            "teacher and student have different prompts: %s; with teacher.template=%s the teacher "
            "reads %s, in training and in evaluation",
            difference,
            recipe.teacher_template,
            reads,
        )
