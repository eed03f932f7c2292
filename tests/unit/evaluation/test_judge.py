"""The judge: what its verdicts are worth, restarts, faults of an endpoint, the key's secrecy, and a
real vLLM server.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import EvaluateConfig, JudgeConfig, Recipe
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.errors import ArtifactError, PoclError, RecipeError, ResourceError
from pocl_ds.evaluation import evaluate
from pocl_ds.evaluation.answers import answers_file
from pocl_ds.evaluation.evaluate import summarise
from pocl_ds.evaluation.judge import (
    judge_answers,
    parse_score,
    parse_verdict,
    read_verdicts,
    summarize_verdicts,
    verdicts_file,
)
from pocl_ds.evaluation.side_by_side import Side, put_side_by_side
from pocl_ds.workflow.files import read_json, write_json
from pocl_ds.workflow.manifest import read_manifest, write_manifest
from pocl_ds.workflow.pipeline import run_in_process
from pocl_ds.workflow.run_dir import RunDirectory

KEY = "sk-very-secret-0123"
Reply = Callable[
    [str, int], tuple[int, str, dict[str, str]]
]  # question, number of the request -> status, text, headers


class Server:
    """An endpoint that says what `reply` says."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.reply: Reply = lambda question, number: (200, "Fine.\nScore: 7", {})
        server, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append(
                        {"path": self.path, "key": self.headers.get("Authorization"), **body}
                    )
                    number = len(server.seen)
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Twelve answers of two models with one seed."""
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    (run.data / "train.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"instruction": "Question?", "output": "ref"}\n')
    monkeypatch.chdir(tmp_path)
    for model in ("initial", "student"):
        file = answers_file(run, model, "b", 10)
        file.parent.mkdir(parents=True)
        file.write_text(
            "".join(
                json.dumps(
                    {
                        "id": f"q{i}",
                        "instruction": f"Question {i}?",
                        "input": "context",
                        "references": [f"ref {i}", "other"],
                        "response": f"{model} says {i}",
                        "rouge_l": 0.5,
                        "exact_match": False,
                    }
                )
                + "\n"
                for i in range(12)
            )
        )
        write_manifest(
            file.parent,
            "answers",
            "f",
            files=[file],
            name=f"{file.name}.manifest.json",
            info={
                "seconds": 1.0,
                "tokens": 60,
                "generation_seconds": 2.0,
                "cut_prompts": 0,
                "settings": {},
            },
        )
    return run


def config(url: str, **judge_fields: Any) -> EvaluateConfig:
    settings = {
        "base_url": url,
        "model": "m",
        "max_retries": 2,
        "max_concurrency": 3,
        "timeout_seconds": 5.0,
        **judge_fields,
    }
    return EvaluateConfig(
        benchmarks={"b": "b.jsonl"}, seeds=(10,), held_out_loss=False, judge=JudgeConfig(**settings)
    )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good.\nScore: 8", 8),
        ("**Score:** 3", 3),
        ("score = 4.5", 4.5),
        ("Score: 2 ... no, Score: 9/10", 9),
        (" 7 \n", 7),
        ("I give it a 7", None),
        ("Score: 11", None),
        ("Score: 0", None),
        ("", None),
        ("Score: N", None),
        ("42", None),
        ("Score (1-10): 9", 9),
        ("Score (1-10): **8**/10", 8),
        ("Score: 1-10", None),
        ("Score: 7th", None),
        ("Score: 7.5x", None),
        ("Score: 6. Good", 6),
    ],
)
def test_scores(text: str, score: float | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("Verdict: A", 1),
        ("Verdict: a tie", 0.5),
        ("Verdict: a", 1),
        ("verdict: **b**", 0),
        ("Verdict: tie", 0.5),
        ("A is better", None),
        ("Verdict: Any", None),
    ],
)
def test_verdicts(text: str, worth: float | None) -> None:
    assert parse_verdict(text) == worth


def test_each_item_is_scored_and_the_results_hold_it(
    answered: RunDirectory, server: Server
) -> None:
    server.reply = lambda question, _: (
        200,
        "no idea"
        if "Question 3?" in question
        else "Score: 8"
        if "student says" in question
        else "Score: 4",
        {},
    )
    asked = config(server.url, max_samples=None)
    judge_answers(answered, asked, ["initial", "student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert [record["id"] for record in records] == [f"q{i}" for i in range(12)]
    assert [record["score"] for record in records] == [8.0] * 3 + [None] + [8.0] * 8
    assert (
        server.seen[0]["model"] == "m"
        and server.seen[0]["path"] == "/v1/chat/completions"
        and server.seen[0]["key"] is None
    )
    text = server.seen[0]["messages"][0]["content"]
    assert (
        "Question" in text
        and "context" in text
        and "ref" in text
        and "[or]\nother" in text
        and "says" in text
    )
    results = summarise(answered, asked, ["initial", "student"], fingerprint="e")
    found = results["models"]["student"]["benchmarks"]["b"]
    assert found["judge"] == {
        "mode": "score",
        "model": "m",
        "items": 12,
        "without_score": 1,
        "mean": 8.0,
        "deviation": None,
    }
    assert found["tokens_per_second"] == 30 and found["answer_tokens"] == 5
    table = put_side_by_side(
        Side(answered, "initial", "A"), Side(answered, "student", "B"), measure="judge"
    )
    assert table.comparisons["b"].difference == 4 and table.comparisons["b"].items == 11
    count = len(server.seen)
    judge_answers(answered, asked, ["initial", "student"])
    assert len(server.seen) == count  # nothing is asked twice


def test_a_restart_asks_only_what_is_left(answered: RunDirectory, server: Server) -> None:
    server.reply = lambda _, number: (200, "Score: 5", {}) if number <= 5 else (503, "busy", {})
    with pytest.raises(
        ResourceError,
        match=r"does not answer \(HTTP 503: busy\) after 3 tries: the verdicts so far are saved",
    ):
        judge_answers(
            answered, config(server.url, max_samples=None, max_concurrency=1), ["student"]
        )
    partial = answered.evaluation / "student" / "b-seed10.judge.jsonl.partial"
    assert (
        len(partial.read_text().splitlines()) == 5
        and not verdicts_file(answered, "student", "b", 10).exists()
    )
    with partial.open("a") as stream:
        stream.write('{"key": "half')  # as a kill leaves it
    server.seen.clear()
    server.reply = lambda *_: (200, "Score: 6", {})
    judge_answers(answered, config(server.url, max_samples=None), ["student"])
    assert len(server.seen) == 7 and not partial.exists()
    assert (
        sorted(r["score"] for r in read_verdicts(verdicts_file(answered, "student", "b", 10)))
        == [5.0] * 5 + [6.0] * 7
    )


def test_a_judge_that_is_away_takes_no_other_number_with_it(
    answered: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply = lambda *_: (503, "busy", {})
    recipe = load_recipe("quickstart", ["baseline.enabled=false"])
    recipe = recipe.model_copy(
        update={
            "evaluate": config(server.url).model_copy(update={"models": ("initial", "student")})
        }
    )
    monkeypatch.setattr(evaluate, "model_path", lambda run, name: name)
    write_manifest(answered.evaluation, "evaluate", "of another recipe", files=[])
    with pytest.raises(ResourceError, match="does not answer"):
        run_in_process("evaluate", recipe, answered)
    found = json.loads((answered.evaluation / evaluate.RESULTS).read_text())["models"]["student"][
        "benchmarks"
    ]["b"]
    assert found["rouge_l"] == 50 and "judge" not in found
    assert read_manifest(answered.evaluation) is None  # the stage is not done
    server.reply = lambda *_: (200, "Score: 6", {})
    run_in_process("evaluate", recipe, answered)
    found = json.loads((answered.evaluation / evaluate.RESULTS).read_text())["models"]["student"][
        "benchmarks"
    ]["b"]
    assert found["judge"]["mean"] == 6 and read_manifest(answered.evaluation) is not None


def test_another_prompt_or_answer_is_judged_again(
    answered: RunDirectory, server: Server, tmp_path: Path
) -> None:
    judge_answers(answered, config(server.url, max_samples=4), ["student"])
    assert len(server.seen) == 4
    own = tmp_path / "own.jinja"
    own.write_text("Rate {{ answer }} for {{ question }}")
    judge_answers(
        answered, config(server.url, max_samples=4, prompt_template=str(own)), ["student"]
    )
    assert len(server.seen) == 8 and server.seen[-1]["messages"][0]["content"].startswith(
        "Rate student says"
    )
    own.write_text("Rate {{ answers }}")
    with pytest.raises(RecipeError, match=r"own\.jinja cannot be filled in"):
        judge_answers(
            answered, config(server.url, max_samples=4, prompt_template=str(own)), ["student"]
        )
    with pytest.raises(RecipeError, match="is not a valid template"):
        judge_answers(
            answered, config(server.url, prompt_template=str(tmp_path / "none.jinja")), ["student"]
        )


def test_pairs_are_asked_in_both_orders(answered: RunDirectory, server: Server) -> None:
    """A judge that always takes the first answer says nothing: every pair is a tie. One that
    prefers a model is heard.
    """
    asked = config(server.url, mode="pairwise", opponent="initial", max_samples=None)
    server.reply = lambda *_: (200, "Verdict: A", {})
    judge_answers(answered, asked, ["initial", "student"])
    assert len(server.seen) == 24
    assert {
        record["score"] for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    } == {0.5}
    assert (
        not verdicts_file(answered, "initial", "b", 10).exists()
        and summarize_verdicts(answered, asked, "initial", "b") is None
    )
    for path in (answered.evaluation / "student").glob("*judge*"):
        path.unlink()

    def likes_student(question: str, _: int) -> tuple[int, str, dict[str, str]]:
        return 200, f"Verdict: {'A' if 'student' in question.split('[Answer B]')[0] else 'B'}", {}

    server.reply = likes_student
    judge_answers(answered, asked, ["initial", "student"])
    assert {
        record["score"] for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    } == {1.0}
    with pytest.raises(RecipeError, match=r"opponent=initial is not evaluated"):
        judge_answers(answered, asked, ["student"])


@pytest.mark.parametrize("against", ["initial", "teacher"])
def test_win_rates_over_other_opponents_are_not_compared(
    against: str, answered: RunDirectory, server: Server, tmp_path: Path
) -> None:
    """Another model's answers, or other answers of a model of the same name; over the same ones
    they are.
    """
    server.reply = lambda *_: (200, "Verdict: A", {})
    sides = []
    for name, theirs, said in (("a", "initial", ""), ("b", "initial", ""), ("c", against, "again")):
        run = RunDirectory(shutil.copytree(answered.path, tmp_path / name))
        shutil.copytree(run.evaluation / "initial", run.evaluation / "teacher")
        file = answers_file(run, theirs, "b", 10)
        file.write_text(file.read_text().replace("initial says", f"initial says {said}"))
        asked = config(
            server.url, mode="pairwise", opponent=theirs, max_samples=None if name == "a" else 6
        )
        judge_answers(run, asked, [theirs, "student"])
        write_json(
            run.evaluation / "results.json",
            {"seeds": [10], "models": {"student": {"benchmarks": {"b": {}}}}},
        )
        sides.append(Side(run, "student", name))
    assert put_side_by_side(sides[0], sides[1], measure="judge").comparisons["b"].items == 6
    with pytest.raises(ArtifactError, match=f"judge differs .*against {against}"):
        put_side_by_side(sides[0], sides[2], measure="judge")


def test_a_busy_endpoint_is_asked_again(answered: RunDirectory, server: Server) -> None:
    server.reply = lambda _, number: (
        (429, "slow down", {"Retry-After": "0"}) if number % 2 else (200, "Score: 5", {})
    )
    judge_answers(answered, config(server.url, max_samples=3, max_concurrency=1), ["student"])
    assert len(server.seen) == 6


def test_faults_of_an_endpoint_are_one_sentence_without_the_key(
    answered: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked = config(server.url, api_key_env="JUDGE_KEY", max_samples=2)
    elsewhere = Server()
    replies: list[tuple[Reply, str]] = [
        (lambda *_: (401, f"bad key {KEY}", {}), "HTTP 401: bad key ***"),
        (lambda *_: (404, "no such model", {}), "HTTP 404"),
        (lambda *_: (302, "", {"Location": f"{elsewhere.url}/chat/completions"}), "HTTP 302"),
        (lambda *_: (200, "<html>", {"raw": "1"}), "does not speak the protocol"),
        (lambda *_: (200, '{"choices": []}', {"raw": "1"}), "does not speak the protocol"),
        (lambda *_: (500, f"trace {KEY}", {}), r"HTTP 500: trace ***"),
    ]
    for reply, said in replies:
        server.reply = reply
        with pytest.raises(PoclError) as caught:
            judge_answers(answered, asked, ["student"])
        assert (
            said in str(caught.value)
            and KEY not in str(caught.value)
            and "\n" not in str(caught.value)
        )
    assert not elsewhere.seen and server.seen[0]["key"] == f"Bearer {KEY}"
    elsewhere.http.shutdown()
    elsewhere.http.server_close()
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ResourceError, match=r"JUDGE_KEY, which is not set"):
        judge_answers(answered, asked, ["student"])


def test_another_address_is_the_same_judge(answered: RunDirectory, server: Server) -> None:
    """A server of one's own comes back on another node and port; more samples are asked beside
    those that were.
    """
    judge_answers(answered, config(server.url, max_samples=4), ["student"])
    judge_answers(
        answered, config(server.url.replace("127.0.0.1", "localhost"), max_samples=4), ["student"]
    )
    assert len(server.seen) == 4


def test_a_question_that_is_refused_is_left_out(
    answered: RunDirectory, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A filter, or an answer too long for the judge, must not end the others' judging; a judge that
    refuses all must.
    """
    server.reply = lambda question, number: (
        (400, "filtered", {}) if "Question 3?" in question else (200, "Score: 5", {})
    )
    judge_answers(answered, config(server.url, max_concurrency=1), ["student"])
    records = {
        record["id"]: record
        for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    }
    assert records["q3"]["score"] is None and "HTTP 400: filtered" in records["q3"]["replies"][0]
    assert len(records) == 12 and sum(record["score"] == 5 for record in records.values()) == 11
    assert "rejected 1 questions, which are left out" in caplog.text
    server.reply = lambda question, number: (400, "temperature is not supported", {})
    with pytest.raises(ResourceError, match="HTTP 400: temperature is not supported"):
        judge_answers(answered, config(server.url, max_concurrency=1), ["initial"])
    assert len(server.seen) < 12 + 12, "it is not asked the rest"


def test_what_newer_models_are_asked(answered: RunDirectory, server: Server) -> None:
    asked = config(
        server.url,
        temperature=None,
        max_tokens_parameter="max_completion_tokens",
        max_tokens=99,
        max_samples=1,
    )
    server.reply = lambda question, number: (200, "<think>Score: 2?</think>Score: 6", {})
    judge_answers(answered, asked, ["student"])
    assert "temperature" not in server.seen[0] and server.seen[0]["max_completion_tokens"] == 99
    assert "max_tokens" not in server.seen[0]
    (record,) = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert record["score"] == 6 and record["replies"] == ["Score: 6"]


def test_a_verdict_that_was_cut_is_none(answered: RunDirectory, server: Server) -> None:
    cut = json.dumps(
        {
            "choices": [
                {"message": {"content": "At first sight Score: 9, but"}, "finish_reason": "length"}
            ]
        }
    )
    server.reply = lambda question, number: (200, cut, {"raw": "yes"})
    judge_answers(answered, config(server.url, max_samples=1), ["student"])
    (record,) = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert record == {
        "id": record["id"],
        "score": None,
        "replies": ["At first sight Score: 9, but"],
    }


def test_nobody_there(answered: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="does not answer"):
        judge_answers(answered, config(f"http://127.0.0.1:{_free_port()}/v1"), ["student"])


def test_the_key_is_written_nowhere(
    answered: RunDirectory,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked = config(server.url, api_key_env="JUDGE_KEY")
    server.reply = lambda question, number: (
        200,
        f"you sent {KEY}? Score: 5" if number == 1 else "Score: 5",
        {},
    )
    with caplog.at_level(logging.DEBUG):
        judge_answers(answered, asked, ["student"])
        summarise(answered, asked, ["student"], fingerprint="e")
    texts = [path.read_text() for path in answered.path.rglob("*") if path.is_file()]
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "data": {"source": "documentation"},
            "student": {"model": "m"},
            "loss": {"name": "sft"},
            "evaluate": asked.model_dump(mode="json"),
        }
    )
    assert not [text for text in [*texts, caplog.text, dump_recipe(recipe)] if KEY in text]
    assert "JUDGE_KEY" in dump_recipe(recipe)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def vllm_server(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM server with a tiny model, which takes half a minute to come up; the address that
    it answers at.
    """
    import tiny_models

    model, port = tiny_models.llama(models_folder / "judge"), _free_port()
    log = tmp_path_factory.mktemp("vllm") / "log"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--api-key",
        KEY,
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


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_vllm_server_judges(
    answered: RunDirectory, vllm_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights answer garbage: it is kept, counted, and no score is made of it. And a model
    that is not served.
    """
    monkeypatch.setenv("JUDGE_KEY", KEY)
    fields = {
        "model": "tiny",
        "api_key_env": "JUDGE_KEY",
        "max_tokens": 12,
        "samples": 6,
        "timeout_seconds": 60.0,
    }
    short = answered.path / "short.jinja"  # the tiny model's context is short
    short.write_text("{{ question }} {{ answer }} Score:")
    asked = config(vllm_server, prompt=str(short), **fields)
    judge_answers(answered, asked, ["student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert len(records) == 6 and all(len(record["replies"][0]) > 0 for record in records)
    found = summarize_verdicts(answered, asked, "student", "b")
    silent = sum(parse_score(record["replies"][0]) is None for record in records)
    assert (
        found is not None
        and found["without_score"] == silent
        and (silent == 6) == (found["mean"] is None)
    )
    info = read_json(answered.evaluation / "student" / "b-seed10.judge.jsonl.manifest.json")["info"]
    assert info["without_score"] == silent and info["judge"] == "tiny"
    with pytest.raises(ResourceError, match=r"rejects the question \(HTTP 404"):
        judge_answers(
            answered,
            config(vllm_server, prompt=str(short), **{**fields, "model": "other"}),
            ["student"],
        )
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with pytest.raises(ResourceError, match=r"HTTP 401"):
        judge_answers(
            answered,
            config(vllm_server, prompt=str(short), **{**fields, "samples": 7}),
            ["student"],
        )


def test_a_refused_question_that_alone_is_left_ends_nothing(
    answered: RunDirectory, server: Server
) -> None:
    """After an interruption the same command must come to its end, though nothing else is asked any
    more.
    """

    def reply(question: str, number: int) -> tuple[int, str, dict[str, str]]:
        return (404, "stopped", {}) if "Question 3?" in question else (200, "Score: 5", {})

    server.reply = reply
    with pytest.raises(ResourceError, match="HTTP 404"):
        judge_answers(answered, config(server.url, max_concurrency=1), ["student"])
    server.reply = lambda question, number: (
        (400, "filtered", {}) if "Question 3?" in question else (200, "Score: 5", {})
    )
    for _ in range(2):
        judge_answers(answered, config(server.url, max_concurrency=1), ["student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert [record["id"] for record in records if record["score"] is None] == ["q3"] and len(
        records
    ) == 12
