"""A local endpoint that acts as the judge, and the configuration of an evaluation that uses it."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from pocl_ds.config import EvaluateConfig, JudgeConfig

KEY = "sk-very-secret-0123"
# Question and number of the request -> status, text, headers.
Reply = Callable[[str, int], tuple[int, str, dict[str, str]]]


class JudgeServer:
    """An endpoint that answers with `reply`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Reply = lambda question, number: (200, "Fine.\nScore: 7", {})
        server, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(
                        {"path": self.path, "key": self.headers.get("Authorization"), **body}
                    )
                    number = len(server.requests)
                status, text, headers = server.reply(body["messages"][0]["content"], number)
                payload = (
                    text
                    if status != 200 or headers.get("raw")
                    else json.dumps({"choices": [{"message": {"content": text}}]})
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload.encode())))
                self.end_headers()
                self.wfile.write(payload.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def judge_config(url: str, **judge_fields: Any) -> EvaluateConfig:
    """An evaluation of one benchmark by a judge at this address."""
    fields = {
        "base_url": url,
        "model": "m",
        "max_retries": 2,
        "max_concurrency": 3,
        "timeout_seconds": 5.0,
        **judge_fields,
    }
    return EvaluateConfig(
        benchmarks={"b": "b.jsonl"}, seeds=(10,), held_out_loss=False, judge=JudgeConfig(**fields)
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
