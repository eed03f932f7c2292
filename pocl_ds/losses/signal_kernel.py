"""The Triton kernel of the signals that token rules read (see `token_rules.TokenSignals`), from one
read of the products of both heads.

One program computes one token. Letters: see `triton_kernels`; all are at temperature 1. h is the
row's sum of d exp(d), so that the entropy is log s - h / s, and `cross` that of
exp((d_p + d_q) / 2), so that 1 - cross / sqrt(s_p s_q) is the squared Hellinger distance.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from pocl_ds.losses.triton_kernels import LOWEST, _logits, _take_part


@triton.jit(do_not_specialize_on_alignment=("labels", "signals"))
def signal_kernel(
    student_products,
    teacher_products,
    labels,
    masked,
    signals,
    student_stride,
    teacher_stride,
    signal_stride,
    size,
    width,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The signals of one token.

    signals: [6, n] float32, written: entropy of the teacher and of the student, Hellinger distance,
    the label's probability under the teacher and under the student, agreement. Other arguments:
    see `triton_kernels.loss_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    student = (student_products + row * student_stride, STUDENT_SCALE, STUDENT_CAP)
    teacher = (teacher_products + row * teacher_stride, TEACHER_SCALE, TEACHER_CAP)
    vocabulary = (masked, size, width)
    top_q = tl.full([], LOWEST, tl.float32)
    top_p = top_q
    # Each lane has sums, the largest logit and its own id; ids ascend within a lane.
    s_q = tl.zeros([BLOCK], tl.float32)
    h_q, s_p, h_p, cross = s_q, s_q, s_q, s_q
    best_q = tl.full([BLOCK], LOWEST, tl.float32)
    best_p = best_q
    id_q = tl.zeros([BLOCK], tl.int32)
    id_p = id_q
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        valid = _take_part(vocabulary, ids)
        z_q = tl.where(valid, _logits(student, ids, width), LOWEST)
        z_p = tl.where(valid, _logits(teacher, ids, width), LOWEST)
        id_q = tl.where(z_q > best_q, ids, id_q)
        id_p = tl.where(z_p > best_p, ids, id_p)
        best_q = tl.maximum(best_q, z_q)
        best_p = tl.maximum(best_p, z_p)
        higher_q = tl.maximum(top_q, tl.max(z_q, 0))
        higher_p = tl.maximum(top_p, tl.max(z_p, 0))
        # The change of every d so far; there is none before the first valid id.
        change_q = tl.where(top_q > LOWEST, top_q - higher_q, 0.0)
        change_p = tl.where(top_p > LOWEST, top_p - higher_p, 0.0)
        top_q, top_p = higher_q, higher_p
        d_q = tl.where(valid, z_q - top_q, 0.0)
        d_p = tl.where(valid, z_p - top_p, 0.0)
        exp_q = tl.where(valid, tl.exp(d_q), 0.0)
        exp_p = tl.where(valid, tl.exp(d_p), 0.0)
        root = tl.where(valid, tl.exp(0.5 * (d_q + d_p)), 0.0)
        h_q = tl.exp(change_q) * (h_q + s_q * change_q) + exp_q * d_q
        h_p = tl.exp(change_p) * (h_p + s_p * change_p) + exp_p * d_p
        s_q = s_q * tl.exp(change_q) + exp_q
        s_p = s_p * tl.exp(change_p) + exp_p
        cross = cross * tl.exp(0.5 * (change_q + change_p)) + root

    total_q, total_p = tl.sum(s_q, 0), tl.sum(s_p, 0)
    log_q, log_p = tl.log(total_q), tl.log(total_p)
    tl.store(signals + row, tl.maximum(log_p - tl.sum(h_p, 0) / total_p, 0.0))
    signals += signal_stride
    tl.store(signals + row, tl.maximum(log_q - tl.sum(h_q, 0) / total_q, 0.0))
    signals += signal_stride
    overlap = tl.sum(cross, 0) * tl.exp(-0.5 * (log_q + log_p))
    tl.store(signals + row, tl.sqrt(tl.maximum(1.0 - overlap, 0.0)))

    # The label's probabilities.
    label = tl.load(labels + row)
    z_q, z_p = _logits(student, label, width), _logits(teacher, label, width)
    takes_part = _take_part(vocabulary, label)
    signals += signal_stride
    tl.store(signals + row, tl.where(takes_part, tl.exp(z_p - top_p - log_p), 0.0))
    signals += signal_stride
    tl.store(signals + row, tl.where(takes_part, tl.exp(z_q - top_q - log_q), 0.0))

    # The lowest of the most probable ids of both sides.
    first_q = tl.min(tl.where(best_q == top_q, id_q, size), 0)
    first_p = tl.min(tl.where(best_p == top_p, id_p, size), 0)
    signals += signal_stride
    tl.store(signals + row, tl.where(first_q == first_p, 1.0, 0.0))
