"""The client of JSON endpoints: deadlines, limits, retries, and answers that are none."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pocl_ds.errors import ResourceError
from pocl_ds.runtime import json_endpoint
from pocl_ds.runtime.json_endpoint import (
    EndpointText,
    JsonEndpoint,
    RejectedRequestError,
    read_key,
    without_surrogates,
)

TEXT = EndpointText("the oracle", "oracle.url", "nothing is lost", "oracle.model", "oracles")
Answer = Callable[[socket.socket, int], None]


class RawServer:
    """A server that reads a request and lets `answer` write bytes."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.requests = answer, list[bytes]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(read_request(connection))
            self.answer(connection, len(self.requests))


def read_request(connection: socket.socket) -> bytes:
    """A complete request: a connection that closes with unread bytes loses the answer."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            return data
        if not (piece := connection.recv(1 << 20)):
            return data
        data += piece


def reply(body: str, status: str = "200 OK", *headers: str, length: int | None = None) -> Answer:
    """An answer with this body. length: that the header says."""
    data = body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data) if length is None else length}"]
    head = "\r\n".join([*lines, "Connection: close", *headers, "", ""]).encode()
    return lambda connection, number: connection.sendall(head + data)


def drip(connection: socket.socket, number: int) -> None:
    """A byte in each tenth of a second, from the status line on."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], RawServer]]:
    servers: list[RawServer] = []

    def start(answer: Answer) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()


def client(*servers: RawServer, key: str = "", **settings: float) -> JsonEndpoint:
    options = {"timeout_seconds": 1.0, "max_retries": 1, "max_response_bytes": 1 << 20, **settings}
    return JsonEndpoint([s.url for s in servers], TEXT, key=key, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (drip, r"does not answer \(no complete answer within 1 s\) after 2 tries: nothing is lost"),
        (lambda *_: time.sleep(3), "no complete answer within 1 s"),
        (lambda *_: None, r"does not answer \(.+\) after 2 tries"),  # closes without an answer
        (
            reply('{"a": 1', length=100),
            r"does not answer \(.*sending complete.*\) after 2 tries",
        ),
        (reply('{"a": 1'), "does not speak the protocol of oracles .*not JSON"),
        (reply(""), "not JSON"),
        (reply("[" * 500_000), "not JSON"),
        (reply("[" + "1" * 5000 + "]"), "not JSON"),  # an integer of more digits than Python reads
        (reply('"' + "x" * (1 << 21) + '"'), "larger than 1 MiB"),
        (reply("<html>", "302 Found", "Location: http://127.0.0.1:9/"), "rejects .*HTTP 302"),
        (reply("no", "401 Unauthorized"), r"rejects the request \(HTTP 401: no\): check oracle.m"),
        (reply("a\nb" * 999, "400 Bad"), r"HTTP 400: a ba ba .{0,200}\): check"),
        (reply("busy", "503 Busy", "Retry-After: -1"), "HTTP 503: busy"),
        (reply("busy", "503 Busy", "Retry-After: nan"), "HTTP 503: busy"),
        (reply("busy", "429 Busy", "Retry-After: soon"), "HTTP 429: busy"),
        (lambda c, _: c.sendall(b"SSH-2.0\r\n"), r"does not answer \("),
    ],
)
def test_a_bad_answer_is_one_sentence(
    serve: Callable[[Answer], RawServer], answer: Answer, message: str
) -> None:
    server, start = serve(answer), time.monotonic()
    # A busy machine may take long for a large answer.
    timeout = 1.0 if "within 1 s" in message else 30.0
    with pytest.raises(ResourceError, match=message) as error:
        client(server, timeout_seconds=timeout).post("ask", {"question": "?"})
    assert "\n" not in str(error.value) and server.url in str(error.value)
    assert time.monotonic() - start < 6 * timeout


def test_a_retry_waits_as_long_as_the_server_asks_but_not_longer_than_a_minute(
    serve: Callable[[Answer], RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(json_endpoint.time, "sleep", waits.append)
    headers = ["Retry-After: 7", "Retry-After: 1e99", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT"]

    def answer(connection: socket.socket, number: int) -> None:
        if number <= len(headers):
            reply("busy", "429 Busy", headers[number - 1])(connection, number)
        else:
            reply('{"a": [1]}')(connection, number)

    assert client(serve(answer), max_retries=5).post("ask", {}) == {"a": [1]}
    assert waits[:2] == [7.0, 60.0] and 1.5 <= waits[2] <= 2.5  # of the third try: 0.5 s * 2**2


def test_another_server_is_asked_at_once(
    serve: Callable[[Answer], RawServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(json_endpoint.time, "sleep", waits.append)
    broken, whole = serve(reply("down", "500 Error")), serve(reply('"yes"'))
    endpoint = client(broken, whole)
    with caplog.at_level(logging.WARNING):
        assert [endpoint.post("ask", {}) for _ in range(4)] == ["yes"] * 4
    # Requests alternate between both, and those to the broken one are sent again.
    assert len(broken.requests) == 2 and len(whole.requests) == 4 and waits == [0.0, 0.0]
    assert caplog.text.count("HTTP 500: down") == 1, "the same reason is logged once"


def test_only_the_request_itself_is_rejected(serve: Callable[[Answer], RawServer]) -> None:
    for status in ("400 Bad", "413 Large", "422 Odd"):
        with pytest.raises(RejectedRequestError):
            client(serve(reply("no", status))).post("ask", {})
    with pytest.raises(ResourceError) as error:
        client(serve(reply("no", "403 Forbidden"))).post("ask", {})
    assert not isinstance(error.value, RejectedRequestError)


def test_the_key_is_sent_and_never_shown(serve: Callable[[Answer], RawServer]) -> None:
    server = serve(reply("your key k-123 is bad", "403 Forbidden"))
    with pytest.raises(ResourceError, match=r"your key \*\*\* is bad"):
        client(server, key="k-123").post("ask", {})
    assert b"bearer k-123" in server.requests[0].lower()


def test_a_key_must_fit_into_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(None, "f") == ""
    monkeypatch.setenv("ORACLE_KEY", " k-123\n")
    assert read_key("ORACLE_KEY", "f") == "k-123"
    for value in ("k\n123", "schlüssel"):
        monkeypatch.setenv("ORACLE_KEY", value)
        with pytest.raises(ResourceError, match="no HTTP header can carry") as error:
            read_key("ORACLE_KEY", "f")
        assert value not in str(error.value)
    monkeypatch.setenv("ORACLE_KEY", " ")
    with pytest.raises(ResourceError, match="ORACLE_KEY, which is not set"):
        read_key("ORACLE_KEY", "f")


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    text = json.loads(r'"a\ud800b \ud83d\ude00"')
    assert without_surrogates(text) == "a\ufffdb \U0001f600"
