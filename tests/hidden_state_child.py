"""A stand-in for the process that runs the teacher in vLLM: it answers with the states of
transformers, so that tests need no engine.

    python -m hidden_state_child FD

HIDDEN_STATE_CHILD names what goes wrong: `dies:N` in the answer to call N, `refuses` the model,
`layer` gives the states of the layer before the last one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_ds.errors import ResourceError
from pocl_ds.generation import engine_process
from pocl_ds.models.heads import hidden_states
from pocl_ds.models.load import load_model

TESTS = Path(__file__).resolve().parent
FAULT, _, NUMBER = os.environ.get("HIDDEN_STATE_CHILD", "").partition(":")


def start_child_instead(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let `EngineProcess` start this module. Returns the processes that it starts."""
    started: list[Any] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        if "hidden_state_child" in arguments[0]:
            started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(
        engine_process, "module_command", lambda _: [sys.executable, "-m", "hidden_state_child"]
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    return started


def main(connection: Connection) -> None:
    model: Any = None
    calls = 0

    def answer(method: str, arguments: tuple[Any, ...]) -> Any:
        nonlocal model, calls
        if method == "open":
            if FAULT == "refuses":
                raise ResourceError("vLLM cannot open the model (unknown quantization method)")
            model = load_model(arguments[0])
            return "float32"
        calls += 1
        for ids, positions in zip(*arguments, strict=True):
            if FAULT == "dies" and calls == int(NUMBER):
                os._exit(9)
            with torch.no_grad():
                tokens = torch.from_numpy(ids)[None]
                if FAULT == "layer":
                    states = model(tokens, output_hidden_states=True).hidden_states[-2][0]
                else:
                    states = hidden_states(model, tokens, None)[0]
            data = states[torch.from_numpy(positions)].contiguous().view(torch.uint8).numpy()
            connection.send(("states", (1, data)))
        return None

    engine_process.serve(connection, answer)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
