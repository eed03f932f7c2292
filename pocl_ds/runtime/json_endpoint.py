"""A client of servers that answer with JSON over HTTP: a judge, or a served teacher.

Every request has a deadline for its whole exchange, a limit on the size of the answer, retries with
exponential backoff over one or several servers, and errors of one sentence. The API key stays in
its authorization header: it is never logged, written to a file, or sent to another host.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocl_ds.errors import ResourceError

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("pocl_ds")

REJECTED_REQUEST = (400, 413, 422)  # status codes that the request itself may cause
BUSY = (408, 409, 425, 429)  # and every code from 500
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 60.0
MAX_RESPONSE_BYTES = 512 << 20
REASON_LENGTH = 200  # characters of an error body that a message shows


class RejectedRequestError(ResourceError):
    """The endpoint rejects this request; others may still succeed."""


class _RetryableError(Exception):
    """A failed exchange that may succeed later. delay: seconds that the server asks to wait."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class _ProtocolError(Exception):
    """An answer that is not what such a server gives."""


@dataclass(frozen=True)
class EndpointText:
    """What messages say of an endpoint. name: as in "the judge". url_field: the recipe field of its
    address. saved: what a failure does not lose. rejection_fields: what to check if it rejects a
    request. protocol: what it should speak.
    """

    name: str
    url_field: str
    saved: str
    rejection_fields: str
    protocol: str


class JsonEndpoint:
    """Sends requests to one of several equal servers. Safe to call from several threads."""

    def __init__(
        self,
        urls: Sequence[str],
        text: EndpointText,
        *,
        key: str = "",
        timeout_seconds: float,
        max_retries: int,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        """urls: requests are distributed over them, and a retry goes to the next one. key: sent as
        a bearer token. timeout_seconds: of one exchange, from the connection to the last byte.
        """
        self.urls, self.text = [url.rstrip("/") for url in urls], text
        self._key, self._timeout, self._max_retries = key, timeout_seconds, max_retries
        self._max_bytes = max_response_bytes
        self._first_url = itertools.count()
        self._reported: set[str] = set()  # reasons of retries that the log has
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client: httpx.AsyncClient | None = None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a server answers to a POST request.

        Raises:
            RejectedRequestError: a server rejects this request.
            ResourceError: no server answers, or one does not speak the protocol.
        """
        return self._request("POST", path, body)

    def get(self, path: str, url: str | None = None) -> Any:
        """Like `post`, for a GET request. url: of the only server to ask."""
        return self._request("GET", path, None, [url] if url else None)

    def protocol_error(self, url: str | None = None, reason: str = "") -> ResourceError:
        """The error that an answer is not what such a server gives."""
        return ResourceError(
            f"{self.text.name} at {url or ', '.join(self.urls)} does not speak the protocol of "
            f"{self.text.protocol}{f' ({self.without_key(reason)})' if reason else ''}: check "
            f"{self.text.url_field}"
        )

    def without_key(self, text: str) -> str:
        """Text of a server without the key, which some servers repeat."""
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, urls: Sequence[str] | None = None
    ) -> Any:
        urls = urls or self.urls
        first = next(self._first_url)
        for attempt in range(self._max_retries + 1):
            url = urls[(first + attempt) % len(urls)]
            try:
                exchange = self._exchange(method, f"{url}/{path}", body)
                return asyncio.run_coroutine_threadsafe(exchange, self._loop).result()
            except _ProtocolError as error:
                raise self.protocol_error(url, str(error)) from None
            except RejectedRequestError as error:
                raise self._rejection(url, str(error), RejectedRequestError) from None
            except ResourceError as error:
                raise self._rejection(url, str(error), ResourceError) from None
            except _RetryableError as error:
                reason = self.without_key(str(error))
                if attempt == self._max_retries:
                    raise ResourceError(
                        f"{self.text.name} at {url} does not answer ({reason}) after "
                        f"{attempt + 1} tries: {self.text.saved}, run the same command again when "
                        f"it is back, or check {self.text.url_field}"
                    ) from None
                # Another server is asked at once, the same one after a while.
                delay = 0.0
                if (attempt + 1) % len(urls) == 0:
                    delay = _backoff(attempt // len(urls), error.delay)
                self._report_retry(url, reason, delay)
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _rejection(self, url: str, reason: str, kind: type[ResourceError]) -> ResourceError:
        return kind(
            f"{self.text.name} at {url} rejects the request ({self.without_key(reason)}): check "
            f"{self.text.rejection_fields}"
        )

    def _report_retry(self, url: str, reason: str, delay: float) -> None:
        """Log a retry, once for each server and reason."""
        if f"{url} {reason}" not in self._reported:
            self._reported.add(f"{url} {reason}")
            log.warning(
                "%s at %s: %s; the request is sent again after %.1f s",
                self.text.name,
                url,
                reason,
                delay,
            )

    async def _exchange(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        """One request and its answer, within the deadline."""
        import httpx

        try:
            status, headers, content = await asyncio.wait_for(
                self._send(method, url, body), self._timeout
            )
        except (TimeoutError, asyncio.TimeoutError):
            raise _RetryableError(f"no complete answer within {self._timeout:g} s") from None
        except httpx.HTTPError as error:
            raise _RetryableError(str(error) or type(error).__name__) from None
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise ResourceError(f"the request cannot be sent: {error}") from None
        if not 200 <= status < 300:
            reason = " ".join(content.decode("utf-8", "replace").split())[:REASON_LENGTH]
            reason = f"HTTP {status}: {reason}"
            if status in BUSY or status >= 500:
                raise _RetryableError(reason, _parse_delay(headers.get("Retry-After")))
            raise (RejectedRequestError if status in REJECTED_REQUEST else ResourceError)(reason)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            start = " ".join(content[:REASON_LENGTH].decode("utf-8", "replace").split())
            raise _ProtocolError(f"its answer is not JSON: {start[:80]!r}") from None

    async def _send(
        self, method: str, url: str, body: dict[str, Any] | None
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of an answer. Raises _ProtocolError if the body is too large."""
        import httpx

        if self._client is None:
            # Imported and made on the first request. A redirect would carry the key to another
            # host, and turn the POST into a GET.
            self._client = httpx.AsyncClient(
                timeout=None, follow_redirects=False, limits=httpx.Limits(max_connections=None)
            )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with self._client.stream(method, url, json=body, headers=headers) as response:
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > self._max_bytes:
                    raise _ProtocolError(f"its answer is larger than {self._max_bytes >> 20} MiB")
            return response.status_code, response.headers, bytes(content)


def read_key(variable: str | None, field: str) -> str:
    """The API key in an environment variable; empty without a variable. field: that names it.

    Raises ResourceError if the variable is not set, or no header can carry its value.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ResourceError(f"{field} names {variable}, which is not set: export the key in it")
    if not key.isascii() or not key.isprintable():
        raise ResourceError(
            f"{field} names {variable}, whose value has characters that no HTTP header can carry: "
            "export the key alone in it"
        )
    return key


def without_surrogates(text: str) -> str:
    """The text with a replacement character for each half of a pair that JSON may contain and
    UTF-8 cannot.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parse_delay(value: str | None) -> float | None:
    """The seconds of a Retry-After header; None for a date or nonsense."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _backoff(attempt: int, delay: float | None) -> float:
    """Seconds to wait before a retry: as long as the server asks, else twice as long each time."""
    if delay is None:
        delay = FIRST_DELAY_SECONDS * 2 ** min(attempt, 10) * random.uniform(0.75, 1.25)
    return min(delay, MAX_DELAY_SECONDS)
