"""The judge's endpoint: one question to an OpenAI-compatible chat completion API."""

from __future__ import annotations

from typing import Any

from pocl_ds.config import JudgeConfig
from pocl_ds.runtime.json_endpoint import (
    EndpointText,
    JsonEndpoint,
    read_key,
    without_surrogates,
)

TEXT = EndpointText(
    name="the judge",
    url_field="evaluate.judge.base_url, which usually ends in /v1",
    saved="the verdicts so far are saved",
    rejection_fields="evaluate.judge.base_url, model, api_key_env, max_tokens_parameter and "
    "temperature",
    protocol="OpenAI's chat completions",
)
MAX_REPLY_BYTES = 16 << 20


class JudgeEndpoint:
    """Sends questions to the judge. Safe to call from several threads.

    Raises:
        ResourceError: evaluate.judge.api_key_env names a variable that is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._endpoint = JsonEndpoint(
            [config.base_url],
            TEXT,
            key=read_key(config.api_key_env, "evaluate.judge.api_key_env"),
            timeout_seconds=config.timeout_seconds,
            max_retries=config.max_retries,
            max_response_bytes=MAX_REPLY_BYTES,
        )

    def ask(self, question: str) -> tuple[str, bool]:
        """The judge's reply without its `<think>` part, and whether it is complete.

        Raises:
            RejectedRequestError: the endpoint rejects this question.
            ResourceError: the endpoint does not answer, or does not speak the protocol.
        """
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            self.config.max_tokens_parameter: self.config.max_tokens,
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        completion = self._endpoint.post("chat/completions", body)
        try:
            choice = completion["choices"][0]
            content = choice["message"]["content"]
            complete = choice.get("finish_reason") != "length"
        except (LookupError, TypeError, AttributeError):
            raise self._endpoint.protocol_error() from None
        text = content.rpartition("</think>")[2] if isinstance(content, str) else ""
        return self._endpoint.without_key(without_surrogates(text)), complete

    def close(self) -> None:
        """Close the connection."""
        self._endpoint.close()
