"""Distillation losses on plain tensors; they need no recipe and no run directory.

- `fkl`, `rkl`, `jsd`, `tvd`, `skl`, `srkl`, `akl`, `ab`: a divergence between student and teacher
  logits over the same ids.
- `uld`, `alm`: losses between different tokenizers. - `divergence(name, ...)`: the same by name,
including divergences that plugins register. - `fused_linear_distillation_loss`,
`FusedLinearDistillationLoss`: output head and loss in one, without
  the full logits.
- `TokenSignals`, `TokenFactors`: what a rule for the temperature and the weight of each token reads
  and returns.

Importing this package loads torch, but neither transformers nor deepspeed nor vllm. Arguments and
reductions are described in `pocl_ds.losses.functional`.
"""

from pocl_ds.losses.functional import (
    ab,
    akl,
    alm,
    divergence,
    fkl,
    jsd,
    rkl,
    skl,
    srkl,
    tvd,
    uld,
)
from pocl_ds.losses.fused_linear import (
    FusedLinearDistillationLoss,
    fused_linear_distillation_loss,
)
from pocl_ds.losses.token_rules import TokenFactors, TokenSignals

__all__ = [
    "FusedLinearDistillationLoss",
    "TokenFactors",
    "TokenSignals",
    "ab",
    "akl",
    "alm",
    "divergence",
    "fkl",
    "fused_linear_distillation_loss",
    "jsd",
    "rkl",
    "skl",
    "srkl",
    "tvd",
    "uld",
]
