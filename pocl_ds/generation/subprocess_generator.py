"""A generator in a separate process next to a rank (`engine_process`).

    python -m pocl_ds.generation.subprocess_generator FD     started by `SubprocessGenerator` only

Weights pass through a file in shared memory, or on a GPU through a buffer that both processes see
(`weight_buckets`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ResourceError
from pocl_ds.generation import engine_process
from pocl_ds.generation.protocol import ProgressCallback, SamplingParams, ignore_progress
from pocl_ds.generation.weight_buckets import (
    Bucket,
    WeightTransfer,
    pack_buckets,
    unpack_buckets,
)
from pocl_ds.runtime.formatting import format_size

SHARED_MEMORY = Path("/dev/shm")
FILE_OVERHEAD = 1 << 20  # bytes of a weights file besides its tensors
ALTERNATIVE = "policy.rollout_backend=transformers"  # the setting that does not need this process


class SubprocessGenerator(engine_process.EngineProcess):
    """See `protocol.Generator`. The child opens the model when this object is made."""

    purpose, alternative = "generates the student's responses", ALTERNATIVE
    device = torch.device("cuda")  # of the weights, with weight_transfer="cuda_ipc"

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        *,
        max_length: int,
        threads: int,
        device: str | None,
        sleep_level: int = 0,
        weight_transfer: WeightTransfer = "file",
        trust_remote_code: bool = False,
        end_of_turn_ids: Sequence[int] = (),
    ) -> None:
        """device: the GPU that the child shares with this process, as in CUDA_VISIBLE_DEVICES.
        sleep_level: see `VllmGenerator`; the attribute holds the level that this machine supports.
        weight_transfer: `cuda_ipc` needs weights on that GPU, which is torch's current one.
        end_of_turn_ids: see `open_generator`.
        """
        super().__init__("pocl_ds.generation.subprocess_generator", threads=threads, device=device)
        self.processed_tokens, self.weight_transfer = 0, weight_transfer
        self.sleep_level, self.stop_token_ids = self._call(
            "open",
            model_path,
            config,
            max_length,
            threads,
            sleep_level,
            trust_remote_code,
            list(end_of_turn_ids),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[str]:
        """See `protocol.Generator`."""
        texts: list[str] = self._call("generate", prompts, sampling, on_progress=on_progress)
        return texts

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """See `protocol.Generator`."""
        responses: list[list[int]] = self._call(
            "generate_ids", prompts, sampling, on_progress=on_progress
        )
        self.processed_tokens += sum(map(len, responses))
        return responses

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`."""
        values: list[NDArray[np.float32]] = self._call(
            "log_probs", sequences, prompt_tokens, on_progress=on_progress
        )
        return values

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `protocol.Generator`."""
        if self.weight_transfer == "file":
            self._write_weights(weights)
            return
        with contextlib.closing(pack_buckets(weights, self.device)) as buckets:
            self._call("load_buckets", buckets=buckets)
        torch.cuda.ipc_collect()  # frees the buffer, which the child has closed

    def _write_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights}
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        handle, name = tempfile.mkstemp(
            prefix="pocl-weights-", suffix=".safetensors", dir=_weights_directory(size)
        )
        os.close(handle)
        try:
            save_file(tensors, name)
            self._call("load_weights", name)
        except SafetensorError:  # another rank has filled the directory meanwhile
            raise _no_space(size) from None
        finally:
            os.unlink(name)

    def sleep(self) -> None:
        """See `protocol.Generator`."""
        self._call("sleep")

    def _call(
        self,
        method: str,
        *arguments: Any,
        on_progress: ProgressCallback = ignore_progress,
        buckets: Iterator[Bucket] = iter(()),
    ) -> Any:
        """Call a method of the child's generator. buckets: for a child that asks for them. Raises
        ResourceError, see `messages`.
        """
        value: Any = None
        for kind, value in self.messages(method, *arguments):
            if kind == "progress":
                on_progress(value)
            elif kind == "bucket":
                with self.explained_end():
                    self.connection.send(next(buckets, None))
        return value


def _weights_directory(size: int) -> Path:
    """A directory with `size` free bytes: shared memory, otherwise the one for temporary files. In
    a container shared memory is often small.
    """
    for directory in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        if (
            directory.is_dir()
            and os.access(directory, os.W_OK)
            and shutil.disk_usage(directory).free > size + FILE_OVERHEAD
        ):
            return directory
    raise _no_space(size)


def _no_space(size: int) -> ResourceError:
    return ResourceError(
        f"neither {SHARED_MEMORY} nor {tempfile.gettempdir()} has {format_size(size)} free for the "
        f"student's weights on their way to the rollout process: free some space, set TMPDIR to a "
        f"larger directory, or set {ALTERNATIVE}"
    )


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the connection. Messages besides the result are
    "progress", and "bucket", which asks for the next one.
    """
    generator: Any = None

    def answer(method: str, arguments: tuple[Any, ...]) -> Any:
        nonlocal generator
        if method == "open":
            generator = _open(*arguments)
            return generator.sleep_level, generator.stop_token_ids
        if method == "load_weights":
            return generator.load_weights(load_file(arguments[0]).items())
        if method == "load_buckets":
            return generator.load_weights(_receive_weights(connection))
        if method == "sleep":
            return generator.sleep()
        return getattr(generator, method)(
            *arguments, lambda finished: connection.send(("progress", finished))
        )

    engine_process.serve(connection, answer)
    if generator is not None:
        generator.close()


def _receive_weights(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    """The weights of the buckets that the parent sends when it is asked for them."""

    def receive() -> Bucket | None:
        connection.send(("bucket", None))
        bucket: Bucket | None = connection.recv()
        return bucket

    return unpack_buckets(receive, torch.device("cuda", 0))


def _open(
    model_path: str,
    config: GenerationConfig,
    max_length: int,
    threads: int,
    sleep_level: int,
    trust_remote_code: bool,
    end_of_turn_ids: Sequence[int],
) -> Any:
    from pocl_ds.generation.backends import open_generator
    from pocl_ds.models.load import load_tokenizer

    return open_generator(
        model_path,
        config,
        load_tokenizer(model_path, trust_remote_code=trust_remote_code),
        max_length=max_length,
        threads=threads,
        trust_remote_code=trust_remote_code,
        alternative=ALTERNATIVE,
        sleep_level=sleep_level,
        end_of_turn_ids=end_of_turn_ids,
    )


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
