"""The protocol of a generation backend, and what both backends share so that they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.chat_template import find_end_of_turn
from pocl_ds.runtime.hashing import GOLDEN_GAMMA, splitmix64

# Odd, so that the requests of a workload start from different states.
REQUEST_STRIDE = 0xD1342543DE82EF95
# Receives the number of sequences finished since its last call. Backends call it after every
# decoding step, often with 0, so that a progress display updates although no sequence has finished.
ProgressCallback = Callable[[int], object]


def ignore_progress(finished: int) -> None:
    """The default `ProgressCallback`."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a response. Temperature 0 is greedy decoding."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    # Index of the call's first prompt in the workload, so that samples do not depend on chunks.
    first_index: int = 0

    def request_seed(self, index: int) -> int:
        """Seed of prompt `index` of a call (splitmix64), below 2**63: a response depends on it
        alone, not on the other prompts of its batch.
        """
        state = self.seed * int(GOLDEN_GAMMA) + (self.first_index + index + 1) * REQUEST_STRIDE
        states = np.array([state % 2**64], np.uint64)
        return int(splitmix64(states)[0]) >> 1  # fits a signed 64-bit integer


class TextGenerator(Protocol):
    """One model that answers prompts: token ids, to which a backend adds nothing (no BOS)."""

    processed_tokens: int  # tokens generated and scored so far
    stop_token_ids: list[int]  # ids that end a response

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[str]:
        """Generate one response per prompt, in order, as text without special tokens. A response
        ends at a stop id or after `max_new_tokens`.
        """
        ...

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """Like `generate`, but return token ids, with the stop id that ended a response."""
        ...

    def close(self) -> None:
        """Free the model and everything that the backend started."""
        ...


class Generator(TextGenerator, Protocol):
    """A model that is loaded here, which also scores sequences and takes new weights."""

    sleep_level: int  # what `sleep` does, see `VllmGenerator`; 0: nothing

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights, which are read one after the other. Names are those of the
        parameters of the transformers model; of tied parameters the first one is enough.
        """
        ...

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[NDArray[np.float32]]:
        """Compute the natural log-probability, at temperature 1, of each sequence's tokens after
        its first `prompt_tokens` (at least 1).

        Element i of the result has shape [len(sequences[i]) - prompt_tokens[i]].
        """
        ...

    def sleep(self) -> None:
        """Free GPU memory until the next call, if the backend can."""
        ...


def find_stop_token_ids(
    tokenizer: Any, generation_config: Any, end_of_turn_ids: Sequence[int] = ()
) -> list[int]:
    """Ids that end a response, ascending: the tokenizer's EOS, the end of a turn of its chat
    template, those of the model's generation settings (LLaMA has several), and `end_of_turn_ids`.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is None:
        configured = []
    elif not isinstance(configured, list):
        configured = [configured]
    end_of_turn = find_end_of_turn(tokenizer)
    template_ids = [tokenizer.convert_tokens_to_ids(end_of_turn)] if end_of_turn else []
    ids = (tokenizer.eos_token_id, *template_ids, *configured, *end_of_turn_ids)
    return sorted(set(map(int, ids)))


def decode_response(tokenizer: Any, ids: Sequence[int], stop_token_ids: Sequence[int]) -> str:
    """The text of a response up to its first stop id, without special tokens."""
    end = next((index for index, token in enumerate(ids) if token in stop_token_ids), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
