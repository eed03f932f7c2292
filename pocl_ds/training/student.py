"""The student in training: one module from ids to loss sums, so that every hook of ZeRO-3 fires
where it should.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ds.data.batches import Batch
from pocl_ds.losses.fused_head import LossHead, LossSums
from pocl_ds.losses.token_losses import LossTerms, TeacherHead
from pocl_ds.models.heads import head_of, hidden_states, unsplit
from pocl_ds.models.vocab import Ids


class Student(nn.Module):
    """Backbone -> hidden states at loss positions -> fused head and loss.

    A batch without loss tokens still runs through every parameter: its loss is 0 with a graph, so
    that no rank hangs in a reduction the others wait for.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Ids, *, chunk_bytes: int, split: bool = True
    ) -> None:
        """split: the head apart from the backbone; else logits come from the model's own forward,
        of all positions at once.
        """
        super().__init__()
        self.model, self.split = model, split
        self.loss_head = LossHead(head_of(model) if split else unsplit(model), ids, chunk_bytes)

    def forward(
        self,
        batch: Batch,
        terms: LossTerms,
        teacher_hidden: Tensor | None = None,
        teacher_head: TeacherHead | None = None,
    ) -> LossSums:
        """Loss sums of one micro-batch; teacher_hidden: [loss tokens, teacher width], side by side
        for a `Mixture`, or records of a `TopK`.

        The loss tokens are the teacher's own where the batch is translated.
        """
        hidden = batch.at_loss_positions(hidden_states(self.model, *batch.inputs, split=self.split))
        sums: LossSums = self.loss_head(hidden, batch, terms, teacher_hidden, teacher_head)
        return sums


class TeacherBackbone(nn.Module):
    """The teacher up to its final norm, or unsplit to its logits, at loss positions only."""

    def __init__(self, model: PreTrainedModel, *, split: bool = True) -> None:
        super().__init__()
        self.model, self.split = model, split

    def forward(self, batch: Batch) -> Tensor:
        """[loss tokens, width], of a batch in the teacher's ids."""
        return batch.at_loss_positions(hidden_states(self.model, *batch.inputs, split=self.split))
