"""Where responses end: one set of ids for data, scoring, rollouts, evaluation and export.

A student learns to end its turns as its data do (the template's end token, or EOS) and as its
teacher does. A base student of an instruct teacher therefore stops at a token that is not its EOS.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from pocl_ds.generation.protocol import find_stop_token_ids
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def find_teacher_end_ids(
    tokenizer: Any, generation_config: Any, student_tokenizer: Any
) -> list[int]:
    """The student's ids of the tokens that end a teacher's turns, ascending. Tokens that the
    student lacks are left out.
    """
    tokens = tokenizer.convert_ids_to_tokens(find_stop_token_ids(tokenizer, generation_config))
    vocabulary = student_tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in tokens if token in vocabulary)


def recorded_end_ids(run: RunDirectory) -> list[int]:
    """The ids that end the student's turns, as the step `preprocess` recorded them: first the one
    that ends the responses of the data. Empty without finished data.
    """
    manifest = read_manifest(run.data)
    return [int(token) for token in manifest.info["end_of_turn_ids"]] if manifest else []


def with_end_ids(config: GenerationConfig, end_of_turn_ids: Iterable[int]) -> GenerationConfig:
    """The generation settings of a model that also stops at these ids."""
    own = config.eos_token_id
    own_ids = own if isinstance(own, list) else [own] if own is not None else []
    ids = list(dict.fromkeys([*own_ids, *end_of_turn_ids]))
    tree = config.to_diff_dict() | {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    return GenerationConfig.from_dict(tree)
