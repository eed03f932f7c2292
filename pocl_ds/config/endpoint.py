"""Servers that answer over HTTP: what `evaluate.judge` and `teacher.endpoint` share."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pocl_ds.config.base import (
    RUNTIME_ONLY,
    NonNegative,
    Positive,
    Seconds,
    Section,
    split_names,
    text_pattern,
)


def _check_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number or too large, or an IPv6 address is incomplete
        valid = False
    if not valid:
        raise ValueError(
            "its host or its port is not valid: write a name or an address and a port from 1 to "
            "65535, as in http://node1:8000/v1"
        )
    return value


Url: TypeAlias = Annotated[
    str,
    text_pattern(
        r"^https?://[^@?#\s]+$",
        "write http:// or https:// and the address, without a password or a query, as in "
        "http://node1:8000/v1",
    ),
    AfterValidator(_check_address),
]


class ClientConfig(Section):
    """How requests are sent to a server."""

    api_key_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the API key (never the key "
        "itself).",
        json_schema_extra=RUNTIME_ONLY,
    )
    max_concurrency: Positive = Field(
        8,
        description="Maximum number of requests at the same time.",
        json_schema_extra=RUNTIME_ONLY,
    )
    timeout_seconds: Seconds = Field(
        120,
        description="Deadline of one request and its whole answer, in seconds.",
        json_schema_extra=RUNTIME_ONLY,
    )
    max_retries: NonNegative = Field(
        5,
        description="Maximum number of retries of a request; the waiting time doubles each time.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @model_validator(mode="after")
    def _check_key_name(self) -> ClientConfig:
        # A pattern of the field would show the value in its message, and it may be a key.
        name = self.api_key_env
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "api_key_env is not the name of an environment variable: export the key in a "
                "variable and write that variable's name here, as in OPENAI_API_KEY"
            )
        return self


class TeacherEndpointConfig(ClientConfig):
    """A server that runs the teacher."""

    urls: Annotated[tuple[Url, ...], BeforeValidator(split_names), Field(min_length=1)] = Field(
        description="Base URLs of equal servers, as in `http://node1:8000/v1`, without a password "
        "or a query. Requests are distributed over them, and a retry goes to the next one.",
        json_schema_extra=RUNTIME_ONLY,
    )
    api: Literal["completions", "chat"] = Field(
        "completions",
        description="`completions` sends token ids of the teacher's tokenizer, which is loaded "
        "from `teacher.model` without its weights. `chat` sends messages, and needs nothing of "
        "the model but its name: for `policy.name: seqkd` alone.",
    )
    server: Literal["vllm", "sglang"] = Field(
        "vllm",
        description="What runs there: `vllm` (`vllm serve`) or `sglang`, whose log-probabilities "
        "come in another form.",
        json_schema_extra=RUNTIME_ONLY,
    )
    model: str | None = Field(
        None,
        description="Name of the model at the endpoint; `null` takes the only one that the server "
        "lists.",
    )
    max_concurrency: Positive = Field(
        16,
        description="Maximum number of requests at the same time.",
        json_schema_extra=RUNTIME_ONLY,
    )
    timeout_seconds: Seconds = Field(
        600,
        description="Deadline of one request and its whole answer, in seconds.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        urls = [url.rstrip("/") for url in value]
        if twice := next((url for url in urls if urls.count(url) > 1), None):
            raise ValueError(f"{twice} appears twice: write each address once")
        return value
