"""The matrix products of the fused head: teacher logits of a chunk, gradients of head and states.

Shapes: n tokens of a chunk, d width of the student, v ids that take part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_ds.losses.divergences import compute_dtype
from pocl_ds.losses.token_losses import TeacherHead
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap


class TeacherProducts:
    """The products of a chunk of teacher hidden states and the teacher's head, in one buffer for
    all chunks: [n, v], or [n, teachers, v] for a `HeadMixture`. Records and token indices pass
    unchanged.
    """

    def __init__(
        self, head: TeacherHead | None, vocab: VocabMap, rows: int, stride: int, hidden: Tensor
    ) -> None:
        """rows: of a chunk; stride: numbers from one row of products to the next, at least v."""
        self.head, self.vocab, self.stride = head, vocab, stride
        if isinstance(head, HeadMixture):
            self.buffer = self._allocate(hidden, head.heads[0], rows, len(head.heads))
        elif isinstance(head, OutputHead):
            self.buffer = self._allocate(hidden, head, rows)

    def _allocate(self, hidden: Tensor, head: OutputHead, *rows: int) -> Tensor:
        dtype = hidden.dtype if head.weight is None else head.weight.dtype
        return hidden.new_empty(*rows, self.stride, dtype=dtype)[..., : self.vocab.size]

    def __call__(self, states: Tensor) -> Tensor:
        if isinstance(self.head, OutputHead):
            return self.vocab.teacher_product(self.head, states, out=self.buffer[: len(states)])
        if isinstance(self.head, HeadMixture):
            parts = zip(self.head.heads, self.head.split_hidden(states), strict=True)
            for number, (head, hidden) in enumerate(parts):
                self.buffer[: len(states), number] = self.vocab.teacher_product(head, hidden)
            return self.buffer[: len(states)]
        return states


class HeadGradients:
    """Gradients in hidden states [n, d] and head, filled chunk by chunk; None if it is not needed.

    Those of the head are summed in float32: small chunks would vanish in bfloat16's rounding.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        size: int,
        needs_grad: list[bool],
    ) -> None:
        """size: ids that take part, the first of the head's rows. needs_grad: for hidden, weight
        and bias.
        """
        self.size, self.head_weight, dtype = size, weight, compute_dtype(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if needs_grad[0] else None
        if self.hidden is not None and weight is None:
            self.hidden[:, size:] = 0
        self.weight = (
            torch.empty_like(weight, dtype=dtype) if weight is not None and needs_grad[1] else None
        )
        if self.weight is not None:
            # The first chunk writes the other rows.
            self.weight[size if len(hidden) else 0 :] = 0
        self.bias = (
            torch.zeros_like(bias, dtype=dtype) if bias is not None and needs_grad[2] else None
        )

    def add(self, chunk: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Add a chunk. gradient: [rows, size], in the chunk's products; hidden: its hidden
        states.
        """
        if self.hidden is not None and self.head_weight is None:
            self.hidden[chunk, : self.size] = gradient
        elif self.hidden is not None and self.head_weight is not None:
            torch.mm(gradient, self.head_weight[: self.size], out=self.hidden[chunk])
        if self.weight is not None:
            _add_product(self.weight[: self.size], gradient, hidden, overwrite=chunk.start == 0)
        if self.bias is not None:
            self.bias[: self.size] += gradient.sum(0, dtype=self.bias.dtype)


def _add_product(accumulated: Tensor, gradient: Tensor, hidden: Tensor, *, overwrite: bool) -> None:
    """accumulated += gradient^T hidden in the accumulator's dtype; with overwrite, = instead of
    +=.
    """
    if accumulated.dtype != gradient.dtype and gradient.is_cuda:
        # cuBLAS multiplies in bfloat16 and adds in float32, without a separate product.
        dtype, product = accumulated.dtype, (gradient.T, hidden)
        if overwrite:
            torch.mm(*product, out_dtype=dtype, out=accumulated)
        else:
            torch.addmm(accumulated, *product, out_dtype=dtype, out=accumulated)
    elif accumulated.dtype != gradient.dtype:
        product = torch.mm(gradient.T, hidden)
        _ = accumulated.copy_(product) if overwrite else accumulated.add_(product)
    elif overwrite:
        torch.mm(gradient.T, hidden, out=accumulated)
    else:
        accumulated.addmm_(gradient.T, hidden)
