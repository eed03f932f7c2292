"""Which ids mean the same to teacher and student (METHOD 4).

A divergence compares two distributions token by token. Where both tokenizers number the same tokens
differently (GPT-2 and OPT), ids are mapped; rows that stand for no token on either side (padding of
the embedding matrix, tokens that one side lacks) must have no probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models.heads import OutputHead

# Two tokenizers with at least this share of tokens in common are the same one with its ids in
# another order.
SAME_TOKENS = 0.95
# Text of many kinds: that two tokenizers split it differently is said in the log.
PROBE = (
    'It\'s 2,024 items:\n\n    def f(x): return x**2  # naïve café, 你好 🙂\t"quoted" UPPER lower'
)


class IncompatibleTokenizers(ModelError):
    """Teacher and student split text differently: their distributions are over different things."""


@dataclass(frozen=True)
class VocabularyAlignment:
    """What teacher and student have in common."""

    size: int  # the student's ids below it take part
    shared: (
        NDArray[np.bool_] | None
    )  # [size], False = masked to -inf on both sides; None where every id is shared
    report: str  # one sentence for the log
    teacher_ids: NDArray[np.int64] | None = (
        None  # [size], the teacher's id of each student id (0 if masked); None: the same
    )
    teacher_tokens: NDArray[np.bool_] | None = (
        None  # [teacher's rows], of one that keeps its own tokens; False = masked
    )


@dataclass(frozen=True)
class VocabMap:
    """A `VocabularyAlignment` as tensors: which ids take part in the softmax of both sides, and where the
    teacher has them.
    """

    size: int
    masked: Tensor | None = None  # [size] bool, true where an id takes no part
    teacher_ids: Tensor | None = None  # [size] int64, None where both sides number alike
    teacher_masked: Tensor | None = (
        None  # [teacher's rows] bool, of a teacher with another tokenizer
    )

    @classmethod
    def of(cls, vocabulary: VocabularyAlignment) -> VocabMap:
        """On the CPU."""
        masked = None if vocabulary.shared is None else torch.from_numpy(~vocabulary.shared)
        mapped = (
            None if vocabulary.teacher_ids is None else torch.from_numpy(vocabulary.teacher_ids)
        )
        theirs = (
            None
            if vocabulary.teacher_tokens is None
            else torch.from_numpy(~vocabulary.teacher_tokens)
        )
        return cls(vocabulary.size, masked, mapped, theirs)

    def to(self, device: torch.device) -> VocabMap:
        """The same on a device."""
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        return VocabMap(self.size, move(self.masked), move(self.teacher_ids), move(self.teacher_masked))

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """[size], true where an id takes part."""
        return np.ones(self.size, bool) if self.masked is None else ~self.masked.cpu().numpy()

    @property
    def readable(self) -> NDArray[np.bool_]:
        """[size], true where the teacher can read an id in a prompt: its own, and where ids are
        mapped those that both have.
        """
        return np.ones(self.size, bool) if self.teacher_ids is None else self.allowed

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [n, size] with -inf where an id takes no part."""
        return logits if self.masked is None else logits.masked_fill(self.masked, float("-inf"))

    def student_logits(self, head: OutputHead, hidden: Tensor) -> Tensor:
        """The student's logits [n, size], masked."""
        return self.mask(head.logits(hidden, self.size))

    def teacher_logits(self, head: OutputHead, hidden: Tensor) -> Tensor:
        """The teacher's logits [n, size], numbered as the student's, masked."""
        return self.mask(head.scale_and_cap_(self.teacher_product(head, hidden)))

    def teacher_product(self, head: OutputHead, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The product of the teacher's head [n, size], numbered as the student's; written to `out`
        where it is given.
        """
        if self.teacher_ids is None:
            return head.product(hidden, self.size, out=out)
        return torch.index_select(head.product(hidden), 1, self.teacher_ids, out=out)

    def teacher_inputs(self, input_ids: Tensor) -> Tensor:
        """Ids of a text as the teacher numbers them."""
        return input_ids if self.teacher_ids is None else self.teacher_ids[input_ids]


def align_model_vocabularies(
    teacher: ModelSource, teacher_path: str, student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """`align_vocabularies` of two models as they lie in their folders, or on the Hub."""
    return align_vocabularies(*_tables(teacher, teacher_path, student, student_path))


def align_teacher_vocabularies(
    teachers: Sequence[tuple[ModelSource, str]], student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """What a student has in common with each of its teachers. Raises ModelError where these number
    their tokens differently.
    """
    found = [align_model_vocabularies(teacher, path, student, student_path) for teacher, path in teachers]
    size = min(each.size for each in found)
    shared, mapped = np.ones(size, bool), found[0].teacher_ids
    for each in found:
        shared &= True if each.shared is None else each.shared[:size]
    numbers = [
        (np.arange(size) if each.teacher_ids is None else each.teacher_ids[:size])[shared]
        for each in found
    ]
    for theirs, (_, path) in zip(numbers, teachers, strict=True):
        if not np.array_equal(numbers[0], theirs):
            raise ModelError(
                f"the teachers {teachers[0][1]} and {path} number their tokens differently: mix "
                f"teachers that share "
                "their ids"
            )
    report = "; ".join(dict.fromkeys(each.report for each in found))
    return VocabularyAlignment(
        size, None if shared.all() else shared, report, None if mapped is None else mapped[:size]
    )


def separate_vocabularies(
    teachers: Sequence[tuple[ModelSource, str]], student: ModelSource, student_path: str
) -> VocabularyAlignment:
    """What a teacher and a student have that each keep their own tokens, for a loss across
    tokenizers: rows without a token are masked. There is one teacher.
    """
    theirs, ours, teacher_rows, student_rows = _tables(*teachers[0], student, student_path)
    tokens = []
    for tokenizer, rows in ((theirs, teacher_rows), (ours, student_rows)):
        known = np.zeros(rows, bool)
        known[[index for index in tokenizer.get_vocab().values() if index < rows]] = True
        tokens.append(known)
    report = "vocabulary: teacher and student each read their own tokens" + _counts(
        theirs, ours, teacher_rows, student_rows
    )
    return VocabularyAlignment(
        student_rows, None if tokens[1].all() else tokens[1], report, teacher_tokens=tokens[0]
    )


def _tables(
    teacher: ModelSource, teacher_path: str, student: ModelSource, student_path: str
) -> tuple[Any, Any, int, int]:
    """Both tokenizers, and the rows of both heads."""
    # Imported here because it loads transformers, which plain tensors need not wait for.
    from pocl_ds.models.load import load_model_config, load_tokenizer

    sides = ((teacher, teacher_path), (student, student_path))
    tokenizers = [
        load_tokenizer(path, trust_remote_code=side.trust_remote_code, revision=side.revision)
        for side, path in sides
    ]
    configs = [
        load_model_config(path, trust_remote_code=side.trust_remote_code, revision=side.revision)
        for side, path in sides
    ]
    rows = [int(config.get_text_config(decoder=True).vocab_size) for config in configs]
    return tokenizers[0], tokenizers[1], rows[0], rows[1]


def _counts(teacher: Any, student: Any, teacher_rows: int, student_rows: int) -> str:
    """How many tokens are whose, and how many rows of a head stand for none."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    common = len(theirs.keys() & ours.keys())
    without = lambda table, rows: rows - sum(index < rows for index in table.values())  # noqa: E731
    return (
        f": {common} tokens common, {len(theirs) - common} only the teacher's, "
        f"{len(ours) - common} only the student's; rows "
        f"without a token {without(theirs, teacher_rows)} and {without(ours, student_rows)}"
    )


def align_vocabularies(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int
) -> VocabularyAlignment:
    """Compare the two id -> token maps.

    teacher_rows, student_rows: rows of the heads. Ids are mapped where nearly all tokens are common
    but numbered otherwise. Raises DifferentTokenizers where the two tokenizers are different ones.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    teacher_tokens = {index: token for token, index in teacher.items()}
    student_tokens = {index: token for token, index in student.items()}
    both = teacher_tokens.keys() & student_tokens.keys()
    different = sorted(index for index in both if teacher_tokens[index] != student_tokens[index])
    if different:
        common = len(teacher.keys() & student.keys())
        if common < SAME_TOKENS * max(len(teacher), len(student)):
            raise IncompatibleTokenizers(
                _difference(teacher, student, teacher_tokens, student_tokens, different)
            )
        return _mapped(teacher_tokenizer, student_tokenizer, teacher_rows, student_rows)
    size = min(teacher_rows, student_rows)
    shared = np.zeros(size, dtype=bool)
    shared[[index for index in both if index < size]] = True
    masked = int(size - shared.sum())
    report = f"vocabulary: {size - masked} ids shared (teacher {teacher_rows} rows, student {student_rows})"
    report += f", {masked} without a token on both sides masked" if masked else ""
    report += _counts(teacher_tokenizer, student_tokenizer, teacher_rows, student_rows)
    report += _warnings(teacher_tokenizer, student_tokenizer, student_tokens, student_rows)
    return VocabularyAlignment(size, shared if masked else None, report)


def _mapped(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int
) -> VocabularyAlignment:
    """The same tokens under other ids. EOS and BOS stand for each other whatever they are called.

    Each of the teacher's ids is one of the student's at most: a second would count its probability
    twice.
    """
    names, student, taken = (
        teacher_tokenizer.get_vocab(),
        student_tokenizer.get_vocab(),
        {teacher_rows},
    )
    sides = student_tokenizer, teacher_tokenizer
    roles = ([getattr(side, role, None) for side in sides] for role in ("eos_token", "bos_token"))
    pairs = [(ours, theirs) for ours, theirs in roles if ours in student and theirs in names]
    table = np.full(student_rows, -1, np.int64)
    for token, name in [*pairs, *((token, token) for token in student)]:
        index, found = student[token], min(names.get(name, teacher_rows), teacher_rows)
        if index < student_rows and table[index] < 0 and found not in taken:
            table[index] = found
            taken.add(found)
    shared = table >= 0
    masked = int((~shared).sum())
    report = f"vocabulary: {student_rows - masked} tokens shared under other ids, mapped (teacher {teacher_rows} rows, student "
    report += f"{student_rows})" + (
        f", {masked} without a token on both sides masked" if masked else ""
    )
    tokens = {index: token for token, index in student.items()}
    report += _counts(teacher_tokenizer, student_tokenizer, teacher_rows, student_rows)
    report += _warnings(teacher_tokenizer, student_tokenizer, tokens, student_rows, mapped=True)
    return VocabularyAlignment(student_rows, shared if masked else None, report, np.maximum(table, 0))


def _difference(
    teacher: dict[str, int],
    student: dict[str, int],
    teacher_tokens: dict[int, str],
    student_tokens: dict[int, str],
    different: list[int],
) -> str:
    common = teacher.keys() & student.keys()
    first = different[0]
    return (
        f"teacher and student have different tokenizers: {len(common)} of {len(teacher)} and "
        f"{len(student)} tokens are "
        f"common, and id {first} is {teacher_tokens[first]!r} to the teacher, "
        f"{student_tokens[first]!r} to the "
        "student: choose a pair that shares its tokenizer, a loss across tokenizers "
        "(loss.name=alm or uld), or policy.name=seqkd"
    )


def _warnings(
    teacher: Any,
    student: Any,
    student_tokens: dict[int, str],
    student_rows: int,
    *,
    mapped: bool = False,
) -> str:
    """What goes together but is worth knowing."""
    text = ""
    if not mapped and teacher.eos_token_id != student.eos_token_id:
        text += (
            f"; a response ends with {student.eos_token!r} to the student, {teacher.eos_token!r} "
            f"to the teacher: "
            "the student's is used"
        )
    splits = [
        side.convert_ids_to_tokens(side.encode(PROBE, add_special_tokens=False))
        for side in (teacher, student)
    ]
    if splits[0] != splits[1]:
        text += "; the two split text differently: the student's way is used"
    if (highest := max(student_tokens)) >= student_rows:
        text += f"; the student's tokenizer has ids up to {highest}, beyond its {student_rows} rows: they must not occur"
    return text
