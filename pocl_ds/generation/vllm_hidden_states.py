"""Final hidden states by vLLM: its pooling runner returns the states after the final norm of every
prompt token, which are the input of the output head.

    python -m pocl_ds.generation.vllm_hidden_states FD     started by `HiddenStateProcess` only

Shapes: n requested positions, D width of the head's input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ResourceError
from pocl_ds.generation import engine_process
from pocl_ds.generation.vllm_engine import VllmEngine, without_warnings
from pocl_ds.models.load import load_model_config

ALTERNATIVE = "teacher_cache.backend=transformers"  # the setting that does not need vLLM
MAX_NUM_SEQS = 256  # the limit of an iteration is its tokens
# Iterations of the engine per call, whose states are sent together while the next ones run.
ITERATIONS = 4
MEMORY_FIELDS = "teacher_cache.max_batch_tokens"
# vLLM's names of the recipe's teacher.quantization. 8 bits are not quantized while loading.
QUANTIZATIONS = {"none": None, "bnb_4bit": "bitsandbytes"}


class VllmHiddenStates:
    """One model in vLLM. Each sequence runs in a single iteration of the engine."""

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        *,
        max_length: int,
        threads: int,
        quantization: str,
        trust_remote_code: bool,
        revision: str | None,
    ) -> None:
        """quantization: the recipe's teacher.quantization; a stored one is found by vLLM. Raises
        ResourceError or ModelError, see `VllmEngine`.
        """
        model_config = load_model_config(
            model_path, trust_remote_code=trust_remote_code, revision=revision
        )
        self.max_tokens = max(config.max_num_batched_tokens, max_length + 1)
        self.engine = VllmEngine(
            model_path,
            config,
            model_config=model_config,
            max_length=max_length,
            cached_tokens=self.max_tokens,
            threads=threads,
            alternative=ALTERNATIVE,
        )
        self.engine.open(
            memory_fields=MEMORY_FIELDS,
            runner="pooling",
            convert="embed",
            pooler_config=self.engine.pooler_config(task="token_embed", use_activation=False),
            # States in the dtype of the model, not in float32.
            hf_overrides={"head_dtype": "model"},
            enable_chunked_prefill=False,
            quantization=QUANTIZATIONS[quantization],
            trust_remote_code=trust_remote_code,
            revision=revision,
        )

    def hidden_states(
        self,
        sequences: Sequence[NDArray[np.int64]],
        positions: Sequence[NDArray[np.int64]],
        on_states: Callable[[tuple[int, Tensor]], object],
    ) -> None:
        """Compute the states at some positions of each sequence. on_states: receives, part by part
        in order, how many sequences are in the part, and their states [n, D] on the CPU.
        """
        for part in _parts([len(ids) for ids in sequences], ITERATIONS * self.max_tokens):
            states = [
                data[torch.from_numpy(positions[index])]
                for index, data in zip(part, self._run(sequences, part), strict=True)
            ]
            on_states((len(part), torch.cat(states)))

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _run(self, sequences: Sequence[NDArray[np.int64]], part: range) -> list[Tensor]:
        """The states of all tokens of some sequences, each [tokens, D]."""
        prompts = [
            self.engine.vllm.TokensPrompt(prompt_token_ids=sequences[index].tolist())
            for index in part
        ]
        try:
            outputs = without_warnings(
                self.engine.llm.encode, prompts, pooling_task="token_embed", use_tqdm=False
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            message = " ".join(str(error).split())[:300]
            raise ResourceError(
                f"vLLM failed while it read the samples ({message}): if memory is short, lower "
                f"{MEMORY_FIELDS}, or set {ALTERNATIVE}"
            ) from error
        states = [output.outputs.data for output in outputs]
        for index, data in zip(part, states, strict=True):
            if len(data) != len(sequences[index]):
                raise ResourceError(
                    f"vLLM returned {len(data)} hidden states for {len(sequences[index])} tokens: "
                    f"set {ALTERNATIVE}"
                )
        return states


class HiddenStateProcess(engine_process.EngineProcess):
    """`VllmHiddenStates` in its own process, next to a rank. The child opens the model when
    this object is made.
    """

    purpose, alternative = "runs the teacher in vLLM", ALTERNATIVE

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        *,
        max_length: int,
        threads: int,
        device: str | None,
        quantization: str = "none",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """device: the GPUs of the engine, as in CUDA_VISIBLE_DEVICES. Raises ResourceError if vLLM
        cannot open the model.
        """
        super().__init__("pocl_ds.generation.vllm_hidden_states", threads=threads, device=device)
        options = {
            "max_length": max_length,
            "threads": threads,
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        ((_, self.dtype),) = self.messages("open", model_path, config, options)

    def hidden_states(
        self, sequences: Sequence[NDArray[np.int64]], positions: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[int, Tensor]]:
        """See `VllmHiddenStates`: what `on_states` would receive. The child computes the next part
        meanwhile.
        """
        dtype = getattr(torch, self.dtype)
        for kind, value in self.messages("hidden_states", sequences, positions):
            if kind == "states":
                count, data = value
                yield count, torch.from_numpy(data).view(dtype)


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the connection. Messages besides the result are
    "states": the number of sequences, and their states as bytes [n, D x bytes of a number].
    """
    model: VllmHiddenStates | None = None

    def answer(method: str, arguments: tuple[Any, ...]) -> Any:
        nonlocal model
        if method == "open":
            path, config, options = arguments
            model = VllmHiddenStates(path, config, **options)
            return str(model.engine.llm.model_config.dtype).removeprefix("torch.")
        assert model is not None
        sequences, positions = arguments
        return model.hidden_states(sequences, positions, send)

    def send(part: tuple[int, Tensor]) -> None:
        count, states = part
        connection.send(("states", (count, states.contiguous().view(torch.uint8).numpy())))

    engine_process.serve(connection, answer)
    if model is not None:
        model.close()


def _parts(lengths: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Divide sequences into consecutive parts of at most `max_tokens` tokens, or one sequence."""
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > max_tokens:
            yield range(start, index)
            start, tokens = index, 0
        tokens += length
    if start < len(lengths):
        yield range(start, len(lengths))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
