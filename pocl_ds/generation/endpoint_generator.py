"""A teacher behind `teacher.endpoint` as a generation backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocl_ds.config import TeacherEndpointConfig
from pocl_ds.generation.protocol import (
    ProgressCallback,
    SamplingParams,
    decode_response,
    find_stop_token_ids,
    ignore_progress,
)
from pocl_ds.generation.served_model import connect_to_teacher
from pocl_ds.models.load import load_generation_config


class EndpointGenerator:
    """See `TextGenerator`: each prompt is a request with the ids of the teacher's tokenizer."""

    def __init__(
        self,
        config: TeacherEndpointConfig,
        path: str,
        tokenizer: Any,
        *,
        max_length: int,
        revision: str | None = None,
        saved: str,
    ) -> None:
        """Connect to the servers. path: folder or Hub name of the tokenizer. max_length: tokens of
        the longest sequence. saved: what a failure does not lose. Raises ModelError or
        ResourceError.
        """
        self.tokenizer = tokenizer
        self.stop_token_ids = find_stop_token_ids(tokenizer, load_generation_config(path, revision))
        self.processed_tokens = 0
        self.model = connect_to_teacher(config, saved=saved, max_length=max_length)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[str]:
        """See `TextGenerator`."""
        responses = self.generate_ids(prompts, sampling, on_progress)
        return [decode_response(self.tokenizer, ids, self.stop_token_ids) for ids in responses]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """See `TextGenerator`."""
        responses: list[list[int]] = [[] for _ in prompts]

        def complete(prompt: Sequence[int], index: int) -> list[int]:
            return self.model.complete(prompt, sampling, index, self.stop_token_ids)

        for index, ids in self.model.answer_all(prompts, complete):
            responses[index] = ids
            self.processed_tokens += len(ids)
            on_progress(1)
        return responses

    def close(self) -> None:
        """See `TextGenerator`."""
        self.model.close()
