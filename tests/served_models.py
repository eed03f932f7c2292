"""Servers of tiny models: a real one of vLLM, a proxy that disturbs its answers, and a stand-in for
SGLang, which cannot be installed without a GPU.
"""

from __future__ import annotations

import abc
import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from judge_server import free_port
from transformers import AutoModelForCausalLM

# Path, number of the request and the answer to it -> status and body to send in its place.
Disturbance = Callable[[str, int, Any], tuple[int, bytes] | None]


@contextlib.contextmanager
def serve_vllm(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM server. log: a file for its output."""
    port = free_port()
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *options),
    ]
    with log.open("w") as stream:
        child = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class ModelServer(abc.ABC):
    """An HTTP server that answers with JSON. requests: those that it got, as path and body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.disturb: Disturbance = lambda path, number, answer: None
        server, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                with lock:
                    server.requests.append((self.path, body))
                    number = len([path for path, _ in server.requests if path == self.path])
                answer = server.answer(self.path, body)
                disturbed = server.disturb(self.path, number, answer)
                status, data = disturbed or (200, json.dumps(answer).encode())
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @abc.abstractmethod
    def answer(self, path: str, body: Any) -> Any:
        """The JSON that answers a request."""

    def close(self) -> None:
        """Stop the server."""
        self.http.shutdown()
        self.http.server_close()


class Proxy(ModelServer):
    """A server that passes requests on to another, whose answers `disturb` may replace."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream.removesuffix("/v1")

    def answer(self, path: str, body: Any) -> Any:
        """See `ModelServer`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.upstream}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)


class SglangStandIn(ModelServer):
    """Answers as SGLang 0.5.23 does: `/generate` with input_ids, and its log-probabilities."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, path: str, body: Any) -> Any:
        """See `ModelServer`."""
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": 512}]}
        assert path == "/generate"
        ids, sampling = body["input_ids"], body["sampling_params"]
        assert sampling["temperature"] == 1.0 or not body.get("return_logprob")
        written = list(ids)
        while len(written) - len(ids) < sampling["max_new_tokens"]:
            logits = self.model(torch.tensor([written])).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] in sampling.get("stop_token_ids", ()):
                break
        meta: dict[str, Any] = {"prompt_tokens": len(ids)}
        if body.get("return_logprob"):
            start, k = body["logprob_start_len"], body["top_logprobs_num"]
            logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [[None, ids[start], None]]
            top: list[Any] = [None]
            for place in range(start + 1, len(ids)):
                row = logs[place - 1]
                own.append([float(row[ids[place]]), ids[place], None])
                values, tokens = row.topk(k)
                pairs = zip(values.tolist(), tokens.tolist(), strict=True)
                top.append([[value, token, None] for value, token in pairs])
            meta |= {"input_token_logprobs": own, "input_top_logprobs": top}
        return {"text": "", "output_ids": written[len(ids) :], "meta_info": meta}
