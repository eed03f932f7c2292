"""A model that a server runs: responses and log-probabilities over HTTP, from token ids.

vLLM answers at `/v1/completions`, with `prompt_logprobs` and `return_token_ids` beyond OpenAI's
fields, SGLang at its own `/generate`. Both repeat the ids that they read, which are compared with
those that were sent, so that a server with another tokenizer is found out at once.

Shapes: n positions of a sequence, k largest log-probabilities.
"""

from __future__ import annotations

import concurrent.futures
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import TeacherEndpointConfig
from pocl_ds.data.thoughts import join_thought
from pocl_ds.errors import ModelError
from pocl_ds.generation.log_prob_checks import log_prob_problem
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.runtime.json_endpoint import (
    EndpointText,
    JsonEndpoint,
    read_key,
    without_surrogates,
)

FIELD = "teacher.endpoint"
# Errors of an answer that lacks a part, or has one of another type.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError)
# Overrides what vLLM takes from the model's generation_config.json.
NEUTRAL_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
Item = TypeVar("Item")
Result = TypeVar("Result")


class ServedModel(ABC):
    """The model behind `teacher.endpoint`. Safe to call from several threads.

    Every method raises ResourceError if no server answers, or one answers something else than was
    asked, and RejectedRequestError if a server rejects a request.
    """

    protocol: str  # what the servers should speak, for messages

    def __init__(
        self, config: TeacherEndpointConfig, *, saved: str, top_k: int | None = None
    ) -> None:
        """saved: what a failure does not lose, for messages. top_k: the most log-probabilities
        that are asked for. Raises ResourceError without the key that api_key_env names.
        """
        rejection_fields = f"{FIELD}.urls, model and api_key_env"
        if top_k is not None:
            rejection_fields += (
                f", and whether the server was started with --max-logprobs of at least {top_k} "
                "(teacher_cache.top_k)"
            )
        text = EndpointText(
            name="the teacher",
            url_field=f"{FIELD}.urls and {FIELD}.server",
            saved=saved,
            rejection_fields=rejection_fields,
            protocol=self.protocol,
        )
        self.config = config
        self.endpoint = JsonEndpoint(
            [url.rstrip("/").removesuffix("/v1") for url in config.urls],
            text,
            key=read_key(config.api_key_env, f"{FIELD}.api_key_env"),
            timeout_seconds=config.timeout_seconds,
            max_retries=config.max_retries,
        )
        self.name = config.model or ""

    def connect(self, max_length: int | None = None) -> None:
        """Ask every server which models it has, and find the name of the teacher.

        max_length: tokens of the longest request; None checks no lengths. Raises ModelError if a
        server lacks the model, has several without `model`, or reads fewer tokens.
        """
        for url in self.endpoint.urls:
            answer = self.endpoint.get("v1/models", url)
            try:
                models = {str(entry["id"]): entry for entry in answer["data"]}
            except MALFORMED:
                raise self.endpoint.protocol_error(url) from None
            listed = ", ".join(models) or "none"
            if self.name and self.name not in models:
                source = f"{FIELD}.model={self.name}" if self.config.model else self.name
                raise ModelError(
                    f"the server at {url} has the models {listed}, not {source}: correct "
                    f"{FIELD}.model, or start the server with that model"
                )
            if not self.name and len(models) != 1:
                raise ModelError(
                    f"the server at {url} has the models {listed}: name one as {FIELD}.model"
                )
            self.name = self.name or next(iter(models))
            limit = models[self.name].get("max_model_len")
            if isinstance(limit, int) and max_length is not None and max_length > limit:
                raise ModelError(
                    f"the server at {url} reads at most {limit} tokens, and sequences of "
                    f"{max_length} tokens are requested: raise its --max-model-len, or lower "
                    "prompt.max_length, or prompt.max_prompt_tokens and max_new_tokens"
                )

    @abstractmethod
    def complete(
        self, ids: Sequence[int], sampling: SamplingParams, index: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """One response as token ids, with the stop id that ended it. index: of the prompt in the
        call, for its seed.
        """

    @abstractmethod
    def top_log_probs(
        self, ids: Sequence[int], first: int, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k largest log-probabilities of the tokens from position `first` (at least 1) on,
        each given all ids before it, at temperature 1: ids and natural logarithms, both [n, k] with
        n = len(ids) - first, the largest first.
        """

    def chat(
        self, messages: Sequence[dict[str, Any]], sampling: SamplingParams, index: int
    ) -> tuple[str, bool]:
        """The response to a conversation in the server's own chat template, and whether it is
        complete.
        """
        body = {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.request_seed(index),
        }
        answer = self.endpoint.post("v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text, thought = message["content"] or "", message.get("reasoning") or ""
            thought = thought or message.get("reasoning_content") or ""
        except MALFORMED:
            raise self.endpoint.protocol_error() from None
        if not isinstance(text, str) or not isinstance(thought, str):
            raise self.endpoint.protocol_error(reason="a message without a text")
        # A server may have taken the thought out of the text.
        if thought:
            text = join_thought(thought, text)
        return without_surrogates(text), reason == "stop"

    def close(self) -> None:
        """Close the connections."""
        self.endpoint.close()

    def answer_all(
        self, prompts: Sequence[Item], ask: Callable[[Item, int], Result]
    ) -> Iterator[tuple[int, Result]]:
        """The place of each prompt and what `ask` returns for the prompt and its place, in order of
        completion; see `map`.
        """

        def answer(index: int) -> tuple[int, Result]:
            return index, ask(prompts[index], index)

        return self.map(answer, range(len(prompts)))

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`work` of each item, in order of completion, with at most max_concurrency at a time. The
        first error cancels those that wait, and is raised after the results of those that run.
        """
        pool = concurrent.futures.ThreadPoolExecutor(self.config.max_concurrency)
        first_error: BaseException | None = None
        try:
            running = {pool.submit(work, item) for item in items}
            while running:
                finished, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    if error := future.exception():
                        first_error = first_error or error
                        running = {other for other in running if not other.cancel()}
                    else:
                        yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if first_error:
            raise first_error

    def _check_ids(self, sent: Sequence[int], read: Any) -> None:
        """Raise ResourceError unless the server read the ids that were sent."""
        if list(read) == list(sent):
            return
        raise self.endpoint.protocol_error(
            reason="it read other token ids than were sent, so that it has another tokenizer or "
            "cuts its prompts"
        )

    def _checked_logs(
        self, rows: Sequence[Sequence[tuple[int, float]]], count: int, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids and log-probabilities [n, k] from pairs, after the checks that they are the largest
        of distributions.
        """
        if len(rows) != count or any(len(row) < k for row in rows):
            raise self.endpoint.protocol_error(
                reason=f"log-probabilities of {len(rows)} positions and "
                f"{min(map(len, rows), default=0)} ids each, in place of {count} and {k}"
            )
        pairs = [sorted(row, key=lambda pair: -pair[1])[:k] for row in rows]
        ids = np.array([[token for token, _ in row] for row in pairs], np.int64).reshape(-1, k)
        logs = np.array([[value for _, value in row] for row in pairs], np.float64).reshape(-1, k)
        if problem := log_prob_problem(ids, logs):
            raise self.endpoint.protocol_error(reason=problem)
        return ids, logs


class VllmServer(ServedModel):
    """See `ServedModel`: an OpenAI-compatible server of vLLM."""

    protocol = "vLLM's completions"

    def complete(
        self, ids: Sequence[int], sampling: SamplingParams, index: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """See `ServedModel`."""
        answer = self._post(
            ids,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.request_seed(index),
            stop_token_ids=list(stop_ids),
            return_token_ids=True,
        )
        try:
            choice = answer["choices"][0]
            read, written = choice["prompt_token_ids"], list(map(int, choice["token_ids"]))
            self._check_ids(ids, read)
        except MALFORMED:
            raise self.endpoint.protocol_error() from None
        return written

    def top_log_probs(
        self, ids: Sequence[int], first: int, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `ServedModel`."""
        answer = self._post(ids, max_tokens=1, temperature=1.0, prompt_logprobs=k)
        rows = []
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
            # Each position has its own token too, beyond the k largest.
            read = [
                token if str(token) in position else -1
                for token, position in zip(ids[1:], positions[1:], strict=True)
            ]
            self._check_ids(ids[1:], read)
            for position in positions[first:]:
                pairs = [
                    (int(token), float(entry["logprob"]))
                    for token, entry in position.items()
                    if entry["rank"] <= k
                ]
                rows.append(pairs)
        except MALFORMED:
            raise self.endpoint.protocol_error() from None
        return self._checked_logs(rows, len(ids) - first, k)

    def _post(self, ids: Sequence[int], **fields: Any) -> Any:
        """The answer to a request for the continuation of these ids."""
        body = {"model": self.name, "prompt": list(ids), **fields, **NEUTRAL_SAMPLING}
        return self.endpoint.post("v1/completions", body)


class SglangServer(ServedModel):
    """See `ServedModel`: a server of SGLang, by its own requests."""

    protocol = "SGLang's /generate"

    def complete(
        self, ids: Sequence[int], sampling: SamplingParams, index: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """See `ServedModel`."""
        sampling_params = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "sampling_seed": sampling.request_seed(index),
            "stop_token_ids": list(stop_ids),
            "no_stop_trim": True,
        }
        answer = self._post(ids, sampling_params=sampling_params)
        try:
            written = list(map(int, answer["output_ids"]))
            prompt_tokens = answer["meta_info"]["prompt_tokens"]
        except MALFORMED:
            raise self.endpoint.protocol_error() from None
        if prompt_tokens != len(ids):
            self._check_ids(ids, [])
        return written

    def top_log_probs(
        self, ids: Sequence[int], first: int, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `ServedModel`."""
        answer = self._post(
            ids,
            sampling_params={"max_new_tokens": 1, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=first - 1,
            top_logprobs_num=k,
        )
        try:
            # The first entry is that of position first - 1, which nothing predicts here.
            read = [token for _, token, *_ in answer["meta_info"]["input_token_logprobs"]]
            self._check_ids(ids[first - 1 :], read)
            rows = [
                [(int(token), float(value)) for value, token, *_ in position]
                for position in answer["meta_info"]["input_top_logprobs"][1:]
            ]
        except MALFORMED:
            raise self.endpoint.protocol_error() from None
        return self._checked_logs(rows, len(ids) - first, k)

    def _post(self, ids: Sequence[int], **fields: Any) -> Any:
        """The answer to a request for the continuation of these ids."""
        return self.endpoint.post("generate", {"input_ids": list(ids), **fields})


SERVERS: dict[str, type[ServedModel]] = {"vllm": VllmServer, "sglang": SglangServer}


def connect_to_teacher(
    config: TeacherEndpointConfig,
    *,
    saved: str,
    max_length: int | None = None,
    top_k: int | None = None,
) -> ServedModel:
    """The model behind `teacher.endpoint`, after a request to each server. See `ServedModel`."""
    model = SERVERS[config.server](config, saved=saved, top_k=top_k)
    try:
        model.connect(max_length)
    except BaseException:
        model.close()
        raise
    return model
