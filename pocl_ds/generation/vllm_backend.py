"""Generation with vLLM, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.compat import vllm_private
from pocl_ds.compat.transformers_private import tied_parameters
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import (
    ProgressCallback,
    SamplingParams,
    decode_response,
    find_stop_token_ids,
    ignore_progress,
)
from pocl_ds.generation.vllm_engine import VllmEngine
from pocl_ds.models.load import load_generation_config


class VllmGenerator:
    """See `protocol.Generator`.

    sleep_level: what `sleep` does, for a GPU that is shared with another process. 0: nothing. 1:
    the engine moves its weights to host memory. 2: the engine drops its weights, and needs
    `load_weights` before its next use. On a machine where engines cannot sleep the level is 0.
    """

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        tokenizer: Any,
        *,
        model_config: Any,
        max_length: int,
        threads: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        alternative: str = "generation.backend=transformers",
        sleep_level: int = 0,
        end_of_turn_ids: Sequence[int] = (),
    ) -> None:
        """See `open_generator`. Raises ResourceError or ModelError, see `VllmEngine`."""
        self.tokenizer, self.model_config, self.processed_tokens = tokenizer, model_config, 0
        self.engine = VllmEngine(
            model_path,
            config,
            model_config=model_config,
            max_length=max_length,
            cached_tokens=config.max_num_seqs * (max_length + 1),
            threads=threads,
            alternative=alternative,
        )
        self.stop_token_ids = find_stop_token_ids(
            tokenizer, load_generation_config(model_path, revision), end_of_turn_ids
        )
        self.vllm = self.engine.vllm
        self.sleep_level = sleep_level if vllm_private.supports_sleep() else 0
        self.asleep = False
        self.engine.open(
            revision=revision,
            trust_remote_code=trust_remote_code,
            enable_sleep_mode=self.sleep_level > 0,
            # Token ids in, token ids out: text is decoded as in the other backend.
            skip_tokenizer_init=True,
        )

    @property
    def llm(self) -> Any:
        """The opened `vllm.LLM`."""
        return self.engine.llm

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

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """See `protocol.Generator`."""
        requests = [
            self.vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                max_tokens=sampling.max_new_tokens,
                seed=sampling.request_seed(index),
                stop_token_ids=self.stop_token_ids,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        outputs = self._run(prompts, requests, on_progress)
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        self.processed_tokens += sum(map(len, responses))
        return responses

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `protocol.Generator`.

        A tied head is passed under its own name too: otherwise the engine's loader keeps the
        previous one. Some of the engine's models (Gemma 2) have no module for the head, and refuse
        its name.
        """
        # Wake up only the weights: loading needs memory that the key-value cache would take.
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        (modules,) = self.llm.apply_model(_module_names)
        tied_heads = {
            embedding: head
            for head, embedding in tied_parameters(self.model_config).items()
            if head.rpartition(".")[0] in modules
        }
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": _with_tied_heads(weights, tied_heads)}
        )
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`. The sequences are prompts here, as vLLM reports the
        log-probabilities of prompt tokens.
        """
        request = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        outputs = self._run(sequences, [request] * len(sequences), on_progress)
        results = []
        for output, sequence, start in zip(outputs, sequences, prompt_tokens, strict=True):
            pairs = zip(output.prompt_logprobs[start:], sequence[start:], strict=True)
            values = [entry[int(token)].logprob for entry, token in pairs]
            results.append(np.array(values, dtype=np.float32))
            self.processed_tokens += len(sequence)
        return results

    def sleep(self) -> None:
        """See `protocol.Generator`."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True

    def close(self) -> None:
        """See `protocol.Generator`."""
        self.engine.close()

    def _run(
        self, prompts: Sequence[Sequence[int]], requests: list[Any], on_progress: ProgressCallback
    ) -> list[Any]:
        """Run all requests and return their outputs in order. This is `LLM.generate`, with progress
        after every engine step.
        """
        if not prompts:
            return []
        self._wake_up()
        tokens = [
            self.vllm.TokensPrompt(prompt_token_ids=[int(token) for token in prompt])
            for prompt in prompts
        ]
        self.llm.enqueue(tokens, requests, use_tqdm=False)
        engine, outputs = self.llm.llm_engine, []
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            outputs += finished
            on_progress(len(finished))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _wake_up(self) -> None:
        if not self.asleep:
            return
        if self.sleep_level == 2:
            raise RuntimeError("the engine dropped its weights to sleep: call load_weights first")
        self.llm.wake_up()
        self.asleep = False


def _with_tied_heads(
    weights: Iterable[tuple[str, Tensor]], tied_heads: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on, and at their end those of tied heads that were not among them.

    tied_heads: names of heads by those of their embeddings.
    """
    missing: dict[str, Tensor] = {}
    names: set[str] = set()
    for name, weight in weights:
        names.add(name)
        if name in tied_heads:
            missing[tied_heads[name]] = weight
        yield name, weight
    yield from ((name, weight) for name, weight in missing.items() if name not in names)


def _module_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_modules()}
