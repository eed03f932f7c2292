"""One question to an OpenAI-compatible endpoint, with the standard library: POST
BASE_URL/chat/completions.

The key goes into one header of the request and nowhere else: not into logs, messages, files, nor to
another host.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from typing import Any

from pocl_ds.config import JudgeConfig
from pocl_ds.errors import ResourceError

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # worth another try
REFUSED = (400, 413, 422)  # may be this question's own fault
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a question is put again


class Endpoint:
    """Where questions go. Raises ResourceError where evaluate.judge.api_key_env names a variable that
    is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config, self.url = config, f"{config.base_url.rstrip('/')}/chat/completions"
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ResourceError(
                f"evaluate.judge.api_key_env names {config.api_key_env}, which is not set: export the "
                f"judge's key there"
            )
        self.stop = threading.Event()  # set: nobody waits any more for an answer
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, messages: list[dict[str, str]]) -> tuple[str, bool]:
        """The text of the answer, without thoughts, and whether it came to its end. Tries again
        while the endpoint is busy or away; raises ResourceError where it stays so, RefusedError
        where it does not take this question.
        """
        wait = FIRST_WAIT
        for attempt in range(self.config.max_retries + 1):
            try:
                return self._once(messages)
            except _Busy as busy:
                if attempt == self.config.max_retries or self.stop.is_set():
                    raise ResourceError(
                        f"the judge at {self.url} does not answer ({busy}) after {attempt + 1} "
                        f"tries: what is judged is kept, "
                        "start the same command again when it is there, or check "
                        "evaluate.judge.base_url"
                    ) from None
                # Requests that failed together must not come back together.
                self.stop.wait(min(max(wait * random.uniform(0.5, 1.5), busy.after), LONGEST_WAIT))
                wait *= 2
        raise AssertionError("unreachable")

    def _once(self, messages: list[dict[str, str]]) -> tuple[str, bool]:
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages,
            config.max_tokens_parameter: config.max_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=config.timeout_seconds) as response:
                return self._content(response.read())
        except urllib.error.HTTPError as error:
            said = self._hidden(" ".join(error.read(2000).decode(errors="replace").split())[:200])
            if error.code in AGAIN:
                raise _Busy(
                    f"HTTP {error.code}: {said}", _seconds(error.headers.get("Retry-After"))
                ) from None
            kind = RefusedError if error.code in REFUSED else ResourceError
            raise kind(
                f"the judge at {self.url} refuses the question (HTTP {error.code}: {said}): check "
                "evaluate.judge.base_url, model and api_key_env, max_tokens_parameter and temperature"
            ) from None
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # no connection, a timeout, an answer cut short
            raise _Busy(
                self._hidden(str(getattr(error, "reason", None) or error or type(error).__name__))
            ) from None

    def _content(self, body: bytes) -> tuple[str, bool]:
        try:
            choice = json.loads(body)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ResourceError(
                f"the judge at {self.url} does not speak the protocol of OpenAI's chat "
                f"completions: check "
                "evaluate.judge.base_url, which mostly ends in /v1"
            ) from None
        said = (
            self._hidden(content.rpartition("</think>")[2]) if isinstance(content, str) else ""
        )  # null: it said nothing
        return said, choice.get("finish_reason") != "length"

    def _hidden(self, text: str) -> str:
        """What an endpoint said, without the key, which some repeat."""
        return text.replace(self._key, "***") if self._key else text


class RefusedError(ResourceError):
    """One question that the endpoint does not take."""


class _Busy(Exception):
    """The endpoint may answer later; after: seconds that it asks for."""

    def __init__(self, said: str, after: float = 0.0) -> None:
        super().__init__(said)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key must not follow a redirect to another host, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _seconds(text: str | None) -> float:
    """Of a Retry-After header in seconds; its other form, a date, is left to our own waits."""
    return float(text) if text and text.isdigit() else 0.0
