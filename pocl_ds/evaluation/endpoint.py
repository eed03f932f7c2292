"""The judge's endpoint: one question to an OpenAI-compatible chat completion API.

The client is the `openai` package, which retries with exponential backoff. The API key stays in
its authorization header: it is never logged, written to a file, or sent to another host.
"""

from __future__ import annotations

import os
from typing import Any

from pocl_ds.config import JudgeConfig
from pocl_ds.errors import ResourceError

REJECTED_REQUEST = (400, 413, 422)  # status codes that the question itself may cause
BUSY = (408, 409, 429)  # and every code from 500: the client has retried these


class RejectedQuestionError(ResourceError):
    """The endpoint rejects this question; others may still succeed."""


class JudgeEndpoint:
    """Sends questions to the judge. Safe to call from several threads.

    Raises:
        ResourceError: evaluate.judge.api_key_env names a variable that is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        import openai

        self.config = config
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ResourceError(
                f"evaluate.judge.api_key_env names {config.api_key_env}, which is not set: export "
                "the judge's key in it"
            )
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",  # the client requires one
            timeout=config.timeout_seconds,
            max_retries=config.max_retries,
            # A redirect would carry the key to another host, and turn the POST into a GET.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def ask(self, question: str) -> tuple[str, bool]:
        """The judge's reply without its `<think>` part, and whether it is complete.

        Raises:
            RejectedQuestionError: the endpoint rejects this question.
            ResourceError: the endpoint does not answer, or does not speak the protocol.
        """
        import openai

        options: dict[str, Any] = {self.config.max_tokens_parameter: self.config.max_tokens}
        if self.config.temperature is not None:
            options["temperature"] = self.config.temperature
        if not self._key:
            options["extra_headers"] = {"Authorization": openai.Omit()}
        try:
            completion = self._client.chat.completions.create(
                model=self.config.model, messages=[{"role": "user", "content": question}], **options
            )
            choice = completion.choices[0]
            content = choice.message.content
        except openai.APIStatusError as error:
            raise self._status_error(error.status_code, error.response.text) from None
        except openai.APIConnectionError as error:  # no connection, a timeout
            raise self._unavailable(str(error.__cause__ or error)) from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError):
            raise ResourceError(
                f"the judge at {self.config.base_url} does not speak the protocol of OpenAI's chat "
                "completions: check evaluate.judge.base_url, which usually ends in /v1"
            ) from None
        text = content.rpartition("</think>")[2] if isinstance(content, str) else ""
        return self._without_key(text), choice.finish_reason != "length"

    def _status_error(self, code: int, body: str) -> ResourceError:
        reason = f"HTTP {code}: {' '.join(body.split())[:200]}"
        if code in BUSY or code >= 500:
            return self._unavailable(reason)
        kind = RejectedQuestionError if code in REJECTED_REQUEST else ResourceError
        return kind(
            f"the judge at {self.config.base_url} rejects the question "
            f"({self._without_key(reason)}): check evaluate.judge.base_url, model, api_key_env, "
            "max_tokens_parameter and temperature"
        )

    def _unavailable(self, reason: str) -> ResourceError:
        return ResourceError(
            f"the judge at {self.config.base_url} does not answer ({self._without_key(reason)}) "
            f"after {self.config.max_retries + 1} tries: the verdicts so far are saved, run the "
            "same command again when it is back, or check evaluate.judge.base_url"
        )

    def _without_key(self, text: str) -> str:
        """Text of the endpoint without the key, which some endpoints repeat."""
        return text.replace(self._key, "***") if self._key else text
