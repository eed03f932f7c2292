"""The judge: scores, pairs, results, restarts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from judge_server import JudgeServer, judge_config
from manifests import seal

from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.data import template_limits
from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.evaluation import evaluated_models
from pocl_ds.evaluation.answers import answers_file
from pocl_ds.evaluation.compare_models import ComparedModel, compare_models
from pocl_ds.evaluation.evaluate import RESULTS, summarize_results
from pocl_ds.evaluation.judge import (
    judge_answers,
    parse_score,
    parse_verdict,
    read_verdicts,
    summarize_verdicts,
    verdicts_file,
)
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import read_manifest, write_manifest
from pocl_ds.workflow.pipeline import run_in_process
from pocl_ds.workflow.run_dir import RunDirectory


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
def test_scores_are_parsed(text: str, score: float | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
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
def test_verdicts_are_parsed(text: str, score: float | None) -> None:
    assert parse_verdict(text) == score


def test_emptied_verdicts_are_asked_again(answered: RunDirectory, server: JudgeServer) -> None:
    """They gave a mean over no items."""
    server.reply = lambda *_: (200, "Score: 8", {})
    settings = judge_config(server.url, max_samples=None)
    judge_answers(answered, settings, ["student"])
    file = verdicts_file(answered, "student", "b", 10)
    file.write_text("")
    with pytest.raises(ArtifactError, match="missing, unfinished or damaged"):
        read_verdicts(file)
    judge_answers(answered, settings, ["student"])
    assert len(read_verdicts(file)) == 12 and len(server.requests) == 24


def test_each_item_is_scored_and_the_results_contain_the_mean(
    answered: RunDirectory, server: JudgeServer
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
    settings = judge_config(server.url, max_samples=None)
    judge_answers(answered, settings, ["initial", "student"])
    records = read_verdicts(verdicts_file(answered, "student", "b", 10))
    assert [record["id"] for record in records] == [f"q{i}" for i in range(12)]
    assert [record["score"] for record in records] == [8.0] * 3 + [None] + [8.0] * 8
    assert (
        server.requests[0]["model"] == "m"
        and server.requests[0]["path"] == "/v1/chat/completions"
        and server.requests[0]["key"] is None
    )
    text = server.requests[0]["messages"][0]["content"]
    assert (
        "Question" in text
        and "context" in text
        and "ref" in text
        and "[or]\nother" in text
        and "says" in text
    )
    results = summarize_results(answered, settings, ["initial", "student"], fingerprint="e")
    entry = results["models"]["student"]["benchmarks"]["b"]
    assert entry["judge"] == {
        "mode": "score",
        "model": "m",
        "items": 12,
        "without_score": 1,
        "mean": 8.0,
        "deviation": None,
    }
    assert entry["tokens_per_second"] == 30 and entry["answer_tokens"] == 5
    comparison = compare_models(
        ComparedModel(answered, "initial", "A"),
        ComparedModel(answered, "student", "B"),
        measure="judge",
    )
    assert comparison.comparisons["b"].difference == 4
    assert comparison.comparisons["b"].items == 11
    count = len(server.requests)
    judge_answers(answered, settings, ["initial", "student"])
    assert len(server.requests) == count  # no question is sent twice


def test_a_restart_sends_only_the_remaining_questions(
    answered: RunDirectory, server: JudgeServer
) -> None:
    server.reply = lambda _, number: (200, "Score: 5", {}) if number <= 5 else (503, "busy", {})
    with pytest.raises(
        ResourceError,
        match=r"does not answer \(HTTP 503: busy\) after 3 tries: the verdicts so far are saved",
    ):
        judge_answers(
            answered, judge_config(server.url, max_samples=None, max_concurrency=1), ["student"]
        )
    partial = answered.evaluation / "student" / "b-seed10.judge.jsonl.partial"
    assert (
        len(partial.read_text().splitlines()) == 5
        and not verdicts_file(answered, "student", "b", 10).exists()
    )
    with partial.open("a") as stream:
        stream.write('{"key": "half')  # as a killed process leaves it
    server.requests.clear()
    server.reply = lambda *_: (200, "Score: 6", {})
    judge_answers(answered, judge_config(server.url, max_samples=None), ["student"])
    assert len(server.requests) == 7 and not partial.exists()
    assert (
        sorted(r["score"] for r in read_verdicts(verdicts_file(answered, "student", "b", 10)))
        == [5.0] * 5 + [6.0] * 7
    )


def test_without_the_judge_the_other_results_are_written(
    answered: RunDirectory, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply = lambda *_: (503, "busy", {})
    recipe = load_recipe("quickstart", ["baseline.enabled=false"])
    recipe = recipe.model_copy(
        update={
            "evaluate": judge_config(server.url).model_copy(
                update={"models": ("initial", "student")}
            )
        }
    )
    monkeypatch.setattr(evaluated_models, "model_path", lambda run, name: name)
    write_manifest(answered.evaluation, "evaluate", "of another recipe", files=[])
    with pytest.raises(ResourceError, match="does not answer"):
        run_in_process("evaluate", recipe, answered)
    entry = json.loads((answered.evaluation / RESULTS).read_text())["models"]["student"][
        "benchmarks"
    ]["b"]
    assert entry["rouge_l"] == 50 and "judge" not in entry
    assert read_manifest(answered.evaluation) is None  # the step is not finished
    server.reply = lambda *_: (200, "Score: 6", {})
    run_in_process("evaluate", recipe, answered)
    entry = json.loads((answered.evaluation / RESULTS).read_text())["models"]["student"][
        "benchmarks"
    ]["b"]
    assert entry["judge"]["mean"] == 6 and read_manifest(answered.evaluation) is not None


def test_another_prompt_template_is_judged_again(
    answered: RunDirectory, server: JudgeServer, tmp_path: Path
) -> None:
    judge_answers(answered, judge_config(server.url, max_samples=4), ["student"])
    assert len(server.requests) == 4
    template = tmp_path / "own.jinja"
    template.write_text("Rate {{ answer }} for {{ question }}")
    judge_answers(
        answered,
        judge_config(server.url, max_samples=4, prompt_template=str(template)),
        ["student"],
    )
    assert len(server.requests) == 8 and server.requests[-1]["messages"][0]["content"].startswith(
        "Rate student says"
    )
    template.write_text("Rate {{ answers }}")
    with pytest.raises(RecipeError, match=r"own\.jinja cannot be filled in"):
        judge_answers(
            answered,
            judge_config(server.url, max_samples=4, prompt_template=str(template)),
            ["student"],
        )
    with pytest.raises(RecipeError, match="is not a valid template"):
        judge_answers(
            answered,
            judge_config(server.url, prompt_template=str(tmp_path / "none.jinja")),
            ["student"],
        )


@pytest.mark.parametrize(
    "template", ["{{ 'a' * 10 ** 14 }}", "{{ '%0999999999999d' % 1 }}"], ids=["product", "format"]
)
def test_a_template_that_takes_too_much_is_refused(
    answered: RunDirectory, server: JudgeServer, tmp_path: Path, template: str
) -> None:
    path = tmp_path / "bomb.jinja"
    path.write_text(template)
    settings = judge_config(server.url, prompt_template=str(path))
    with pytest.raises(RecipeError, match="takes more than 2 GiB of memory for one short item"):
        judge_answers(answered, settings, ["student"])
    assert not server.requests


def test_an_item_that_makes_the_template_costly_is_named(
    answered: RunDirectory,
    server: JudgeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The short item of the check before costs little."""
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = tmp_path / "bomb.jinja"
    path.write_text(f"{{% if question != 'short' %}}{loops}{{% endif %}}{{{{ answer }}}}")
    settings = judge_config(server.url, prompt_template=str(path))
    with pytest.raises(RecipeError, match=r"bomb.jinja takes more than 1 s for the item '.+'"):
        judge_answers(answered, settings, ["student"])
    assert not server.requests


def test_pairs_are_judged_in_both_orders(answered: RunDirectory, server: JudgeServer) -> None:
    """A judge that always prefers the first answer yields ties; one that prefers a model counts."""
    settings = judge_config(server.url, mode="pairwise", opponent="initial", max_samples=None)
    server.reply = lambda *_: (200, "Verdict: A", {})
    judge_answers(answered, settings, ["initial", "student"])
    assert len(server.requests) == 24
    assert {
        record["score"] for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    } == {0.5}
    assert (
        not verdicts_file(answered, "initial", "b", 10).exists()
        and summarize_verdicts(answered, settings, "initial", "b") is None
    )
    for path in (answered.evaluation / "student").glob("*judge*"):
        path.unlink()

    def prefer_student(question: str, _: int) -> tuple[int, str, dict[str, str]]:
        return 200, f"Verdict: {'A' if 'student' in question.split('[Answer B]')[0] else 'B'}", {}

    server.reply = prefer_student
    judge_answers(answered, settings, ["initial", "student"])
    assert {
        record["score"] for record in read_verdicts(verdicts_file(answered, "student", "b", 10))
    } == {1.0}
    with pytest.raises(RecipeError, match=r"opponent=initial is not evaluated"):
        judge_answers(answered, settings, ["student"])


@pytest.mark.parametrize("opponent", ["initial", "teacher"])
def test_win_rates_over_other_opponents_are_not_compared(
    opponent: str, answered: RunDirectory, server: JudgeServer, tmp_path: Path
) -> None:
    """Win rates are comparable only over the same answers of the same opponent."""
    server.reply = lambda *_: (200, "Verdict: A", {})
    compared = []
    for name, other_model, text in (
        ("a", "initial", ""),
        ("b", "initial", ""),
        ("c", opponent, "again"),
    ):
        run = RunDirectory(shutil.copytree(answered.path, tmp_path / name))
        shutil.copytree(run.evaluation / "initial", run.evaluation / "teacher")
        file = answers_file(run, other_model, "b", 10)
        file.write_text(file.read_text().replace("initial says", f"initial says {text}"))
        seal(file.with_name(f"{file.name}.manifest.json"))
        settings = judge_config(
            server.url,
            mode="pairwise",
            opponent=other_model,
            max_samples=None if name == "a" else 6,
        )
        judge_answers(run, settings, [other_model, "student"])
        write_json(
            run.evaluation / "results.json",
            {"seeds": [10], "models": {"student": {"benchmarks": {"b": {}}}}},
        )
        compared.append(ComparedModel(run, "student", name))
    assert compare_models(compared[0], compared[1], measure="judge").comparisons["b"].items == 6
    with pytest.raises(ArtifactError, match=f"judge differs .*against {opponent}"):
        compare_models(compared[0], compared[2], measure="judge")
