"""The student in training: one module from token ids to loss sums, so that every ZeRO-3 hook
fires.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ds.data.batches import Batch
from pocl_ds.losses.fused_head import LossHead, LossSums
from pocl_ds.losses.sample_losses import SampleLosses, SampleTerms
from pocl_ds.losses.token_losses import LossTerms, TeacherHead
from pocl_ds.models.heads import hidden_states, identity_head, output_head
from pocl_ds.models.vocab import VocabMap


class Student(nn.Module):
    """Backbone, hidden states at loss positions, fused head and loss.

    A batch without loss tokens still runs through every parameter: its loss is 0 and has a graph,
    so that no rank hangs in a reduction that the other ranks wait for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab: VocabMap,
        *,
        chunk_bytes: int,
        split: bool = True,
        offload: bool = False,
    ) -> None:
        """split: apply the head separately from the backbone, in chunks; otherwise the model's own
        forward computes the logits of all positions at once. offload: keep what the backbone saves
        for its backward pass in the host's memory; with activation checkpointing that is the input
        of each layer.
        """
        super().__init__()
        self.model, self.split, self.offload = model, split, offload
        head = output_head(model) if split else identity_head(model)
        self.loss_head = LossHead(head, vocab, chunk_bytes)

    def forward(
        self,
        batch: Batch,
        terms: LossTerms | SampleTerms,
        teacher_outputs: Tensor | None = None,
        teacher_head: TeacherHead | None = None,
    ) -> LossSums | SampleLosses:
        """Loss sums of one micro-batch, or with `SampleTerms` the losses of each of its samples.

        teacher_outputs: [loss tokens, teacher width], concatenated along the width for a
        `HeadMixture`, or records of a `RecordCodec`. For a batch with a teacher view the loss
        tokens are the teacher's own.
        """
        with self._saved_tensors(batch):
            hidden = hidden_states(self.model, *batch.inputs, split=self.split)
        hidden = batch.at_loss_positions(hidden)
        sums: LossSums | SampleLosses = self.loss_head(
            hidden, batch, terms, teacher_outputs, teacher_head
        )
        return sums

    def _saved_tensors(self, batch: Batch) -> contextlib.AbstractContextManager[object]:
        """Where the backbone's saved tensors are kept."""
        if not self.offload:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=batch.input_ids.is_cuda)
