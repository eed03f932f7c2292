"""`generate` of transformers: the plain backend, and the numerical reference that vLLM is held to.

Shapes: B sequences, T positions, V vocabulary rows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig as DecodingConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import Sampling, decode, stop_ids
from pocl_ds.models.heads import head_of, hidden_states, splits, unsplit
from pocl_ds.models.load import load_model
from pocl_ds.models.quiet import quiet
from pocl_ds.runtime.distributed import device

HEAD_ROWS = 512  # positions whose logits [rows, V] are held at once


class TransformersGenerator:
    """See `protocol.Generator`."""

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        tokenizer: Any,
        *,
        max_length: int,
        threads: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self.threads_before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        model = load_model(
            model_path, dtype=config.dtype, trust_remote_code=trust_remote_code, revision=revision
        )
        self.model: Any = model.to(device()).eval()
        self.config, self.tokenizer, self.max_length, self.tokens = config, tokenizer, max_length, 0
        self.stops = stop_ids(tokenizer, self.model.generation_config)
        # The model's own decoding settings (temperature, repetition penalty) must not add to ours.
        self.model.generation_config = DecodingConfig()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """See `protocol.Generator`."""
        return [
            decode(self.tokenizer, response, self.stops)
            for response in self.write(prompts, sampling)
        ]

    @torch.inference_mode()
    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """See `protocol.Generator`. Prompts of like length go together, padded on the left, and as
        many new tokens fit for each of them: the model may have no positions beyond.
        """
        responses: list[list[int]] = [[]] * len(prompts)
        room = [min(sampling.max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        for spare in sorted({one for one in room if one > 0}, reverse=True):
            alike = [index for index, one in enumerate(room) if one == spare]
            for batch in _batches([len(prompts[index]) + spare for index in alike], self.config):
                self._write_batch(
                    [alike[place] for place in batch], prompts, sampling, spare, responses
                )
        return responses

    def _write_batch(
        self,
        batch: Sequence[int],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        spare: int,
        responses: list[list[int]],
    ) -> None:
        """Write at most `spare` tokens to each of the prompts `batch`."""
        decoding = DecodingConfig(
            do_sample=False,
            max_new_tokens=spare,
            eos_token_id=self.stops,
            pad_token_id=self.stops[0],
            use_cache=True,
        )
        ids, mask = _padded([prompts[index] for index in batch], self.model.device, left=True)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(
                _GumbelNoise([sampling.request_seed(index) for index in batch], self.model.device)
            )
        with quiet():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=decoding,
                logits_processor=processors,
            )
        for index, response in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            length = next(
                (n + 1 for n, token in enumerate(response) if token in self.stops), len(response)
            )
            responses[index] = response[:length]
            self.tokens += length

    @torch.no_grad()
    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """See `protocol.Generator`."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    @torch.inference_mode()
    def log_probs(
        self, sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`. The head runs at response positions only."""
        split = splits(self.model)
        head = head_of(self.model) if split else unsplit(self.model)
        results: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for batch in _batches([len(sequence) for sequence in sequences], self.config):
            ids, mask = _padded(
                [sequences[index] for index in batch], self.model.device, left=False
            )
            hidden = hidden_states(self.model, ids, mask, split=split)  # [B, T, D]
            for row, index in enumerate(batch):
                start, stop = prompt_tokens[index], len(sequences[index])
                found = [
                    head.logits(
                        hidden[row, first - 1 : min(first + HEAD_ROWS, stop) - 1]
                    )  # state t predicts t + 1
                    .float()
                    .log_softmax(-1)
                    .gather(1, ids[row, first : min(first + HEAD_ROWS, stop), None])[:, 0]
                    for first in range(start, stop, HEAD_ROWS)
                ]
                if found:
                    results[index] = torch.cat(found).cpu().numpy()
                self.tokens += stop
        return results

    def rest(self) -> None:
        """See `protocol.Generator`; the model stays where it is."""

    def close(self) -> None:
        """Free the model."""
        self.model = None
        gc.collect()
        torch.set_num_threads(self.threads_before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _GumbelNoise(LogitsProcessor):
    """Gumbel noise from one generator a row: the arg max of log-probabilities plus it is an exact
    sample.

    `do_sample` of transformers draws for the whole batch at once, so that a text would depend on
    its neighbours.
    """

    def __init__(self, seeds: Sequence[int], where: torch.device) -> None:
        self.generators = [torch.Generator(where).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shape, where = scores.shape[1:], scores.device
        draws = [
            torch.rand(shape, generator=one, device=where, dtype=torch.float64)
            for one in self.generators
        ]
        uniform = torch.stack(draws).clamp_min(torch.finfo(torch.float64).tiny)
        return scores.double() - (-uniform.log()).log()


def _batches(lengths: Sequence[int], config: GenerationConfig) -> Iterator[list[int]]:
    """Indices in batches of like length: at most max_num_seqs, and max_num_batched_tokens with their
    padding.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        limit = max(1, config.max_num_batched_tokens // lengths[batch[0]]) if batch else 1
        if batch and len(batch) >= min(config.max_num_seqs, limit):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(
    sequences: Sequence[Sequence[int]], where: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both int64 [B, T]; the mask comes from lengths."""
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return torch.from_numpy(ids).to(where), torch.from_numpy(mask).to(where)
