"""Records of a cached teacher: its distribution at a token in a few bytes.

A codec chooses ids of the distribution and stores them with what its loss needs. This file has
what all codecs share: the protocol, and how ids and logits are packed.

Shapes: n tokens, v ids that take part, m ids in a record, t temperatures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.errors import RecipeError

# A logit's distance below the largest one is stored as a fraction of the record's largest distance,
# in 16 bits.
DISTANCE_STEPS = 65_535
# Ids have 18 bits: 16 in a uint16, the other two packed four to a byte.
MAX_IDS = 1 << 18


class RecordCodec(ABC):
    """Encodes distributions over `size` ids as records of `bytes` bytes, and computes the loss from
    them. temperatures: those of the plan, and 1.
    """

    mode: ClassVar[str]  # the value of teacher.mode
    error_names: ClassVar[tuple[str, str]]  # of the columns of `error_sums`, in the manifest
    size: int
    temperatures: tuple[float, ...]

    @property
    @abstractmethod
    def label(self) -> str:
        """What the records hold, for messages."""

    @property
    @abstractmethod
    def settings(self) -> str:
        """The fields of section `teacher_cache` that choose these records, as overrides."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Ids in a record (m)."""

    @property
    @abstractmethod
    def header_size(self) -> int:
        """Numbers in a record besides ids and distances, each a float32."""

    @property
    def has_distances(self) -> bool:
        """Whether a record holds the logits of its ids."""
        return True

    @property
    def has_unused_slots(self) -> bool:
        """Whether a record may have fewer ids than slots; the others repeat its last id."""
        return False

    @abstractmethod
    def encode(self, logits: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Records [n, bytes] uint8 of logits [n, v], which are -inf where an id is masked. keys:
        [n], of `runtime.hashing.token_keys`; random choices depend on them alone.
        """

    @abstractmethod
    def divergence(
        self,
        records: Tensor,
        log_q: Tensor,
        name: str,
        options: dict[str, Any],
        temperature: float,
        buffer: Callable[[], Tensor],
        need_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The divergence of each token [n], and its gradient [n, v] in the logits whose log-softmax
        is log_q [n, v]; log_q may be overwritten. buffer: gives memory [n, v].

        Raises RecipeError for a temperature or a divergence that the records do not support.
        """

    @abstractmethod
    def error_sums(self, logits: Tensor, records: Tensor) -> Tensor:
        """What the records lose, summed over n tokens: [t, 2] float64, with a column for each of
        `error_names`. logits: [n, v], -inf where an id is masked.
        """

    @abstractmethod
    def describe_error(self, means: Sequence[float]) -> tuple[dict[str, float], str]:
        """What the records lose at a temperature, for the manifest by name and as the end of a log
        sentence. means: a row of `error_sums`, per token, or the columns of it that are known.
        """

    @property
    def bytes(self) -> int:
        """Bytes of one token's record in memory, rounded up to a multiple of 4."""
        numbers = self.header_size + (1 if self.has_distances else 0)
        halves = self.slots * (2 if self.has_distances else 1)
        return -(-(4 * numbers + 2 * halves + self.high_bytes) // 4) * 4

    @property
    def high_bytes(self) -> int:
        """Bytes of the high bits of all ids."""
        return -(-self.slots // 4) if self.size > 1 << 16 else 0

    def validate(self, allowed: int) -> None:
        """Raise RecipeError if a record cannot name that many ids. allowed: number of ids that have
        a probability.
        """
        if self.size > MAX_IDS:
            raise RecipeError(
                f"teacher.mode={self.mode} supports at most {MAX_IDS} ids, and this vocabulary has "
                f"{self.size}: use teacher.mode=cached_hidden_states"
            )

    def temperature_index(self, temperature: float) -> int:
        """The index of a temperature. Raises RecipeError if the records do not hold it."""
        if temperature not in self.temperatures:
            stored = ", ".join(f"{value:g}" for value in self.temperatures)
            raise RecipeError(
                f"the cached records of the teacher ({self.label}) hold temperature {stored}, not "
                f"{temperature:g}: run `pocl cache-teacher` again"
            )
        return self.temperatures.index(temperature)

    def pack(self, header: Tensor, ids: Tensor, distances: Tensor | None) -> Tensor:
        """Records [n, bytes] from numbers [n, header_size], ids [n, m], and how far the logits of
        these ids are below the largest one [n, m], where `has_distances`. The ids of the records
        ascend.
        """
        parts = []
        ids, order = ids.sort(dim=-1, stable=True)
        if distances is not None:
            distances = distances.gather(-1, order)
            scale = distances.amax(-1, keepdim=True)
            steps = distances / scale.clamp(min=torch.finfo(scale.dtype).tiny) * DISTANCE_STEPS
            header = torch.cat([scale, header], -1)
            parts.append(_as_bytes(steps.round().int().to(torch.uint16)))
        parts.append(_as_bytes((ids & 0xFFFF).to(torch.uint16)))
        # The two high bits of each id, four ids to a byte.
        if self.high_bytes:
            high = torch.nn.functional.pad(ids >> 16, (0, -self.slots % 4)).view(len(ids), -1, 4)
            shifts = torch.tensor([0, 2, 4, 6], device=ids.device)
            parts.append((high << shifts).sum(-1).to(torch.uint8))
        record = torch.cat([_as_bytes(header.float()), *parts], -1)
        return torch.nn.functional.pad(record, (0, self.bytes - record.shape[-1]))

    def unpack(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Numbers, ids and distances of records, as `pack` takes them. A distance is rounded to
        1 / DISTANCE_STEPS of the record's largest one.
        """
        # The numbers.
        numbers = self.header_size + (1 if self.has_distances else 0)
        header = records[:, : 4 * numbers].contiguous().view(torch.float32)
        body, distances = records[:, 4 * numbers :], None
        # The distances.
        if self.has_distances:
            steps = body[:, : 2 * self.slots].contiguous().view(torch.uint16).int()
            distances = steps * (header[:, :1] / DISTANCE_STEPS)
            header, body = header[:, 1:], body[:, 2 * self.slots :]
        # The ids.
        ids = body[:, : 2 * self.slots].contiguous().view(torch.uint16).int().long()
        if self.high_bytes:
            start = 2 * self.slots
            high = body[:, start : start + self.high_bytes].long()
            shifts = torch.tensor([0, 2, 4, 6], device=records.device)
            ids = ids | (((high[..., None] >> shifts) & 3).flatten(1)[:, : self.slots] << 16)
        return header, ids, distances


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
