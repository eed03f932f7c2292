"""One engine for several models of one shape: it takes the weights of each after the other.

Starting an engine of vLLM takes many seconds, more on a GPU, where it compiles and captures graphs.
The students of a run differ in their weights alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pocl_ds.config import GenerationConfig
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Generator, find_stop_token_ids
from pocl_ds.models.load import load_generation_config, load_model_config

log = logging.getLogger("pocl_ds")

# Fields of a model's configuration that say nothing about its computation.
DESCRIPTIVE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class ReusedGenerator:
    """The generator of the model that was opened last. Close it after use."""

    def __init__(self) -> None:
        self._generator: Generator | None = None
        self._key: Any = None

    def open(
        self,
        path: str,
        config: GenerationConfig,
        tokenizer: Any,
        *,
        trust_remote_code: bool = False,
        end_of_turn_ids: Sequence[int] = (),
        **options: Any,
    ) -> Generator:
        """The open generator with the weights of `path`, if vLLM runs it and everything but the
        weights is the same; else a new one, and the open one is closed. Arguments and errors are
        those of `open_generator`.
        """
        shape = load_model_config(path, trust_remote_code=trust_remote_code).to_dict()
        for name in DESCRIPTIVE_FIELDS:
            shape.pop(name, None)
        stop_ids = find_stop_token_ids(tokenizer, load_generation_config(path), end_of_turn_ids)
        key = (shape, config, tokenizer.get_vocab(), stop_ids, trust_remote_code, options)
        files = sorted(Path(path).glob("*.safetensors"))
        # Workers of a tensor-parallel engine are processes, which take no iterator.
        takes_weights = config.backend == "vllm" and config.tensor_parallel_size == 1
        takes_weights &= "quantization_config" not in shape
        if self._generator is not None and takes_weights and files and key == self._key:
            log.info("loading the weights of %s into the open engine", path)
            self._generator.load_weights(_read_weights(files))
            return self._generator
        self.close()
        self._generator = open_generator(
            path,
            config,
            tokenizer,
            trust_remote_code=trust_remote_code,
            end_of_turn_ids=end_of_turn_ids,
            **options,
        )
        self._key = key
        return self._generator

    def close(self) -> None:
        """Free the model."""
        if self._generator is not None:
            self._generator.close()
        self._generator = self._key = None


def _read_weights(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 # it is no dict
                yield name, weights.get_tensor(name)
