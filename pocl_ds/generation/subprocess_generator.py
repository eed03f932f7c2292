"""A generator in a process of its own, beside a rank: vLLM makes process groups, which a rank
already has.

    python -m pocl_ds.generation.subprocess_generator FD     started by `ChildGenerator`, not by people

The two speak over a socket pair; weights go through a file in memory.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import PoclError, ResourceError
from pocl_ds.generation.protocol import Sampling
from pocl_ds.resources import module_command

MEMORY = Path("/dev/shm")
SPARE = 1 << 20  # bytes of a file beside its tensors
INSTEAD = "policy.rollout_backend=transformers"  # does without this process
# What makes a process a rank of a group, or of a job step: the child is neither.
OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "POCL_EXITS",
    "POCL_WITHIN",
)


class ChildGenerator:
    """See `protocol.Generator`; the model is opened when the first call comes."""

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        *,
        max_length: int,
        threads: int,
        device: str | None,
        sleep_level: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """device: the GPU that it shares with this process, as CUDA_VISIBLE_DEVICES has it.
        sleep_level: see `VllmGenerator`; afterwards the one that this machine has.
        """
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        environment |= {"OMP_NUM_THREADS": str(threads)} | (
            {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        )
        with theirs:
            self.process = subprocess.Popen(
                [*module_command("pocl_ds.generation.subprocess_generator"), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.tokens = 0
        opened: tuple[int, list[int]] = self._ask(
            "open", model_path, config, max_length, threads, sleep_level, trust_remote_code
        )
        self.sleep_level, self.stops = opened

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """See `protocol.Generator`."""
        found: list[str] = self._ask("generate", prompts, sampling)
        return found

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """See `protocol.Generator`."""
        found: list[list[int]] = self._ask("write", prompts, sampling)
        self.tokens += sum(map(len, found))
        return found

    def log_probs(
        self, sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`."""
        found: list[NDArray[np.float32]] = self._ask("log_probs", sequences, prompt_tokens)
        return found

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """See `protocol.Generator`."""
        size = sum(value.numel() * value.element_size() for value in weights.values())
        handle, name = tempfile.mkstemp(
            prefix="pocl-weights-", suffix=".safetensors", dir=_room(size)
        )
        os.close(handle)
        try:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in weights.items()}, name
            )
            self._ask("refresh", name)
        except SafetensorError:  # another rank may have taken the room
            raise _no_room(size) from None
        finally:
            os.unlink(name)

    def rest(self) -> None:
        """See `protocol.Generator`."""
        self._ask("rest")

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.connection.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self.connection.send((what, arguments))
            fault, value = self.connection.recv()
        except (EOFError, OSError, pickle.PickleError) as error:
            code = self.process.wait(timeout=30)
            raise ResourceError(
                f"the process that writes the student's responses ended with code {code} "
                f"({error}): see above; "
                f"{INSTEAD} does without it"
            ) from None
        if fault is not None:
            raise ResourceError(fault)
        return value


def _room(size: int) -> Path:
    """A folder with so many bytes: in memory, else for temporary files. A container often has
    little of the first.
    """
    for folder in (MEMORY, Path(tempfile.gettempdir())):
        if (
            folder.is_dir()
            and os.access(folder, os.W_OK)
            and shutil.disk_usage(folder).free > size + SPARE
        ):
            return folder
    raise _no_room(size)


def _no_room(size: int) -> ResourceError:
    return ResourceError(
        f"neither {MEMORY} nor {tempfile.gettempdir()} has the {size / 1e9:.1f} GB in which the "
        f"student's weights go to their "
        f"writer: free some, name a larger folder in TMPDIR, or set {INSTEAD}"
    )


def serve(connection: Connection) -> None:
    """Answer until the other side closes."""
    from pocl_ds.generation.backends import open_generator
    from pocl_ds.models.load import load_tokenizer

    generator: Any = None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            break
        fault: str | None = None
        value: Any = None
        try:
            if what == "open":
                path, config, max_length, threads, level, trusted = arguments
                generator = open_generator(
                    path,
                    config,
                    load_tokenizer(path, trust_remote_code=trusted),
                    max_length=max_length,
                    threads=threads,
                    trust_remote_code=trusted,
                    instead=INSTEAD,
                    sleep_level=level,
                )
                value = generator.sleep_level, generator.stops
            elif what == "refresh":
                generator.refresh(load_file(arguments[0]))
            else:
                value = getattr(generator, what)(*arguments)
        except PoclError as error:
            fault = str(error)
        connection.send((fault, value))
    if generator is not None:
        generator.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
