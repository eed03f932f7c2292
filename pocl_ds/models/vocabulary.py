"""Which ids mean the same to teacher and student (METHOD 4).

A divergence compares two distributions id by id. That is right only where both tokenizers give an id the same token;
rows that stand for no token on either side (padding of the embedding matrix) must have no probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ModelError

# Two tokenizers with at least this share of tokens in common are the same one with its ids in another order.
SAME_TOKENS = 0.95

PROBE = 'It\'s 2,024 items:\n\n    def f(x): return x**2  # naïve café, 你好 🙂\t"quoted" UPPER lower'


@dataclass(frozen=True)
class Vocabulary:
    """What teacher and student have in common."""

    size: int  # logits are cut to this many rows on both sides
    shared: NDArray[np.bool_] | None  # [size], False = masked to -inf on both sides; None where every id is shared
    report: str  # one sentence for the log


def reconcile(teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int) -> Vocabulary:
    """Compare the two id -> token maps.

    teacher_rows, student_rows: rows of the heads. Raises ModelError where an id means two different tokens.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    teacher_tokens = {index: token for token, index in teacher.items()}
    student_tokens = {index: token for token, index in student.items()}
    both = teacher_tokens.keys() & student_tokens.keys()
    different = sorted(index for index in both if teacher_tokens[index] != student_tokens[index])
    if different:
        raise ModelError(_difference(teacher, student, teacher_tokens, student_tokens, different))
    size = min(teacher_rows, student_rows)
    shared = np.zeros(size, dtype=bool)
    shared[[index for index in both if index < size]] = True
    masked = int(size - shared.sum())
    report = f"vocabulary: {size - masked} ids shared (teacher {teacher_rows} rows, student {student_rows})"
    report += f", {masked} without a token on both sides masked" if masked else ""
    report += _warnings(teacher_tokenizer, student_tokenizer, student_tokens, student_rows)
    return Vocabulary(size, shared if masked else None, report)


def _difference(
    teacher: dict[str, int],
    student: dict[str, int],
    teacher_tokens: dict[int, str],
    student_tokens: dict[int, str],
    different: list[int],
) -> str:
    common = teacher.keys() & student.keys()
    if len(common) >= SAME_TOKENS * max(len(teacher), len(student)):
        token = next(token for token in sorted(common, key=lambda t: (-len(t), t)) if teacher[token] != student[token])
        return (
            "teacher and student have the same tokens under other ids "
            f"({token!r} is {teacher[token]} and {student[token]}); "
            "mapping ids is not supported yet: choose a student that shares the teacher's tokenizer"
        )
    first = different[0]
    return (
        f"teacher and student have different tokenizers: {len(common)} of {len(teacher)} and {len(student)} tokens are "
        f"common, and id {first} is {teacher_tokens[first]!r} to the teacher, {student_tokens[first]!r} to the "
        "student: choose a pair that shares its tokenizer"
    )


def _warnings(teacher: Any, student: Any, student_tokens: dict[int, str], student_rows: int) -> str:
    """What goes together but is worth knowing."""
    text = ""
    if teacher.eos_token_id != student.eos_token_id:
        text += (
            f"; a response ends with {student.eos_token!r} to the student, {teacher.eos_token!r} to the teacher: "
            "the student's is used"
        )
    if teacher.encode(PROBE, add_special_tokens=False) != student.encode(PROBE, add_special_tokens=False):
        text += "; the two split text differently: the student's way is used"
    if (highest := max(student_tokens)) >= student_rows:
        text += (
            f"; the student's tokenizer has ids up to {highest}, beyond its {student_rows} rows: they must not occur"
        )
    return text
