"""What a generation backend can do, and what both backends share so that they answer alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    # number of the first prompt of the call within the whole work: parts draw as the whole would
    first: int = 0

    def request_seed(self, index: int) -> int:
        """Seed of the call's prompt `index` (splitmix64): a text depends on it alone, not on its
        batch.
        """
        mask = (1 << 64) - 1
        value = (
            self.seed * 0x9E3779B97F4A7C15 + (self.first + index + 1) * 0xD1342543DE82EF95
        ) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return (value ^ (value >> 31)) >> 1  # 63 bits: a signed integer everywhere


class Generator(Protocol):
    """One loaded model. Prompts are token ids; nothing is added to them (no BOS)."""

    tokens: int  # tokens written and scored so far
    stops: list[int]  # ids that end a response

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """One response a prompt, in order, as text without special tokens; it ends at EOS or at
        max_new_tokens.
        """
        ...

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The same as token ids, the stop id that ended a response included."""
        ...

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """Take new weights, by the names of the model's parameters; tied ones may stand there once."""
        ...

    def log_probs(
        self, sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Natural log-probability (temperature = 1) of every token after the first `prompt_tokens` of each
        sequence.

        Result i: float32 [len(sequences[i]) - prompt_tokens[i]]. prompt_tokens are at least 1.
        """
        ...

    def rest(self) -> None:
        """Nothing is asked for a while: give back the memory of a GPU that others want, where the
        backend can.
        """
        ...

    def close(self) -> None:
        """Free the model and whatever the backend started."""
        ...


def stop_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids that end a response: the tokenizer's EOS and those of the model's generation settings
    (LLaMA has several).
    """
    named = getattr(generation_config, "eos_token_id", None)
    more = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({int(tokenizer.eos_token_id), *map(int, more)})


def decode(tokenizer: Any, ids: Sequence[int], stops: Sequence[int]) -> str:
    """The text of a response up to its first stop id, without special tokens."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
