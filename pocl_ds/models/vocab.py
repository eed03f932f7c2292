"""Vocabulary alignment: which ids mean the same to teacher and student (docs/method.md, eq. 23).

A divergence compares two distributions token by token. If both tokenizers have the same tokens
under other ids (GPT-2 and OPT), ids are mapped. Rows without a token on either side (padding of
the embedding matrix, tokens that one side lacks) must have no probability, so they are masked.

    alignment = align_vocabularies(teacher_tokenizer, student_tokenizer, teacher_rows, student_rows)
    vocab = VocabMap.from_alignment(alignment)
    teacher_logits = vocab.mask(raw_teacher_logits[..., : vocab.size])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models.heads import OutputHead

__all__ = [
    "IncompatibleTokenizers",
    "VocabMap",
    "VocabularyAlignment",
    "align_vocabularies",
]

# Two tokenizers with at least this fraction of common tokens count as one tokenizer with other ids.
MIN_COMMON_FRACTION = 0.95
# Text of many kinds, to find out whether two tokenizers split text differently.
PROBE_TEXT = (
    'It\'s 2,024 items:\n\n    def f(x): return x**2  # naïve café, 你好 🙂\t"quoted" UPPER lower'
)


class IncompatibleTokenizers(ModelError):
    """The tokenizers of teacher and student differ, so their distributions cannot be compared."""


@dataclass(frozen=True)
class VocabularyAlignment:
    """The ids that teacher and student share, in the student's numbering."""

    size: int  # ids below it take part
    shared: NDArray[np.bool_] | None  # [size], False = masked on both sides; None: all are shared
    report: str  # one sentence for the log
    # [size], the teacher's id of each student id (0 if masked); None: the ids are equal
    teacher_ids: NDArray[np.int64] | None = None
    # [teacher's rows], False = masked, of a teacher with another tokenizer
    teacher_tokens: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class VocabMap:
    """A `VocabularyAlignment` as tensors: the mask of both sides, and the teacher's ids."""

    size: int
    masked: Tensor | None = None  # [size] bool, True for an id that takes no part
    teacher_ids: Tensor | None = None  # [size] int64; None: the ids are equal
    teacher_masked: Tensor | None = None  # [teacher's rows] bool, with another tokenizer

    @classmethod
    def from_alignment(cls, alignment: VocabularyAlignment) -> VocabMap:
        """The alignment as tensors on the CPU."""
        shared, tokens = alignment.shared, alignment.teacher_tokens
        teacher_ids = alignment.teacher_ids
        return cls(
            alignment.size,
            None if shared is None else torch.from_numpy(~shared),
            None if teacher_ids is None else torch.from_numpy(teacher_ids),
            None if tokens is None else torch.from_numpy(~tokens),
        )

    def to(self, device: torch.device) -> VocabMap:
        """Copy the map to a device."""
        tensors = (self.masked, self.teacher_ids, self.teacher_masked)
        return VocabMap(
            self.size, *(None if tensor is None else tensor.to(device) for tensor in tensors)
        )

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """[size], True for an id that takes part in the loss."""
        return np.ones(self.size, bool) if self.masked is None else ~self.masked.cpu().numpy()

    @property
    def teacher_readable(self) -> NDArray[np.bool_]:
        """[size], True for an id that a prompt of the teacher may hold: all, or if ids are mapped
        the shared ones.
        """
        return np.ones(self.size, bool) if self.teacher_ids is None else self.allowed

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [..., size] with -inf for ids that take no part."""
        return logits if self.masked is None else logits.masked_fill(self.masked, float("-inf"))

    def student_logits(self, head: OutputHead, hidden: Tensor) -> Tensor:
        """The student's masked logits [n, size] of hidden states [n, width]."""
        return self.mask(head.logits(hidden, self.size))

    def teacher_logits(self, head: OutputHead, hidden: Tensor) -> Tensor:
        """The teacher's masked logits [n, size] in the student's numbering."""
        return self.mask(head.scale_and_cap_(self.teacher_product(head, hidden)))

    def teacher_product(
        self, head: OutputHead, hidden: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """The product of the teacher's head [n, size] in the student's numbering, into `out`."""
        if self.teacher_ids is None:
            return head.product(hidden, self.size, out=out)
        return torch.index_select(head.product(hidden), 1, self.teacher_ids, out=out)

    def teacher_inputs(self, input_ids: Tensor) -> Tensor:
        """The student's input ids in the teacher's numbering."""
        return input_ids if self.teacher_ids is None else self.teacher_ids[input_ids]


def align_vocabularies(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int
) -> VocabularyAlignment:
    """Compare the id → token tables of two tokenizers (docs/method.md, eq. 23).

    Ids are mapped if at least 95% of the tokens are common but have other ids.

    Args:
        teacher_tokenizer, student_tokenizer: transformers tokenizers.
        teacher_rows, student_rows: rows of the output heads, which may be padded.

    Raises:
        IncompatibleTokenizers: the tokenizers differ.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    teacher_tokens = {index: token for token, index in teacher.items()}
    student_tokens = {index: token for token, index in student.items()}
    common_ids = teacher_tokens.keys() & student_tokens.keys()
    conflicts = sorted(i for i in common_ids if teacher_tokens[i] != student_tokens[i])
    notes = _token_counts(teacher, student, teacher_rows, student_rows)

    # Other ids for the same tokens are mapped; other tokens cannot be compared.
    if conflicts:
        common_tokens = len(teacher.keys() & student.keys())
        if common_tokens < MIN_COMMON_FRACTION * max(len(teacher), len(student)):
            index = conflicts[0]
            raise IncompatibleTokenizers(
                f"teacher and student have different tokenizers: {common_tokens} of {len(teacher)} "
                f"and {len(student)} tokens are common, and id {index} is "
                f"{teacher_tokens[index]!r} for the teacher, {student_tokens[index]!r} for the "
                "student: choose a pair that shares its tokenizer, a loss across tokenizers "
                "(loss.name=alm or uld), or policy.name=seqkd"
            )
        teacher_ids = _map_ids(teacher_tokenizer, student_tokenizer, teacher_rows, student_rows)
        size, shared = student_rows, teacher_ids >= 0
        report = "tokens shared under other ids, mapped"
        notes += _segmentation_note(teacher_tokenizer, student_tokenizer)
        mapping = np.maximum(teacher_ids, 0)
    else:
        size, mapping = min(teacher_rows, student_rows), None
        shared = np.zeros(size, bool)
        shared[[index for index in common_ids if index < size]] = True
        report = "ids shared"
        notes += _eos_note(teacher_tokenizer, student_tokenizer)
        notes += _segmentation_note(teacher_tokenizer, student_tokenizer)

    if (highest := max(student_tokens)) >= student_rows:
        notes += (
            f"; the student's tokenizer has ids up to {highest}, beyond its {student_rows} rows: "
            "they must not occur"
        )
    masked = int(size - shared.sum())
    report = (
        f"vocabulary: {size - masked} {report} (teacher {teacher_rows} rows, student "
        f"{student_rows})"
    )
    report += f", {masked} without a token on both sides masked" if masked else ""
    return VocabularyAlignment(size, shared if masked else None, report + notes, mapping)


def align_model_vocabularies(
    teacher: ModelSource, teacher_path: str, student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """`align_vocabularies` of two models in their folders, or on the Hub."""
    return align_vocabularies(*_load_tokenizers(teacher, teacher_path, student, student_path))


def align_teacher_vocabularies(
    teachers: Sequence[tuple[ModelSource, str]], student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """The ids that a student shares with all of its teachers.

    Raises ModelError if the teachers have other ids for the same tokens.
    """
    alignments = [
        align_model_vocabularies(teacher, path, student, student_path) for teacher, path in teachers
    ]
    size = min(alignment.size for alignment in alignments)
    shared = np.ones(size, bool)
    for alignment in alignments:
        if alignment.shared is not None:
            shared &= alignment.shared[:size]
    # The ids of all teachers must agree, except where they are masked.
    first_ids = _teacher_ids(alignments[0], size)
    for alignment, (_, path) in zip(alignments, teachers, strict=True):
        if not np.array_equal(first_ids[shared], _teacher_ids(alignment, size)[shared]):
            raise ModelError(
                f"the teachers {teachers[0][1]} and {path} have other ids for the same tokens: mix "
                "teachers that share their ids"
            )
    report = "; ".join(dict.fromkeys(alignment.report for alignment in alignments))
    teacher_ids = None if alignments[0].teacher_ids is None else first_ids
    return VocabularyAlignment(size, None if shared.all() else shared, report, teacher_ids)


def separate_vocabularies(
    teachers: Sequence[tuple[ModelSource, str]], student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """The masks of a single teacher and a student that each keep their own tokens, for a loss
    across tokenizers: rows without a token are masked.
    """
    teacher_tokenizer, student_tokenizer, teacher_rows, student_rows = _load_tokenizers(
        *teachers[0], student, student_path
    )
    teacher, student_tokens = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    has_token = []
    for tokens, rows in ((teacher, teacher_rows), (student_tokens, student_rows)):
        row_has_token = np.zeros(rows, bool)
        row_has_token[[index for index in tokens.values() if index < rows]] = True
        has_token.append(row_has_token)
    report = "vocabulary: teacher and student each read their own tokens"
    report += _token_counts(teacher, student_tokens, teacher_rows, student_rows)
    shared = None if has_token[1].all() else has_token[1]
    return VocabularyAlignment(student_rows, shared, report, teacher_tokens=has_token[0])


def _load_tokenizers(
    teacher: ModelSource, teacher_path: str, student: ModelSource, student_path: str
) -> tuple[Any, Any, int, int]:
    """Both tokenizers, and the rows of both heads."""
    # Loads transformers, which users with tokenizers in memory do not need.
    from pocl_ds.models.load import embedding_rows, load_model_config, load_tokenizer

    sides = ((teacher, teacher_path), (student, student_path))
    tokenizers = [
        load_tokenizer(path, trust_remote_code=side.trust_remote_code, revision=side.revision)
        for side, path in sides
    ]
    configs = [
        load_model_config(path, trust_remote_code=side.trust_remote_code, revision=side.revision)
        for side, path in sides
    ]
    rows = [embedding_rows(config) for config in configs]
    return tokenizers[0], tokenizers[1], rows[0], rows[1]


def _teacher_ids(alignment: VocabularyAlignment, size: int) -> NDArray[np.int64]:
    """The teacher's id of each student id below `size`."""
    ids = alignment.teacher_ids
    return np.arange(size) if ids is None else ids[:size]


def _map_ids(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int
) -> NDArray[np.int64]:
    """The teacher's id of each student id, -1 for none: [student_rows].

    The EOS tokens map to each other, and so do the BOS tokens, even if their names differ. No
    teacher id is used twice, since its probability would count twice.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    # Pairs of a student's and a teacher's token: special tokens first, then equal names.
    special = [
        (getattr(student_tokenizer, role, None), getattr(teacher_tokenizer, role, None))
        for role in ("eos_token", "bos_token")
    ]
    pairs = [pair for pair in special if pair[0] in student and pair[1] in teacher]
    pairs += [(token, token) for token in student]
    teacher_ids = np.full(student_rows, -1, np.int64)
    used = {teacher_rows}  # stands for ids beyond the teacher's rows, and for missing tokens
    for student_token, teacher_token in pairs:
        index = student[student_token]
        teacher_id = min(teacher.get(teacher_token, teacher_rows), teacher_rows)
        if index < student_rows and teacher_ids[index] < 0 and teacher_id not in used:
            teacher_ids[index] = teacher_id
            used.add(teacher_id)
    return teacher_ids


def _token_counts(
    teacher: Mapping[str, int], student: Mapping[str, int], teacher_rows: int, student_rows: int
) -> str:
    """How many tokens are common, and how many rows of the heads have no token."""
    common = len(teacher.keys() & student.keys())
    empty_teacher_rows = teacher_rows - sum(index < teacher_rows for index in teacher.values())
    empty_student_rows = student_rows - sum(index < student_rows for index in student.values())
    return (
        f": {common} tokens common, {len(teacher) - common} only the teacher's, "
        f"{len(student) - common} only the student's; rows without a token {empty_teacher_rows} "
        f"and {empty_student_rows}"
    )


def _eos_note(teacher: Any, student: Any) -> str:
    if teacher.eos_token_id == student.eos_token_id:
        return ""
    return (
        f"; the EOS is {student.eos_token!r} for the student, {teacher.eos_token!r} for the "
        "teacher: the student's is used"
    )


def _segmentation_note(teacher: Any, student: Any) -> str:
    tokens = [
        side.convert_ids_to_tokens(side.encode(PROBE_TEXT, add_special_tokens=False))
        for side in (teacher, student)
    ]
    if tokens[0] == tokens[1]:
        return ""
    return "; the two split text differently: the student's tokenization is used"
