"""The loss of a chunk of logits in one Triton kernel: which losses it computes, and its launch.

The kernel needs no memory beside the logits of both sides, so a chunk is as large as its budget
allows. It computes in float32, and always in the same order: the same logits give the same bits.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import LossTerms, TeacherHead
from pocl_ds.losses.token_scale import TokenScale
from pocl_ds.losses.token_signals import SignalValues
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

log = logging.getLogger("pocl_ds")

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first with bfloat16
# Rows of logits begin at multiples of this many numbers, so that the kernel reads 16 bytes at once.
ROW_ALIGNMENT = 16
# Ids of one step of the kernel's loops, and warps that share them: 8 ids a thread.
BLOCK, WARPS = 2048, 8


@dataclass(frozen=True)
class KernelForm:
    """A divergence as the kernel's compile-time constants.

    name: its branch in `triton_kernels._divergence_terms`, or sft for none. row_sum: where the
    row's sum of g comes from: `constant` (-1), `log_ratio` and `powers` (two sums that the first
    read accumulates), `read` (a separate read). a, b: its options.
    """

    name: str
    row_sum: str
    a: float = 0.0
    b: float = 0.0

    @property
    def reads(self) -> int:
        """How often the kernel reads each logit if it computes the gradient."""
        return 3 if self.row_sum == "read" else 2


def kernel_form(name: str, options: dict[str, Any]) -> KernelForm | None:
    """The form of the loss of this name; None if the kernel does not compute it.

    options: of the divergence, with its defaults.
    """
    # `alm` reaches the chunks as a cross-entropy with a weight for each token.
    simple = {
        "sft": KernelForm("sft", "constant"),
        "alm": KernelForm("sft", "constant"),
        "fkl": KernelForm("fkl", "constant"),
        "rkl": KernelForm("rkl", "log_ratio", b=1.0),
        "tvd": KernelForm("tvd", "read"),
    }
    if name in simple:
        return simple[name]
    if name == "jsd":
        limits = {0.0: simple["fkl"], 1.0: simple["rkl"]}
        return limits.get(options["beta"], KernelForm("jsd", "read", options["beta"]))
    if name == "skl":
        skew = options["skew"]
        return simple["fkl"] if skew == 0 else KernelForm("skl", "read", skew)
    if name == "srkl":
        skew = options["skew"]
        branch = "srkl_detached" if options["detach_mixture"] else "srkl"
        return simple["rkl"] if skew == 0 else KernelForm(branch, "read", skew)
    if name == "ab":
        return _alpha_beta_form(options["ab_alpha"], options["ab_beta"])
    return None


def _alpha_beta_form(a: float, b: float) -> KernelForm:
    """The limits of the alpha-beta divergence have values, and partly gradients, of their own."""
    if a == 0:
        return KernelForm("ab_both_zero" if b == 0 else "ab_a_zero", "log_ratio", b=b)
    limit = "ab_b_zero" if b == 0 else "ab_opposite" if a + b == 0 else "ab"
    return KernelForm(limit, "powers", a, b)


def kernel_obstacle(
    name: str, options: dict[str, Any], hidden: Tensor, teacher_head: TeacherHead | None
) -> str | None:
    """Why this loss does not run in the kernel, as the end of a sentence; None: it does.

    options: of the divergence, with its defaults. hidden: the student's hidden states.
    """
    if hidden.device.type != "cuda":
        return f"the device is {hidden.device.type}"
    if kernel_form(name, options) is None:
        return f"{name} has no kernel"
    if teacher_head is not None and not isinstance(teacher_head, OutputHead):
        return f"the kernel does not read the teacher's {type(teacher_head).__name__}"
    teacher_weight = None if teacher_head is None else teacher_head.weight
    dtypes = {hidden.dtype} | (set() if teacher_weight is None else {teacher_weight.dtype})
    if unsupported := dtypes - set(LOGIT_DTYPES):
        return f"the kernel does not read {str(unsupported.pop())[6:]} logits"
    return launch_obstacle(hidden.device)


@functools.cache
def launch_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels do not run on this CUDA device, as the end of a sentence.

    Triton needs a C compiler and Python's headers at its first launch, which a machine that only
    trains may lack, so a loss of two tokens tries it.
    """
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
    try:
        logits = torch.zeros(2, ROW_ALIGNMENT, device=device)
        labels = torch.zeros(2, dtype=torch.int64, device=device)
        head = OutputHead(None, None, 1.0, None, ROW_ALIGNMENT)
        TritonLoss(LossTerms("sft"), {}, VocabMap(ROW_ALIGNMENT), head, None, True)(
            logits, None, TokenInputs(labels)
        )
    except Exception as error:  # compilers, drivers and packages fail in their own ways
        return f"Triton does not run here ({type(error).__name__}: {error})".splitlines()[0]
    return None


@functools.cache
def log_implementation(name: str, obstacle: str | None) -> None:
    """Log once how a loss is computed, and why if not by the kernel."""
    if obstacle is None:
        log.info("The loss %s runs in a Triton kernel.", name)
    else:
        log.info("The loss %s runs in eager PyTorch: %s.", name, obstacle)


def padded_size(size: int) -> int:
    """The distance between rows of logits over `size` ids that the kernel reads fastest."""
    return -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclass(frozen=True)
class TritonLoss:
    """The loss of a chunk of tokens, as `token_losses.LogitLoss`.

    head, teacher_head: scale and soft cap of the products; teacher_head is None if the loss has no
    divergence. options: of the divergence, with its defaults. block: ids of one step of the
    kernel's loops, a power of two; warps: of 32 threads that share a step.
    """

    terms: LossTerms
    options: dict[str, Any]
    vocab: VocabMap
    head: OutputHead
    teacher_head: OutputHead | None
    need_gradient: bool
    block: int = BLOCK
    warps: int = WARPS

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: TokenInputs) -> Tensor:
        """See `LogitLoss`. Columns of `student` beyond its ids, up to `padded_size`, are scratch
        memory if its rows are that far apart.
        """
        from pocl_ds.losses.triton_kernels import loss_kernel

        terms = self.terms
        values = torch.empty(2, len(student), dtype=torch.float32, device=student.device)
        signals = None
        if teacher is not None and terms.token_rule is not None:
            signals = self.signals(student, teacher, tokens)
        scale = TokenScale.of(terms, tokens, signals, values)
        kd_weight, ce_weight = scale.gradient_factor(terms), tokens.ce_weight(terms.ce_weight)
        temperature, constants = scale.temperature, self.constants
        if isinstance(temperature, Tensor):
            constants = constants | {"TAU_IS_ONE": False}
        with _current(student.device):
            loss_kernel[(len(student),)](
                student,
                teacher,
                tokens.labels.contiguous(),
                self._masked,
                _by_token(1.0 / temperature),
                _by_token(kd_weight),
                _by_token(ce_weight),
                values[0],
                values[1],
                *self._shape(student, teacher),
                _number(1.0 / temperature),
                _number(kd_weight),
                _number(ce_weight),
                **constants,
                KD_GRADIENT=self.need_gradient and teacher is not None and terms.ce_weight < 1,
                CE_GRADIENT=self.need_gradient and (isinstance(ce_weight, Tensor) or ce_weight > 0),
                num_warps=self.warps,
            )
        return scale.sums(values, tokens, terms.num_sums(tokens))

    def signals(self, student: Tensor, teacher: Tensor, tokens: TokenInputs) -> SignalValues:
        """What a token rule reads, from the products of both sides, which stay as they are."""
        from pocl_ds.losses.signal_kernel import signal_kernel

        values = torch.empty(6, len(student), dtype=torch.float32, device=student.device)
        names = ("STUDENT_SCALE", "STUDENT_CAP", "TEACHER_SCALE", "TEACHER_CAP", "BLOCK")
        student_stride, teacher_stride, size, width = self._shape(student, teacher)
        with _current(student.device):
            signal_kernel[(len(student),)](
                student,
                teacher,
                tokens.labels.contiguous(),
                self._masked,
                values,
                student_stride,
                teacher_stride,
                values.stride(0),
                size,
                width,
                **{name: self.constants[name] for name in names},
                num_warps=self.warps,
            )
        assert tokens.position is not None
        return SignalValues(tokens.position, *values.unbind())

    def _shape(self, student: Tensor, teacher: Tensor | None) -> tuple[int, int, int, int]:
        """Numbers from one row to the next on both sides, ids, and columns of a row. Raises
        ValueError for logits that a kernel cannot read.
        """
        sides = [student] if teacher is None else [student, teacher]
        if any(side.stride(1) != 1 for side in sides):
            raise ValueError("the logits of a token must be next to each other in memory")
        size = self.vocab.size
        padded = padded_size(size)
        width = padded if min(side.stride(0) for side in sides) >= padded else size
        return student.stride(0), 0 if teacher is None else teacher.stride(0), size, width

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time constants that do not depend on a chunk."""
        form = kernel_form(self.terms.name, self.options)
        if form is None:
            raise ValueError(f"{self.terms.name} has no kernel")
        teacher_head = self.teacher_head
        return {
            "FORM": form.name,
            "ROW_SUM": form.row_sum,
            "A": float(form.a),
            "B": float(form.b),
            "STUDENT_SCALE": float(self.head.scale),
            "STUDENT_CAP": self.head.soft_cap,
            "TEACHER_SCALE": 1.0 if teacher_head is None else float(teacher_head.scale),
            "TEACHER_CAP": None if teacher_head is None else teacher_head.soft_cap,
            "TAU_IS_ONE": self.terms.temperature == 1.0,
            "BLOCK": self.block,
        }

    @cached_property
    def _masked(self) -> Tensor | None:
        """The ids that take no part, as bytes, with room for aligned reads."""
        masked = self.vocab.masked
        if masked is None:
            return None
        padding = padded_size(self.vocab.size) - self.vocab.size
        return torch.nn.functional.pad(masked.to(torch.uint8), (0, padding), value=1)


def _by_token(value: float | Tensor) -> Tensor | None:
    """A value for each token [n] as the kernel reads it; None for one number."""
    return value.float().contiguous() if isinstance(value, Tensor) else None


def _number(value: float | Tensor) -> float:
    """One number as the kernel reads it; 0 in place of a value for each token."""
    return 0.0 if isinstance(value, Tensor) else float(value)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
