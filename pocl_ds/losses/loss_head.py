"""The student's output head and loss as a module of the training engine, around `fused_head`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from pocl_ds.data.batches import Batch
from pocl_ds.losses.cross_tokenizer import CrossTokenizerTeacher, paired_teacher_tokens
from pocl_ds.losses.divergences import compute_dtype
from pocl_ds.losses.fused_head import FusedHeadLoss, FusedLossInputs, LossSums
from pocl_ds.losses.sample_losses import SampleLosses, SampleTerms, sample_losses
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import LossTerms, TeacherHead
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap


class LossHead(nn.Module):
    """The student's output head and loss as a module that owns the head's parameters, so that
    ZeRO-3 gathers them for its forward.
    """

    def __init__(self, head: OutputHead, vocab: VocabMap, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.scale, self.soft_cap, self.rows = head.scale, head.soft_cap, head.rows
        self.size, self.chunk_bytes = vocab.size, chunk_bytes
        self.masked: Tensor | None
        self.teacher_ids: Tensor | None
        self.teacher_masked: Tensor | None
        self.register_buffer("masked", vocab.masked, persistent=False)
        self.register_buffer("teacher_ids", vocab.teacher_ids, persistent=False)
        self.register_buffer("teacher_masked", vocab.teacher_masked, persistent=False)

    @contextlib.contextmanager
    def over_all_ids(self) -> Iterator[None]:
        """Within the block the softmax covers every row of the head, as in generation."""
        size, masked = self.size, self.masked
        self.size, self.masked = self.rows, None
        try:
            yield
        finally:
            self.size, self.masked = size, masked

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        terms: LossTerms | SampleTerms,
        teacher_hidden: Tensor | None,
        teacher_head: TeacherHead | None,
    ) -> LossSums | SampleLosses:
        """See `loss_sums`, or `sample_losses` with `SampleTerms`. teacher_hidden is [m, d'] if the
        batch has a view for a teacher with another tokenizer.
        """
        if isinstance(terms, SampleTerms):
            return sample_losses(
                hidden,
                OutputHead(self.weight, self.bias, self.scale, self.soft_cap, self.rows),
                batch.labels,
                batch.sample_of_token,
                len(batch.rows),
                terms,
                vocab=VocabMap(self.size, self.masked, self.teacher_ids),
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
                chunk_bytes=self.chunk_bytes,
            )
        view = batch.teacher_view
        if view and isinstance(teacher_head, OutputHead) and teacher_hidden is not None:
            vocab = VocabMap(teacher_head.rows, self.teacher_masked)
            teacher_head = CrossTokenizerTeacher(
                teacher_hidden, teacher_head, vocab, view.batch.labels, view
            )
            by_position = bool(terms.options.get("by_position"))
            teacher_hidden = paired_teacher_tokens(batch, view, by_position=by_position)
        tokens = TokenInputs.of_samples(
            batch.labels,
            batch.sample_of_token,
            batch.sample_weights,
            compute_dtype(hidden.dtype),
            with_position=terms.token_rule is not None,
        )
        # The head is assembled here: ZeRO-3 has gathered its parameters only within this forward.
        inputs = FusedLossInputs.of(
            hidden,
            OutputHead(self.weight, self.bias, self.scale, self.soft_cap, self.rows),
            tokens,
            terms,
            VocabMap(self.size, self.masked, self.teacher_ids),
            teacher_hidden,
            teacher_head,
            self.chunk_bytes,
        )
        sums: LossSums = FusedHeadLoss.apply(hidden, self.weight, self.bias, inputs)
        return sums
