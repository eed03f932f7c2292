"""A custom divergence: the Hellinger distance, by name and in the fused head.

Registered here, it works in the functions of `pocl_ds.losses`. A recipe finds it with
`plugins: [custom_divergence]` and `loss: {name: hellinger}`, if this folder is on PYTHONPATH.

    python examples/custom_divergence.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_ds import plugins
from pocl_ds.losses import divergence, fused_linear_distillation_loss


@plugins.divergence("hellinger", power=0.5)
def hellinger(log_p: Tensor, log_q: Tensor, *, power: float) -> Tensor:
    """1/2 sum (p^power - q^power)^2 over the ids: [tokens, ids] -> [tokens].

    Powers of logarithms stay finite where a probability underflows to 0.
    """
    return ((power * log_p).exp() - (power * log_q).exp()).square().sum(-1) / 2


def main() -> None:
    torch.manual_seed(0)
    tokens, width, ids = 64, 32, 1000
    # By name, on logits [tokens, ids].
    teacher_logits, student_logits = torch.randn(2, tokens, ids)
    value = divergence("hellinger", student_logits, teacher_logits, temperature=2.0)
    print(f"between random logits: {value:.4f}")
    print(f"between equal logits:  {divergence('hellinger', teacher_logits, teacher_logits):.4f}")

    # In the fused head: the gradient comes from autograd, a chunk of tokens at a time.
    teacher_hidden = torch.randn(tokens, width)
    head = torch.randn(ids, width) / width**0.5
    hidden = torch.nn.Parameter(torch.randn(tokens, width))
    labels = torch.randint(ids, (tokens,))
    optimizer = torch.optim.AdamW([hidden], lr=0.1)
    for step in range(50):
        loss = fused_linear_distillation_loss(
            hidden, head, teacher_hidden, head, labels, divergence="hellinger"
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
