"""Fills teacher caches by vLLM, one model after the other in this process, as vLLM is slow to
import. The separate process that a rank would start is left out.

    python -m vllm_cache_worker OUT.json FOLDER...

Each FOLDER has the model in model/, and gets a cache of hidden states. A model that vLLM refuses
has its message in OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from family_worker import speed_up_vllm
from teacher_cache_runs import write_cache

from pocl_ds.errors import PoclError
from pocl_ds.generation import vllm_hidden_states
from pocl_ds.generation.vllm_hidden_states import VllmHiddenStates
from pocl_ds.teachers import vllm_source


class InProcess:
    """`HiddenStateProcess` without a process."""

    def __init__(self, path: str, config: Any, *, device: str | None, **options: Any) -> None:
        assert device is None
        self.model = VllmHiddenStates(path, config, **options)

    def hidden_states(self, sequences: Any, positions: Any) -> Iterator[Any]:
        parts: list[Any] = []
        self.model.hidden_states(sequences, positions, parts.append)
        assert len(parts) > 1 or sum(map(len, sequences)) <= self.model.max_tokens
        return iter(parts)

    def close(self) -> None:
        self.model.close()


def main(out: Path, folders: list[Path]) -> None:
    speed_up_vllm()
    setattr(vllm_hidden_states, "ITERATIONS", 1)  # noqa: B010  # several parts for each call
    setattr(vllm_source, "HiddenStateProcess", InProcess)  # noqa: B010
    messages = {}
    for folder in folders:
        try:
            write_cache(folder / "vllm", folder / "model", backend="vllm", max_batch_tokens=32)
        except PoclError as error:
            messages[folder.name] = str(error)
    out.write_text(json.dumps(messages))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
