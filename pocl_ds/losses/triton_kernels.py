"""The Triton kernel of the loss: from the products of both heads to the loss of each token, and
the gradient written over the student's products.

One program computes one token. It reads the token's row twice: for the softmax of both sides, then
for value and gradient. The gradient also needs the row's sum of g = dD / d log q before its first
id is written. For `fkl`, `rkl` and `ab`, whose g is a product of powers and logarithms of p and q,
that sum is accumulated in the first read and rescaled as the largest logit grows. For `jsd`,
`tvd`, `skl` and `srkl`, whose g combines p and q after both softmaxes, it takes a separate read,
so that they read the row three times. Each read runs against the direction of the one before it and
begins with what the cache still holds.

Letters, beside those of `divergences`: x a product, z = cap tanh(scale x / cap) a logit; `top` the
largest logit of a row, d = (z - top) / tau, s the row's sum of exp(d), so that log q = d - log s.
The suffix q is for the student, p for the teacher. A and B are the options of the divergence: beta
of `jsd`, skew of `skl` and `srkl`, the exponents of `ab`.

Triton takes the types of arguments from the call: an argument without an annotation is a number or
a tensor of the device, or a tuple of them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Below every logit; finite, because the difference of two infinities is not a number.
LOWEST = tl.constexpr(-1e30)
# The smallest normal float32.
TINY = tl.constexpr(1.1754943508222875e-38)


# Chunks begin at any token: without this the kernel would be compiled again for some of them.
PER_TOKEN = (
    "labels",
    "inverse_taus",
    "kd_weights",
    "ce_weights",
    "divergences",
    "cross_entropies",
)


@triton.jit(do_not_specialize_on_alignment=PER_TOKEN)
def loss_kernel(
    student_products,
    teacher_products,
    labels,
    masked,
    inverse_taus,
    kd_weights,
    ce_weights,
    divergences,
    cross_entropies,
    student_stride,
    teacher_stride,
    size,
    width,
    inverse_tau,
    kd_weight,
    ce_weight,
    FORM: tl.constexpr,
    ROW_SUM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    TAU_IS_ONE: tl.constexpr,
    KD_GRADIENT: tl.constexpr,
    CE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The divergence and the cross-entropy of one token, and the gradient in its products.

    student_products, teacher_products: [n, width]; the first `size` columns are ids, the others
    scratch memory. labels: [n] int64. masked: [width] uint8, or None. divergences,
    cross_entropies: [n] float32, written. kd_weight, ce_weight: factors of their gradients.
    inverse_taus, kd_weights, ce_weights: [n] float32, one for each token in place of the number of
    that name, or None.
    FORM, ROW_SUM: see `triton_loss.KernelForm`.
    """
    row = tl.program_id(0).to(tl.int64)
    student = (student_products + row * student_stride, STUDENT_SCALE, STUDENT_CAP)
    teacher = student
    if FORM != "sft":
        teacher = (teacher_products + row * teacher_stride, TEACHER_SCALE, TEACHER_CAP)
    vocabulary = (masked, size, width)
    if inverse_taus is not None:
        inverse_tau = tl.load(inverse_taus + row)

    # First read: the softmax of both sides, and the sum of g where it can be accumulated.
    top_q, s_q, s_one, top_p, s_p, first, second = _softmax_sums(
        student, teacher, vocabulary, inverse_tau, FORM, ROW_SUM, A, B, TAU_IS_ONE, BLOCK
    )
    log_s_q, log_s_one, log_s_p = tl.log(s_q), tl.log(s_one), tl.log(s_p)
    softmaxes = (inverse_tau, top_q, log_s_q, log_s_one, top_p, log_s_p)
    sum_g = -1.0
    if ROW_SUM == "log_ratio":
        sum_g = tl.exp(-B * log_s_q) * (first - second * (log_s_q - log_s_p))
    elif ROW_SUM == "powers":
        cross = first * tl.exp(-A * log_s_p - B * log_s_q)
        sum_g = (second * tl.exp(-(A + B) * log_s_q) - cross) / A

    # The cross-entropy of the label at temperature 1.
    label = tl.load(labels + row)
    z_label = _logits(student, label, width)
    if masked is not None:
        z_label = tl.where(tl.load(masked + label) == 0, z_label, float("-inf"))
    tl.store(cross_entropies + row, log_s_one - (z_label - top_q))
    if kd_weights is not None:
        kd_weight = tl.load(kd_weights + row)
    if ce_weights is not None:
        ce_weight = tl.load(ce_weights + row)

    # Further reads: the sum of g if it is still missing, then value and gradient.
    targets = (label, kd_weight, ce_weight)
    if ROW_SUM == "read" and KD_GRADIENT:
        sum_g = _sum_of_g(student, teacher, vocabulary, softmaxes, FORM, A, B, BLOCK)
    value = _write_gradient(
        student,
        teacher,
        vocabulary,
        softmaxes,
        sum_g,
        targets,
        FORM,
        A,
        B,
        TAU_IS_ONE,
        KD_GRADIENT,
        CE_GRADIENT,
        ROW_SUM == "read" and KD_GRADIENT,
        BLOCK,
    )
    tl.store(divergences + row, value)


@triton.jit
def _softmax_sums(
    student,
    teacher,
    vocabulary,
    inverse_tau,
    FORM: tl.constexpr,
    ROW_SUM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TAU_IS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row: the student's largest logit, its s at tau and at 1; the teacher's largest logit
    and s at tau; and two sums over the ids, from which the sum of g follows:

    log_ratio: sum of exp(B d_q) (d_q - d_p), and of exp(B d_q);
    powers: sum of exp(A d_p + B d_q), and of exp((A + B) d_q).
    """
    _, size, width = vocabulary
    top_q = tl.full([], LOWEST, tl.float32)
    top_p = top_q
    # Each lane sums its own ids, so that only the largest logit is reduced in each block.
    s_q = tl.zeros([BLOCK], tl.float32)
    s_one, s_p, first, second = s_q, s_q, s_q, s_q
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        valid = _take_part(vocabulary, ids)
        z_q = _logits(student, ids, width)
        higher_q = tl.maximum(top_q, tl.max(tl.where(valid, z_q, LOWEST), 0))
        # The change of every d so far; there is none before the first valid id.
        change = tl.where(top_q > LOWEST, top_q - higher_q, 0.0)
        top_q = higher_q
        if not TAU_IS_ONE:
            s_one = s_one * tl.exp(change) + tl.where(valid, tl.exp(z_q - top_q), 0.0)
        change_q = change * inverse_tau
        d_q = tl.where(valid, (z_q - top_q) * inverse_tau, 0.0)
        s_q = s_q * tl.exp(change_q) + tl.where(valid, tl.exp(d_q), 0.0)
        if FORM != "sft":
            z_p = _logits(teacher, ids, width)
            higher_p = tl.maximum(top_p, tl.max(tl.where(valid, z_p, LOWEST), 0))
            change_p = tl.where(top_p > LOWEST, top_p - higher_p, 0.0) * inverse_tau
            top_p = higher_p
            d_p = tl.where(valid, (z_p - top_p) * inverse_tau, 0.0)
            s_p = s_p * tl.exp(change_p) + tl.where(valid, tl.exp(d_p), 0.0)
            if ROW_SUM == "log_ratio":
                power = tl.where(valid, tl.exp(B * d_q), 0.0)
                rescale = tl.exp(B * change_q)
                first = rescale * (first + second * (change_q - change_p)) + power * (d_q - d_p)
                second = rescale * second + power
            elif ROW_SUM == "powers":
                cross = tl.where(valid, tl.exp(A * d_p + B * d_q), 0.0)
                first = first * tl.exp(A * change_p + B * change_q) + cross
                power = tl.where(valid, tl.exp((A + B) * d_q), 0.0)
                second = second * tl.exp((A + B) * change_q) + power
    if TAU_IS_ONE:
        s_one = s_q
    sums = (tl.sum(s_q, 0), tl.sum(s_one, 0), tl.sum(s_p, 0), tl.sum(first, 0), tl.sum(second, 0))
    return top_q, sums[0], sums[1], top_p, sums[2], sums[3], sums[4]


@triton.jit
def _sum_of_g(
    student,
    teacher,
    vocabulary,
    softmaxes,
    FORM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's sum of g, by a read from the last block to the first."""
    inverse_tau, top_q, log_s_q, _, top_p, log_s_p = softmaxes
    _, size, width = vocabulary
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(size, BLOCK)
    for block in range(blocks):
        ids = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        valid = _take_part(vocabulary, ids)
        log_q = (_logits(student, ids, width) - top_q) * inverse_tau - log_s_q
        log_p = (_logits(teacher, ids, width) - top_p) * inverse_tau - log_s_p
        _value, g = _divergence_terms(log_p, log_q, FORM, A, B)
        total += tl.where(valid, g, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _write_gradient(
    student,
    teacher,
    vocabulary,
    softmaxes,
    sum_g,
    targets,
    FORM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TAU_IS_ONE: tl.constexpr,
    KD_GRADIENT: tl.constexpr,
    CE_GRADIENT: tl.constexpr,
    FORWARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's divergence; the gradient takes the place of the student's products."""
    inverse_tau, top_q, log_s_q, log_s_one, top_p, log_s_p = softmaxes
    label, kd_weight, ce_weight = targets
    products, scale, cap = student
    _, size, width = vocabulary
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(size, BLOCK)
    for block in range(blocks):
        start = block * BLOCK if FORWARDS else (blocks - 1 - block) * BLOCK
        ids = start + tl.arange(0, BLOCK)
        valid = _take_part(vocabulary, ids)
        z_q = _logits(student, ids, width)
        log_q = (z_q - top_q) * inverse_tau - log_s_q
        gradient = tl.zeros([BLOCK], tl.float32)
        if FORM != "sft":
            log_p = (_logits(teacher, ids, width) - top_p) * inverse_tau - log_s_p
            value, g = _divergence_terms(log_p, log_q, FORM, A, B)
            total += tl.where(valid, value, 0.0)
            if KD_GRADIENT:
                gradient += kd_weight * (g - tl.exp(log_q) * sum_g)
        if CE_GRADIENT:
            log_q_one = log_q if TAU_IS_ONE else z_q - top_q - log_s_one
            gradient += ce_weight * (tl.exp(log_q_one) - tl.where(ids == label, 1.0, 0.0))
        if KD_GRADIENT or CE_GRADIENT:
            # From the gradient in the logits to that in the products.
            gradient *= scale
            if cap is not None:
                gradient *= 1.0 - (z_q / cap) * (z_q / cap)
            tl.store(products + ids, tl.where(valid, gradient, 0.0), mask=ids < width)
    return tl.sum(total, 0)


@triton.jit
def _divergence_terms(log_p, log_q, FORM: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Each id's term of the divergence, and g = dD / d log q, less multiples of q that cancel in
    g - q sum(g) (docs/method.md, eq. 11 to 18 and 27).
    """
    p, q = tl.exp(log_p), tl.exp(log_q)
    if FORM == "fkl":
        value = p * (log_p - log_q)
        g = -p
    elif FORM == "rkl":
        value = q * (log_q - log_p)
        g = value
    elif FORM == "tvd":
        value = 0.5 * tl.abs(p - q)
        g = 0.5 * tl.where(q > p, q, tl.where(q < p, -q, 0.0))
    elif FORM == "jsd":
        log_m = tl.log(tl.maximum(A * p + (1.0 - A) * q, TINY))
        student_term = (1.0 - A) * q * (log_q - log_m)
        value = A * p * (log_p - log_m) + student_term
        g = student_term
    elif FORM == "skl":
        m = tl.maximum(A * p + (1.0 - A) * q, TINY)
        value = p * (log_p - tl.log(m))
        g = (A - 1.0) * p * (q / m)
    elif FORM == "srkl" or FORM == "srkl_detached":
        m = tl.maximum((1.0 - A) * p + A * q, TINY)
        log_ratio = log_q - tl.log(m)
        value = q * log_ratio
        g = value
        if FORM == "srkl":
            g -= A * q * (q / m)
    elif FORM == "ab_both_zero":
        g = log_q - log_p
        value = 0.5 * g * g
    elif FORM == "ab_a_zero":
        power = tl.exp(B * log_q)
        g = power * (log_q - log_p)
        value = (B * g - power + tl.exp(B * log_p)) / (B * B)
    else:
        cross = tl.exp(A * (log_p - log_q) + (A + B) * log_q)
        power = tl.exp((A + B) * log_q)
        g = (power - cross) / A
        if FORM == "ab_b_zero":
            value = (A * cross * (log_p - log_q) - cross + power) / (A * A)
        elif FORM == "ab_opposite":
            value = (A * (log_q - log_p) + cross - 1.0) / (A * A)
        else:
            teacher_power = tl.exp((A + B) * log_p)
            value = ((A * teacher_power + B * power) / (A + B) - cross) / (A * B)
    return value, g


@triton.jit
def _take_part(vocabulary, ids):
    """Whether these ids take part in the softmax."""
    masked, size, width = vocabulary
    valid = ids < size
    if masked is not None:
        valid = valid & (tl.load(masked + ids, mask=ids < width, other=1) == 0)
    return valid


@triton.jit
def _logits(side, ids, width):
    """Logits of these ids from the side's products, scale and soft cap."""
    products, scale, cap = side
    z = tl.load(products + ids, mask=ids < width, other=0.0).to(tl.float32) * scale
    if cap is not None:
        # tanh by exp(-2 |x|), which cannot overflow.
        decay = tl.exp(-2.0 / cap * tl.abs(z))
        tanh = (1.0 - decay) / (1.0 + decay)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return z
