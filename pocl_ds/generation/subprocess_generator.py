"""A generator in a separate process next to a rank: vLLM creates process groups, which a rank
already has.

    python -m pocl_ds.generation.subprocess_generator FD     started by `SubprocessGenerator` only

The two processes communicate over a socket pair. Weights pass through a file in shared memory, or
on a GPU through a buffer that both processes see (`weight_buckets`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
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
from pocl_ds.errors import PoclError, ResourceError
from pocl_ds.generation.protocol import ProgressCallback, SamplingParams, ignore_progress
from pocl_ds.generation.weight_buckets import (
    Bucket,
    WeightTransfer,
    pack_buckets,
    unpack_buckets,
)
from pocl_ds.resources import module_command

SHARED_MEMORY = Path("/dev/shm")
FILE_OVERHEAD = 1 << 20  # bytes of a weights file besides its tensors
ALTERNATIVE = "policy.rollout_backend=transformers"  # the setting that does not need this process
# Environment variables that make a process a rank of a group, or part of a workflow step: the child
# is neither.
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "POCL_EXITS",
    "POCL_WITHIN",
)


class SubprocessGenerator:
    """See `protocol.Generator`. The child opens the model when this object is made.

    One thread at a time may call it; `close` may interrupt a call of another thread.
    """

    device = torch.device("cuda")  # of the weights, with weight_transfer="cuda_ipc"
    _in_call = False  # the child has not answered yet

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
        # The child's environment: not a rank, one GPU, its own number of threads.
        environment = {
            name: value for name, value in os.environ.items() if name not in RANK_VARIABLES
        }
        environment["OMP_NUM_THREADS"] = str(threads)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device

        # Start the child with one end of the socket pair.
        parent_socket, child_socket = socket.socketpair()
        descriptor = child_socket.fileno()
        with child_socket:
            self.process = subprocess.Popen(
                [*module_command("pocl_ds.generation.subprocess_generator"), str(descriptor)],
                pass_fds=(descriptor,),
                env=environment,
                start_new_session=True,
            )
        self.connection = Connection(parent_socket.detach())
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

    def close(self) -> None:
        """End the process. A call that another thread waits for raises ResourceError there."""
        if self.process.poll() is None:
            # A child that computes does not notice that its connection is closed.
            if self._in_call:
                self.process.terminate()
            else:
                self.connection.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _call(
        self,
        method: str,
        *arguments: Any,
        on_progress: ProgressCallback = ignore_progress,
        buckets: Iterator[Bucket] = iter(()),
    ) -> Any:
        """Call a method of the child's generator. buckets: for a child that asks for them. Raises
        ResourceError with the child's message, or if the child has ended.
        """
        self._in_call = True
        try:
            self.connection.send((method, arguments))
            kind, value = self.connection.recv()
            while kind in ("progress", "bucket"):
                if kind == "progress":
                    on_progress(value)
                else:
                    self.connection.send(next(buckets, None))
                kind, value = self.connection.recv()
        except (EOFError, OSError, pickle.PickleError) as error:
            code = self.process.wait(timeout=30)
            raise ResourceError(
                f"the process that generates the student's responses ended with code {code} "
                f"({error}): its error message is above; {ALTERNATIVE} works without it"
            ) from None
        finally:
            self._in_call = False
        if kind == "error":
            raise ResourceError(value)
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
        f"neither {SHARED_MEMORY} nor {tempfile.gettempdir()} has {size / 1e9:.1f} GB free for the "
        f"student's weights on their way to the rollout process: free some space, set TMPDIR to a "
        f"larger directory, or set {ALTERNATIVE}"
    )


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the connection. Answers are (kind, value): any number of
    "progress", or of "bucket", which asks for the next one; then "result" or "error".
    """
    generator: Any = None
    while True:
        # Wait for the next call.
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        # Answer it; only errors with a message for users reach the parent.
        try:
            if method == "open":
                generator = _open(*arguments)
                value: Any = generator.sleep_level, generator.stop_token_ids
            elif method == "load_weights":
                value = generator.load_weights(load_file(arguments[0]).items())
            elif method == "load_buckets":
                value = generator.load_weights(_receive_weights(connection))
            elif method == "sleep":
                value = generator.sleep()
            else:
                value = getattr(generator, method)(
                    *arguments, lambda finished: connection.send(("progress", finished))
                )
        except EOFError:
            break
        except PoclError as error:
            connection.send(("error", str(error)))
        else:
            connection.send(("result", value))
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
