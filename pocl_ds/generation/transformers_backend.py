"""`generate` of transformers: the plain backend, and the numerical reference for vLLM.

Shapes: B sequences, T positions, V vocabulary entries.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig as DecodingConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from pocl_ds.config import GenerationConfig
from pocl_ds.curriculum.micro_batches import token_budget_batches
from pocl_ds.generation.protocol import (
    ProgressCallback,
    SamplingParams,
    decode_response,
    find_stop_token_ids,
    ignore_progress,
)
from pocl_ds.models.load import load_model
from pocl_ds.models.log_probs import pad_sequences, response_log_probs
from pocl_ds.models.quiet import quiet
from pocl_ds.models.rope import DYNAMIC, LONGROPE, length_dependence, reset_frequencies
from pocl_ds.runtime import distributed


class TransformersGenerator:
    """See `protocol.Generator`."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        config: GenerationConfig,
        tokenizer: Any,
        *,
        max_length: int,
        threads: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        end_of_turn_ids: Sequence[int] = (),
    ) -> None:
        """See `open_generator`. model: its path, or a loaded model, which stays on its device."""
        self.previous_threads = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self.model: Any = model
        if isinstance(model, str):
            loaded: Any = load_model(
                model, dtype=config.dtype, trust_remote_code=trust_remote_code, revision=revision
            )
            self.model = loaded.to(distributed.device())
        self.model.eval()
        self.rope = length_dependence(self.model.config)
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.processed_tokens, self.sleep_level = 0, 0
        self.stop_token_ids = find_stop_token_ids(
            tokenizer, self.model.generation_config, end_of_turn_ids
        )
        # Ignore the model's own decoding settings, such as a repetition penalty.
        self.model.generation_config = DecodingConfig()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[str]:
        """See `protocol.Generator`."""
        return [
            decode_response(self.tokenizer, response, self.stop_token_ids)
            for response in self.generate_ids(prompts, sampling, on_progress)
        ]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """See `protocol.Generator`. A batch holds prompts with the same limit of new tokens: the
        model may have no positions after the longest of them.
        """
        limits = [min(sampling.max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        responses: list[list[int]] = [[]] * len(prompts)
        on_progress(sum(limit <= 0 for limit in limits))  # no room for a response
        groups = defaultdict(list)
        for index, limit in enumerate(limits):
            if limit > 0:
                groups[limit, self._rope_group(len(prompts[index]), limit)].append(index)
        for limit, rope_group in sorted(groups, reverse=True):
            indices = groups[limit, rope_group]
            lengths = [len(prompts[index]) + limit for index in indices]
            for batch in self._batches(lengths):
                batch_indices = [indices[place] for place in batch]
                generated = self._generate_batch(
                    batch_indices, prompts, sampling, limit, on_progress
                )
                for index, response in zip(batch_indices, generated, strict=True):
                    responses[index] = response
        return responses

    def _rope_group(self, prompt_length: int, limit: int) -> int:
        """Prompts of the same group may share a batch, see `models.rope`: 0, all remain short; -1,
        all are long; else the length of the prompt, so that all grow longer at the same step.
        """
        rope = self.rope
        if rope is None or prompt_length + limit <= rope.boundary:
            return 0
        return -1 if rope.rope_type == LONGROPE and prompt_length > rope.boundary else prompt_length

    def _phases(self, prompt_length: int, limit: int) -> list[int]:
        """The new tokens of each call of `generate`. A sequence that grows beyond the boundary of
        LongRoPE continues in a second call, which computes the keys of all its tokens again with
        the long factors; `generate` of transformers 5.19 would lose them.
        """
        if self.rope is None or self.rope.rope_type != LONGROPE:
            return [limit]
        # The next token after a sequence of `boundary` tokens is predicted with short factors.
        short = self.rope.boundary + 1 - prompt_length
        return [short, limit - short] if 0 < short < limit else [limit]

    def _generate_batch(
        self,
        indices: Sequence[int],
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        max_new_tokens: int,
        on_progress: ProgressCallback,
    ) -> list[list[int]]:
        """Generate responses to the prompts at `indices`, in this order."""
        # Sample by the arg max of scores plus noise, with one random generator per prompt.
        noise = [
            torch.Generator(self.model.device).manual_seed(sampling.request_seed(index))
            for index in indices
        ]
        responses: list[list[int]] = [[] for _ in indices]
        rows = list(range(len(indices)))
        for tokens in self._phases(max(len(prompts[index]) for index in indices), max_new_tokens):
            reporter = _ProgressReporter(
                self.stop_token_ids, len(rows), self.model.device, on_progress
            )
            sequences = [[*prompts[indices[row]], *responses[row]] for row in rows]
            generators = [noise[row] for row in rows]
            decoded = self._decode(sequences, tokens, sampling, generators, reporter)
            for row, response in zip(rows, decoded, strict=True):
                responses[row] += response
            rows = [row for row in rows if responses[row][-1] not in self.stop_token_ids]
            if not rows:
                break
        on_progress(len(rows))  # those that reached the limit of new tokens
        self.processed_tokens += sum(map(len, responses))
        return responses

    def _decode(
        self,
        sequences: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams,
        noise: Sequence[torch.Generator],
        reporter: StoppingCriteria,
    ) -> list[list[int]]:
        """New tokens after each sequence, up to its first stop id."""
        # With dynamic NTK scaling every length has its own frequencies, for all keys.
        longest = max(map(len, sequences)) + max_new_tokens
        is_dynamic = self.rope is not None and self.rope.rope_type == DYNAMIC
        keeps_keys = self.rope is None or not is_dynamic or longest <= self.rope.boundary
        decoding = DecodingConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_token_ids,
            pad_token_id=0,  # any row of the embedding: padding is masked, and cut after a stop id
            use_cache=keeps_keys,
        )
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_GumbelNoise(noise))

        # Decode; the criteria report progress after each token.
        ids, mask = pad_sequences(sequences, self.model.device, pad_left=True)
        reset_frequencies(self.model)
        with quiet():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=decoding,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([reporter]),
            )

        # Cut the padding after each response's first stop id.
        responses = []
        for response in output[:, ids.shape[1] :].tolist():
            stops = (n + 1 for n, token in enumerate(response) if token in self.stop_token_ids)
            responses.append(response[: next(stops, len(response))])
        return responses

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `protocol.Generator`. Raises KeyError if a parameter is missing."""
        parameters = dict(self.model.named_parameters())
        missing = set(parameters)
        for name, weight in weights:
            if name in missing:
                parameters[name].copy_(weight)
                missing.discard(name)
        if missing:
            raise KeyError(f"there are no new weights of {sorted(missing)[0]}")

    @torch.inference_mode()
    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`. The head runs at response positions only."""

        def finish_batch(batch: NDArray[np.int64]) -> None:
            self.processed_tokens += sum(len(sequences[index]) for index in batch)
            on_progress(len(batch))

        batches = self._batches([len(sequence) for sequence in sequences])
        return response_log_probs(self.model, sequences, prompt_tokens, batches, finish_batch)

    def _batches(self, lengths: Sequence[int]) -> list[NDArray[np.int64]]:
        """Indices of sequences of similar length, longest first, within the config's limits."""
        return token_budget_batches(
            lengths,
            max_tokens=self.config.max_num_batched_tokens,
            max_samples=self.config.max_num_seqs,
        )

    def sleep(self) -> None:
        """See `protocol.Generator`. Does nothing: the model stays in memory."""

    def close(self) -> None:
        """Free the model."""
        self.model = None
        gc.collect()
        torch.set_num_threads(self.previous_threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _ProgressReporter(StoppingCriteria):
    """Reports the sequences of a batch that reached a stop id, after each token. Stops none."""

    def __init__(
        self,
        stop_token_ids: Sequence[int],
        sequences: int,
        device: torch.device,
        on_progress: ProgressCallback,
    ) -> None:
        self.stop_token_ids = torch.tensor(stop_token_ids, device=device)
        self.stopped = torch.zeros(sequences, dtype=torch.bool, device=device)
        self.on_progress, self.reported = on_progress, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.stopped |= torch.isin(input_ids[:, -1], self.stop_token_ids)
        self._report(int(self.stopped.sum()))
        return torch.zeros_like(self.stopped)

    def _report(self, finished: int) -> None:
        self.on_progress(finished - self.reported)
        self.reported = finished


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise from one generator per row: the arg max of the log-probabilities plus the
    noise is an exact sample.

    `do_sample` of transformers samples the whole batch with one generator, so that a response would
    depend on the other prompts of its batch.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shape, device = scores.shape[1:], scores.device
        draws = [
            torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
            for generator in self.generators
        ]
        uniform = torch.stack(draws).clamp_min(torch.finfo(torch.float64).tiny)
        return scores.double() - (-uniform.log()).log()
