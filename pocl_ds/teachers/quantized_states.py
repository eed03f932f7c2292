"""Final hidden states in 8 bits a number (docs/method.md, eq. 33).

A few channels of a hidden state are tens of times as large as the others, in every token, so that
one scale for a token would leave the others a handful of levels. Each channel is first made
standard by its mean and spread over some tokens.

Shapes: n tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import create_file, save_array

FILE = "channels.npy"  # in the folder of a cache
LEVELS = 127
SCALE_BYTES = 4


@dataclass(frozen=True)
class QuantizedStates:
    """Encodes hidden states as records of `bytes` bytes. mean, spread: of each channel, [d]
    float32.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def calibrate(cls, hidden: Tensor) -> QuantizedStates:
        """With the means and spreads of some tokens' states [n, d]."""
        states = hidden.float()
        spread, mean = torch.std_mean(states, 0, correction=0)
        # A channel that is constant over these tokens may vary over others.
        return cls(mean.cpu(), spread.clamp(min=max(float(spread.mean()) * 1e-3, 1e-6)).cpu())

    @classmethod
    def load(cls, directory: Path) -> QuantizedStates:
        """Those of a cache. Raises ArtifactError if the file is missing or damaged."""
        path = directory / FILE
        try:
            mean, spread = torch.from_numpy(np.load(path)).unbind()
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(
                f"{path} is missing or damaged ({error}): remove {directory}, and run `pocl "
                "cache-teacher`"
            ) from None
        return cls(mean, spread)

    def save(self, directory: Path) -> None:
        """Write them, unless the cache has some: of several tasks that write at once, the first
        decides.
        """
        with create_file(directory / FILE) as stream:
            save_array(stream, torch.stack([self.mean, self.spread]).numpy())

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return len(self.mean)

    @property
    def bytes(self) -> int:
        """Bytes of one token: one for each number, and the scale."""
        return self.width + SCALE_BYTES

    def encode(self, hidden: Tensor) -> Tensor:
        """Records [n, bytes] uint8 of hidden states [n, d]."""
        if not len(hidden):  # torch cannot view the bytes of nothing
            return torch.empty(0, self.bytes, dtype=torch.uint8, device=hidden.device)
        mean, spread = self.mean.to(hidden.device), self.spread.to(hidden.device)
        standard = (hidden.float() - mean) / spread
        scale = standard.abs().amax(-1, keepdim=True) / LEVELS
        levels = (standard / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
        return torch.cat(
            [scale.contiguous().view(torch.uint8), levels.to(torch.int8).view(torch.uint8)], -1
        )

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states [n, d] of records, rounded to 1 / LEVELS of each token's largest number."""
        if not len(records):
            return torch.empty(0, self.width, dtype=dtype, device=records.device)
        mean, spread = self.mean.to(records.device), self.spread.to(records.device)
        # A separate copy is aligned for float32.
        scale = records[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        levels = records[:, SCALE_BYTES:].contiguous().view(torch.int8).float()
        return (levels * scale.view(torch.float32)).mul_(spread).add_(mean).to(dtype)


@dataclass(frozen=True)
class StateStorage:
    """How hidden states are stored. hidden_dtype: of the recipe. quantized: with int8."""

    hidden_dtype: str = "model"
    quantized: QuantizedStates | None = None

    def encode(self, hidden: Tensor) -> Tensor:
        """What is stored of hidden states [n, width]: as many numbers, or records [n, bytes]."""
        if self.quantized:
            return self.quantized.encode(hidden)
        return hidden.to(torch.bfloat16) if self.hidden_dtype == "bfloat16" else hidden

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The hidden states that a reader gets."""
        return self.quantized.decode(stored, dtype) if self.quantized else stored.to(dtype)


def distribution_error(exact: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """What stored states lose at a temperature, summed over n tokens: [2] float64, the KL
    divergence of the exact distribution from the stored one in nats, and the squared length of
    their difference, which is that of the error of the forward KL's gradient.

    exact, stored: logits [n, v], -inf where an id is masked.
    """
    log_p, log_q = ((logits.double() / temperature).log_softmax(-1) for logits in (exact, stored))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum()
    return torch.stack([kl, (p - log_q.exp()).square().sum()])
