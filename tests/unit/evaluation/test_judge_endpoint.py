"""The judge's endpoint: errors, retries, the secrecy of the key, and a real vLLM server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import KEY, JudgeServer, Reply, free_port, judge_config
from served_models import serve_vllm

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import dump_recipe
from pocl_ds.errors import PoclError, ResourceError
from pocl_ds.evaluation.evaluate import summarize_results
from pocl_ds.evaluation.judge import (
    judge_answers,
    parse_score,
    read_verdicts,
    summarize_verdicts,
    verdicts_file,
)
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.run_dir import RunDirectory


def test_a_request_to_a_busy_endpoint_is_retried(
    answered: RunDirectory, server: JudgeServer
) -> None:
    server.reply = lambda _, number: (
        (429, "slow down", {"Retry-After": "0"}) if number % 2 else (200, "Score: 5", {})
    )
    judge_answers(answered, judge_config(server.url, max_samples=3, max_concurrency=1), ["student"])
    assert len(server.requests) == 6


def test_endpoint_errors_are_one_sentence_without_the_key(
    answered: RunDirectory, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = judge_config(server.url, api_key_env="JUDGE_KEY", max_samples=2)
    other_server = JudgeServer()
    replies: list[tuple[Reply, str]] = [
        (lambda *_: (401, f"bad key {KEY}", {}), "HTTP 401: bad key ***"),
        (lambda *_: (404, "no such model", {}), "HTTP 404"),
        (lambda *_: (302, "", {"Location": f"{other_server.url}/chat/completions"}), "HTTP 302"),
        (lambda *_: (200, "<html>", {"raw": "1"}), "does not speak the protocol"),
        (lambda *_: (200, '{"choices": []}', {"raw": "1"}), "does not speak the protocol"),
        (lambda *_: (500, f"trace {KEY}", {}), r"HTTP 500: trace ***"),
    ]
    for reply, message in replies:
        server.reply = reply
        with pytest.raises(PoclError) as exc_info:
            judge_answers(answered, settings, ["student"])
        assert (
            message in str(exc_info.value)
            and KEY not in str(exc_info.value)
            and "\n" not in str(exc_info.value)
        )
    assert not other_server.requests and server.requests[0]["key"] == f"Bearer {KEY}"
    other_server.http.shutdown()
    other_server.http.server_close()
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ResourceError, match=r"JUDGE_KEY, which is not set"):
        judge_answers(answered, settings, ["student"])


def test_verdicts_do_not_depend_on_the_address(answered: RunDirectory, server: JudgeServer) -> None:
    """A restarted server may have another node and port."""
    judge_answers(answered, judge_config(server.url, max_samples=4), ["student"])
    judge_answers(
        answered,
        judge_config(server.url.replace("127.0.0.1", "localhost"), max_samples=4),
        ["student"],
    )
    assert len(server.requests) == 4


def test_a_rejected_question_is_left_out(
    answered: RunDirectory, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A filtered question does not end the run, but a judge that rejects every question does."""
    server.reply = lambda question, number: (
        (400, "filtered", {}) if "Question 3?" in question else (200, "Score: 5", {})
    )
    judge_answers(answered, judge_config(server.url, max_concurrency=1), ["student"])
    records = {
        record["id"]: record
        for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    }
    assert records["q3"]["score"] is None and "HTTP 400: filtered" in records["q3"]["replies"][0]
    assert len(records) == 12 and sum(record["score"] == 5 for record in records.values()) == 11
    assert "rejected 1 questions, which are left out" in caplog.text
    server.reply = lambda question, number: (400, "temperature is not supported", {})
    with pytest.raises(ResourceError, match="HTTP 400: temperature is not supported"):
        judge_answers(answered, judge_config(server.url, max_concurrency=1), ["initial"])
    assert len(server.requests) < 12 + 12, "the remaining questions were sent"


def test_request_parameters_of_newer_models(answered: RunDirectory, server: JudgeServer) -> None:
    settings = judge_config(
        server.url,
        temperature=None,
        max_tokens_parameter="max_completion_tokens",
        max_tokens=99,
        max_samples=1,
    )
    server.reply = lambda question, number: (200, "<think>Score: 2?</think>Score: 6", {})
    judge_answers(answered, settings, ["student"])
    assert (
        "temperature" not in server.requests[0]
        and server.requests[0]["max_completion_tokens"] == 99
    )
    assert "max_tokens" not in server.requests[0]
    (record,) = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert record["score"] == 6 and record["replies"] == ["Score: 6"]


def test_a_truncated_reply_has_no_score(answered: RunDirectory, server: JudgeServer) -> None:
    truncated = json.dumps(
        {
            "choices": [
                {"message": {"content": "At first sight Score: 9, but"}, "finish_reason": "length"}
            ]
        }
    )
    server.reply = lambda question, number: (200, truncated, {"raw": "yes"})
    judge_answers(answered, judge_config(server.url, max_samples=1), ["student"])
    (record,) = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert record == {
        "id": record["id"],
        "score": None,
        "replies": ["At first sight Score: 9, but"],
    }


def test_a_reply_may_have_half_of_a_surrogate_pair(
    answered: RunDirectory, server: JudgeServer
) -> None:
    reply = r'{"choices": [{"message": {"content": "\ud83d Score: 5"}}]}'
    server.reply = lambda *_: (200, reply, {"raw": "yes"})
    judge_answers(answered, judge_config(server.url, max_samples=1), ["student"])
    (record,) = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert record["score"] == 5 and record["replies"] == ["\ufffd Score: 5"]


def test_an_unreachable_endpoint_is_an_error(
    answered: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="does not answer"):
        judge_answers(answered, judge_config(f"http://127.0.0.1:{free_port()}/v1"), ["student"])


def test_the_key_is_never_written(
    answered: RunDirectory,
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = judge_config(server.url, api_key_env="JUDGE_KEY")
    server.reply = lambda question, number: (
        200,
        f"you sent {KEY}? Score: 5" if number == 1 else "Score: 5",
        {},
    )
    with caplog.at_level(logging.DEBUG):
        judge_answers(answered, settings, ["student"])
        summarize_results(answered, settings, ["student"], fingerprint="e")
    texts = [path.read_text() for path in answered.path.rglob("*") if path.is_file()]
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "data": {"source": "documentation"},
            "student": {"model": "m"},
            "loss": {"name": "sft"},
            "evaluate": settings.model_dump(mode="json"),
        }
    )
    assert not [text for text in [*texts, caplog.text, dump_recipe(recipe)] if KEY in text]
    assert "JUDGE_KEY" in dump_recipe(recipe)


def test_a_single_remaining_rejected_question_is_left_out(
    answered: RunDirectory, server: JudgeServer
) -> None:
    """After an interruption it may be the only question that is sent."""

    def reply(question: str, number: int) -> tuple[int, str, dict[str, str]]:
        return (404, "stopped", {}) if "Question 3?" in question else (200, "Score: 5", {})

    server.reply = reply
    with pytest.raises(ResourceError, match="HTTP 404"):
        judge_answers(answered, judge_config(server.url, max_concurrency=1), ["student"])
    server.reply = lambda question, number: (
        (400, "filtered", {}) if "Question 3?" in question else (200, "Score: 5", {})
    )
    for _ in range(2):
        judge_answers(answered, judge_config(server.url, max_concurrency=1), ["student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert [record["id"] for record in records if record["score"] is None] == ["q3"] and len(
        records
    ) == 12


@pytest.fixture(scope="module")
def vllm_server(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real vLLM server with a tiny model. It takes half a minute to start."""
    import tiny_models

    log, model = tmp_path_factory.mktemp("vllm") / "log", tiny_models.llama(models_folder / "judge")
    with serve_vllm(model, log, "--served-model-name", "tiny", "--api-key", KEY) as url:
        yield url


@pytest.mark.weekly
@pytest.mark.vllm
def test_a_real_vllm_server_judges(
    answered: RunDirectory, vllm_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies without a score are counted; an unknown model and a wrong key are errors."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    fields = {
        "model": "tiny",
        "api_key_env": "JUDGE_KEY",
        "max_tokens": 12,
        "max_samples": 6,
        "timeout_seconds": 60.0,
    }
    short = answered.path / "short.jinja"  # the tiny model's context is short
    short.write_text("{{ question }} {{ answer }} Score:")
    settings = judge_config(vllm_server, prompt_template=str(short), **fields)
    judge_answers(answered, settings, ["student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert len(records) == 6 and all(len(record["replies"][0]) > 0 for record in records)
    summary = summarize_verdicts(answered, settings, "student", "b")
    without_score = sum(parse_score(record["replies"][0]) is None for record in records)
    assert (
        summary is not None
        and summary["without_score"] == without_score
        and (without_score == 6) == (summary["mean"] is None)
    )
    info = read_json(answered.evaluation / "student" / "b-seed10.judge.jsonl.manifest.json")["info"]
    assert info["without_score"] == without_score and info["judge"] == "tiny"
    with pytest.raises(ResourceError, match=r"rejects the question \(HTTP 404"):
        judge_answers(
            answered,
            judge_config(vllm_server, prompt_template=str(short), **{**fields, "model": "other"}),
            ["student"],
        )
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with pytest.raises(ResourceError, match=r"HTTP 401"):
        judge_answers(
            answered,
            judge_config(vllm_server, prompt_template=str(short), **{**fields, "max_samples": 7}),
            ["student"],
        )
