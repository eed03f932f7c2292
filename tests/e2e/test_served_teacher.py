"""A teacher that servers run (`teacher.endpoint`): a real vLLM server, one that a proxy disturbs,
and a stand-in for SGLang.

The cache must be that of the same teacher in this process, up to rounding; a failure must keep what
is done, and be one sentence.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import yaml
from command_line import pocl
from served_models import ModelServer, Proxy, SglangStandIn, serve_vllm
from teacher_cache_runs import cache_manifest, open_train_cache, train_split, write_cache
from tiny_runs import computed, write_recipe

from pocl_ds.errors import ModelError, PoclError, ResourceError
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.workflow.run_dir import RunDirectory

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def teacher(models_folder: Path) -> Path:
    """A tiny LLaMA whose head has a token for each row: random weights give all rows mass."""
    return tiny_models.llama(models_folder / "served", tied=False, seed=1)


@pytest.fixture(scope="module")
def vllm_url(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = ("--served-model-name", "tiny", "--max-logprobs", "12")
    with serve_vllm(teacher, log, *options) as url:
        yield url


@pytest.fixture
def start() -> Iterator[Callable[[ModelServer], ModelServer]]:
    servers: list[ModelServer] = []

    def keep(server: ModelServer) -> ModelServer:
        servers.append(server)
        return server

    yield keep
    for server in servers:
        server.close()


def fill(
    folder: Path, model: Path, /, *urls: str, student: Path | None = None, **fields: Any
) -> RunDirectory:
    """Run the step `cache-teacher` with a served teacher. fields: of teacher.endpoint."""
    endpoint = {"urls": urls, "timeout_seconds": 20.0, "max_retries": 1, "max_concurrency": 1}
    return write_cache(
        folder,
        model,
        student=student,
        mode="cached_topk",
        endpoint={**endpoint, **fields},
        temperatures=(1.0,),
    )


def distributions(run: RunDirectory) -> tuple[Any, Any]:
    """Ids [n, k] and log-probabilities [n, k + 1] of all training rows."""
    cache = open_train_cache(run)
    assert isinstance(cache.codec, TopKCodec)
    records = cache.read("train", tuple(range(len(train_split(run)))))
    return cache.codec.decode(records, 1.0)


def test_the_cache_is_that_of_the_same_teacher_here(
    tmp_path: Path,
    teacher: Path,
    vllm_url: str,
    start: Callable[[ModelServer], ModelServer],
) -> None:
    expected = distributions(
        write_cache(tmp_path / "here", teacher, mode="cached_topk", temperatures=(1.0,))
    )
    sglang = start(SglangStandIn(teacher))
    second = start(Proxy(vllm_url))
    # A folder without weights is enough.
    light = tmp_path / "light"
    shutil.copytree(teacher, light, ignore=shutil.ignore_patterns("*.safetensors"))
    same: dict[str, Any] = {"student": teacher, "max_concurrency": 4}
    runs = {
        "vllm": fill(tmp_path / "vllm", light, vllm_url, second.url, **same),
        "sglang": fill(tmp_path / "sglang", light, sglang.url, server="sglang", **same),
    }
    assert len(second.requests) > 3, "requests are distributed over both servers"
    for name, run in runs.items():
        ids, logs = distributions(run)
        assert (ids == expected[0]).all(), name
        np.testing.assert_allclose(logs, expected[1], atol=2e-4, err_msg=name)
        info = cache_manifest(run).info
        assert info["endpoint"] == {"model": "tiny", "server": name}
        assert 0 < info["error"][0]["mass"] < 1 and "kl" not in info["error"][0]


def test_what_is_done_is_kept_when_a_server_fails(
    tmp_path: Path,
    teacher: Path,
    vllm_url: str,
    start: Callable[[ModelServer], ModelServer],
) -> None:
    proxy = start(Proxy(vllm_url))
    proxy.disturb = lambda path, number, answer: (
        (503, b"going down") if path == "/v1/completions" and number > 3 else None
    )
    with pytest.raises(
        ResourceError,
        match=r"does not answer \(HTTP 503: going down\) after 2 tries: the samples so far are "
        r"saved, run the same command again",
    ):
        fill(tmp_path / "run", teacher, proxy.url)
    (journal,) = tmp_path.rglob("*.journal")
    # Half an entry, as a kill may leave it, and a row whose bytes never reached the disk.
    with journal.open("ab") as stream:
        stream.write(b"half")
    shard = journal.with_suffix(".bin")
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)

    proxy.disturb, proxy.requests = lambda *_: None, []
    run = fill(tmp_path / "run", teacher, proxy.url)
    sent = [body for path, body in proxy.requests if path == "/v1/completions"]
    assert len(sent) == 7 - 3 + 1 + 1, "the training rows that are missing, and the validation row"
    whole = fill(tmp_path / "whole", teacher, vllm_url)
    for interrupted, uninterrupted in zip(distributions(run), distributions(whole), strict=True):
        np.testing.assert_allclose(interrupted, uninterrupted, atol=2e-5)
    assert not list(tmp_path.rglob("*.journal"))


def other_ids(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    """A server whose tokenizer has other ids."""
    if path != "/v1/completions":
        return None
    positions = answer["choices"][0]["prompt_logprobs"]
    positions[1] = {str(int(token) + 400): entry for token, entry in positions[1].items()}
    return 200, json.dumps(answer).encode()


def half_of_the_positions(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    if path != "/v1/completions":
        return None
    positions = answer["choices"][0]["prompt_logprobs"]
    answer["choices"][0]["prompt_logprobs"] = positions[: len(positions) // 2]
    return 200, json.dumps(answer).encode()


def certain_of_everything(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    if path != "/v1/completions":
        return None
    for position in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in position.values():
            entry["logprob"] = 0.0
    return 200, json.dumps(answer).encode()


def fewer_ids(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    if path != "/v1/completions":
        return None
    for position in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in position.values():
            entry["rank"] += 1
    return 200, json.dumps(answer).encode()


def slow(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    if path == "/v1/completions":
        time.sleep(2)
    return None


def half_of_the_bytes(path: str, number: int, answer: Any) -> tuple[int, bytes] | None:
    data = json.dumps(answer).encode()
    return (200, data[: len(data) // 2]) if path == "/v1/completions" else None


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (other_ids, "read other token ids than were sent, so that it has another tokenizer"),
        (half_of_the_positions, "does not speak the protocol of vLLM's completions"),
        (certain_of_everything, "probabilities that sum to more than 1"),
        (fewer_ids, "log-probabilities of .* in place of 85 and 6"),
        (slow, r"no complete answer within 1 s\) after 2 tries: the samples so far are saved"),
        (half_of_the_bytes, "its answer is not JSON"),
        (lambda *_: (200, b'{"data": []}'), "has the models none: name one as teacher.endpoint.mo"),
        (lambda *_: (200, b"[]"), "does not speak the protocol"),
    ],
)
def test_a_wrong_answer_is_one_sentence(
    tmp_path: Path,
    teacher: Path,
    vllm_url: str,
    start: Callable[[ModelServer], ModelServer],
    disturb: Any,
    message: str,
) -> None:
    proxy = start(Proxy(vllm_url))
    proxy.disturb = disturb
    timeout = 1.0 if disturb is slow else 60.0
    with pytest.raises(PoclError, match=message) as error:
        fill(tmp_path / "run", teacher, proxy.url, timeout_seconds=timeout)
    assert "\n" not in str(error.value) and proxy.url.removesuffix("/v1") in str(error.value)


def test_a_server_of_another_kind_is_refused(tmp_path: Path, teacher: Path, vllm_url: str) -> None:
    model = teacher
    with pytest.raises(ModelError, match=r"has the models tiny, not teacher.endpoint.model=big"):
        fill(tmp_path / "a", model, vllm_url, model="big")
    with pytest.raises(ResourceError, match=r"HTTP 404.*check teacher.endpoint.urls"):
        fill(tmp_path / "b", model, vllm_url, server="sglang")
    with pytest.raises(ResourceError, match=r"HTTP 400: .*--max-logprobs"):
        write_cache(
            tmp_path / "c",
            model,
            mode="cached_topk",
            endpoint={"urls": [vllm_url]},
            temperatures=(1.0,),
            top_k=13,
        )


@pytest.mark.weekly
def test_a_run_with_a_served_teacher(
    tmp_path: Path, tiny_llama: Path, teacher: Path, vllm_url: str
) -> None:
    """From the data to the report; the losses are those of the same records made here."""
    curriculum = {"num_subsets": 2, "epochs_per_stage": 1, "temperature": [1, 1]}
    common: dict[str, Any] = {
        "curriculum": curriculum,
        "teacher_cache": {"top_k": 12},
        "launch": {"ranks": 1, "threads_per_rank": 1},
        "ranking": {"strategy": "random"},
    }
    teachers: dict[str, Any] = {
        "served": {"mode": "cached_topk", "endpoint": {"urls": [vllm_url]}},
        "here": {"mode": "cached_topk"},
    }
    runs: dict[str, Path] = {}
    for name, section in teachers.items():
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(
            folder, teacher, tiny_llama, max_train_samples=16, teacher=section, **common
        )
        runs[name] = folder / "run"
        steps = ["run"] if name == "served" else ["train"]
        before = [] if name == "served" else ["preprocess", "init-student", "rank", "plan"]
        for command in [*before, *(["cache-teacher"] if before else []), *steps]:
            words = [str(recipe)] if command in ("run", "preprocess") else []
            pocl(command, *words, "--run-dir", str(runs[name]))
    served, here = (computed(runs[name]) for name in ("served", "here"))
    assert [step["sample_ids_digest"] for step in served] == [
        step["sample_ids_digest"] for step in here
    ]
    for name in ("loss", "kd_loss", "grad_norm"):
        np.testing.assert_allclose(
            [step[name] for step in served], [step[name] for step in here], rtol=2e-4, err_msg=name
        )
    results = json.loads((runs["served"] / "evaluation" / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "initial", "student"}
    assert "kl" not in results["models"]["student"] and results["models"]["student"]["loss"] > 0
    assert (runs["served"] / "report" / "report.html").is_file()


@pytest.mark.parametrize("api", [pytest.param("completions", marks=pytest.mark.weekly), "chat"])
def test_a_student_of_responses(
    tmp_path: Path,
    tiny_llama: Path,
    teacher: Path,
    vllm_url: str,
    start: Callable[[ModelServer], ModelServer],
    api: str,
) -> None:
    """An interrupted step goes on with the samples that have no response, and repeats none."""
    proxy = start(Proxy(vllm_url))
    proxy.disturb = lambda path, number, answer: (
        (500, b"down") if path.endswith("completions") and number > 5 else None
    )
    section: dict[str, Any] = {"endpoint": {"urls": [proxy.url], "api": api, "max_retries": 0}}
    if api == "chat":
        section["model"] = "somebody/a-closed-model"  # nothing of it is here
    recipe = write_recipe(
        tmp_path,
        teacher,
        tiny_llama,
        max_train_samples=16,
        teacher=section,
        loss={"name": "sft"},
        policy={"name": "seqkd", "max_new_tokens": 8},
        ranking={"strategy": "random"},
        launch={"ranks": 1, "threads_per_rank": 1},
        curriculum={"num_subsets": 2, "epochs_per_stage": 1},
        evaluate={"models": ["student"], "max_samples": 2},
    )
    run = str(tmp_path / "run")
    pocl("preprocess", str(recipe), "--run-dir", run)
    failed = pocl("generate-teacher", "--run-dir", run, check=False)
    assert failed.returncode == 2 and "the responses so far are saved" in failed.stderr
    (file,) = (tmp_path / "run").glob("teacher_responses-*.jsonl")
    saved = len(file.read_text().splitlines())
    assert 1 <= saved <= 5

    proxy.disturb, proxy.requests = lambda *_: None, []
    pocl("generate-teacher", "--run-dir", run)
    sent = [body for path, body in proxy.requests if path.endswith("completions")]
    assert len(sent) == 16 - saved and not file.exists()
    if api == "chat":
        assert sent[-1]["messages"][-1]["role"] == "user"
    for command in ("init-student", "rank", "plan", "train"):
        pocl(command, "--run-dir", run)
    assert computed(tmp_path / "run")[-1]["loss"] > 0
    assert yaml.safe_load(recipe.read_text())["teacher"]["endpoint"]["api"] == api
