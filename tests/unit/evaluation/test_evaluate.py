"""The evaluation of tiny models, end to end and in this process."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.config import EvaluateConfig, PromptConfig, TeacherConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import PoclError
from pocl_ds.evaluation import evaluate
from pocl_ds.evaluation.answers import settings
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Configured = Callable[..., EvaluateConfig]


def answer(run: RunDirectory, config: EvaluateConfig, prompt: PromptConfig, model: str) -> None:
    evaluate.answer(
        run, config, prompt, model=model, path=evaluate.model_path(run, model), threads=1
    )


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_scored_and_keyed_by_id(
    run: RunDirectory, configured: Configured, prompt: PromptConfig
) -> None:
    answer(run, configured(), prompt, "student")
    samples = {record["id"]: record for record in records(run.data / "test.jsonl")}
    by_seed = [records(run.evaluation / "student" / f"test-seed{seed}.jsonl") for seed in (10, 20)]
    for found in by_seed:
        assert len(found) == 6
        for record in found:
            assert record["references"] == samples[record["id"]]["references"]
            assert samples[record["id"]]["instruction"] in record["prompt"]
            assert record["rouge_l"] == rouge_l(record["response"], record["references"])
    assert [r["id"] for r in by_seed[0]] == [r["id"] for r in by_seed[1]]
    assert [r["response"] for r in by_seed[0]] != [
        r["response"] for r in by_seed[1]
    ]  # a seed is heard


def test_only_unfinished_answers_are_repeated(
    run: RunDirectory, configured: Configured, prompt: PromptConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    answer(run, config, prompt, "student")
    folder = run.evaluation / "student"
    first, second = (folder / f"test-seed{seed}.jsonl" for seed in (10, 20))
    kept, texts = first.stat().st_mtime_ns, second.read_text()
    (folder / f"{second.name}.manifest.json").unlink()  # as after a kill
    answer(run, config, prompt, "student")
    assert first.stat().st_mtime_ns == kept
    assert second.read_text() == texts  # the same seed gives the same answers

    def never(*_: object, **__: object) -> None:
        raise AssertionError("no model may be loaded")

    monkeypatch.setattr(evaluate, "open_generator", never)
    answer(run, config, prompt, "student")
    with pytest.raises(AssertionError):
        answer(
            run, configured(max_new_tokens=9), prompt, "student"
        )  # other settings, other answers


def test_a_benchmark_file_is_read_like_training_data(
    run: RunDirectory, configured: Configured, prompt: PromptConfig, tmp_path: Path
) -> None:
    path = tmp_path / "bench.jsonl"
    items = [{"instruction": f"Ask {i}.", "input": "", "output": ["a", f"b {i}"]} for i in range(9)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    config = configured(benchmarks={"mine": str(path)}, seeds=(10,), max_samples=4)
    answer(run, config, prompt, "initial")
    found = records(run.evaluation / "initial" / "mine-seed10.jsonl")
    assert len(found) == 4 and all(len(record["references"]) == 2 for record in found)
    missing = configured(benchmarks={"mine": str(tmp_path / "none.jsonl")}, seeds=(10,))
    with pytest.raises(PoclError, match=r"none\.jsonl does not exist"):
        answer(run, missing, prompt, "initial")


def reference(
    run: RunDirectory, path: str, teacher: str, rows: int, ids: int, samples: int
) -> tuple[float, float]:
    """Loss and KL a token by the models' own full logits, sample by sample, in float64."""
    split = TokenizedSplit.open(run.data, "test")
    one, other = (AutoModelForCausalLM.from_pretrained(p).double().eval() for p in (path, teacher))
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == ids
    loss = kl = 0.0
    count = 0
    for row in range(samples):
        tokens = torch.from_numpy(split.tokens(row).astype("int64"))[None]
        start = int(split.prompt_tokens[row])
        with torch.no_grad():
            q, p = (
                m(tokens).logits[0, start - 1 : -1, :rows].log_softmax(-1) for m in (one, other)
            )
        labels = tokens[0, start:]
        loss -= float(q[torch.arange(len(labels)), labels].sum())
        kl += float((p.exp() * (p - q)).sum())
        count += len(labels)
    return loss / count, kl / count


def test_held_out_equals_float64_over_full_logits(
    run: RunDirectory, configured: Configured, prompt: PromptConfig
) -> None:
    paths = {name: evaluate.model_path(run, name) for name in ("teacher", "initial", "student")}
    size = len(TokenizedSplit.open(run.data, "test"))
    evaluate.held_out(run, configured(max_samples=None), prompt, paths)
    found = read_json(run.evaluation / "held_out.json")
    found = found.get("models", found)
    # The teacher's 8 rows beyond the tokenizer take no part: both sides are cut to the rows that
    # the student has.
    expected = reference(run, paths["initial"], paths["teacher"], 320, 320, size)
    assert (found["initial"]["loss"], found["initial"]["kl"]) == pytest.approx(expected, rel=1e-5)
    assert expected[1] > 0.01
    assert found["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["student"]["kl"] == pytest.approx(
        0, abs=1e-6
    )  # here the student has become the teacher
    assert found["student"]["loss"] == pytest.approx(found["teacher"]["loss"], rel=1e-6)


def test_references_of_a_benchmark_are_measured_as_the_test_split_is(
    run: RunDirectory, configured: Configured, prompt: PromptConfig, tmp_path: Path
) -> None:
    """The test split as a benchmark file has the test split's numbers; a second reference is one
    more text.
    """
    items = [json.loads(line) for line in (run.data / "test.jsonl").read_text().splitlines()]
    for name, more in (("same", []), ("twice", ["another text"])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "id": item["id"],
                        "instruction": item["instruction"],
                        "input": item["input"],
                        "output": [*item["references"], *more],
                    }
                )
                + "\n"
                for item in items
            )
        )
    sources = {
        "test": "test",
        **{name: str(tmp_path / f"{name}.jsonl") for name in ("same", "twice")},
    }
    config = configured(max_samples=None, benchmarks=sources, seeds=(10,), max_new_tokens=2)
    names = ["teacher", "initial"]
    evaluate.held_out(run, config, prompt, {name: evaluate.model_path(run, name) for name in names})
    found = read_json(run.evaluation / "held_out.json")
    for name in names:
        entry = found[name]
        for key in ("loss", "kl", "tokens"):
            assert entry["benchmarks"]["same"][key] == pytest.approx(entry[key], rel=1e-5)
        assert entry["benchmarks"]["twice"]["tokens"] > 1.1 * entry["tokens"]
        assert entry["benchmarks"]["twice"]["loss"] != pytest.approx(entry["loss"], rel=1e-3)
    for name in names:
        answer(run, config, prompt, name)
    results = evaluate.summarise(run, config, names, fingerprint="e")["models"]["initial"]
    assert (
        results["benchmarks"]["test"]["kl"]
        == results["kl"]
        == pytest.approx(results["benchmarks"]["same"]["kl"], rel=1e-5)
    )
    assert "tokens" not in results["benchmarks"]["same"]
    assert results["benchmarks"]["twice"]["references"] == 2


def test_references_that_are_cut_are_said(
    run: RunDirectory,
    configured: Configured,
    prompt: PromptConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"instruction": "q", "output": ["a", "word " * 400, "b"]}) + "\n"
    )
    config = configured(benchmarks={"test": "test", "b": str(tmp_path / "b.jsonl")})
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        evaluate.held_out(run, config, prompt, {"initial": evaluate.model_path(run, "initial")})
    assert (
        "benchmark b: 1 of 3 references are cut" in caplog.text
        and "benchmark test" not in caplog.text
    )


def test_parts_of_an_evaluation_are_the_whole(
    run: RunDirectory, configured: Configured, prompt: PromptConfig, tmp_path: Path
) -> None:
    config = configured()
    paths = [run.evaluation / "student" / f"test-seed{seed}.jsonl" for seed in config.seeds]
    for number in range(2):
        evaluate.answer(
            run,
            config,
            prompt,
            model="student",
            path=evaluate.model_path(run, "student"),
            shard=(number, 2),
        )
        assert sum(path.is_file() for path in paths) == number + 1
    texts = [path.read_text() for path in paths]
    info = read_manifest(paths[0].parent, f"{paths[0].name}.manifest.json").info  # type: ignore[union-attr]
    assert (
        info["tokens"] > 0
        and info["tokens_per_second"] > 0
        and info["settings"]["template"] == "alpaca"
    )
    for path in paths:
        path.unlink()
    answer(run, config, prompt, "student")
    assert [path.read_text() for path in paths] == texts


def test_without_a_teacher_there_is_a_loss_and_no_divergence(
    run: RunDirectory, configured: Configured, prompt: PromptConfig
) -> None:
    evaluate.held_out(
        run, configured(max_samples=None), prompt, {"initial": evaluate.model_path(run, "initial")}
    )
    found = read_json(run.evaluation / "held_out.json")
    found = found.get("models", found)
    assert found["initial"]["loss"] > 0 and found["initial"].get("kl") is None


def test_the_summary_joins_seeds_and_seals(
    run: RunDirectory, configured: Configured, prompt: PromptConfig
) -> None:
    config = configured(models=("teacher", "student"))
    names = ["teacher", "student"]
    for model in names:
        answer(run, config, prompt, model)
    evaluate.held_out(run, config, prompt, {name: evaluate.model_path(run, name) for name in names})
    results = evaluate.summarise(run, config, names, fingerprint="e" * 64)
    means = [
        100
        * statistics.fmean(
            r["rouge_l"] for r in records(run.evaluation / "student" / f"test-seed{seed}.jsonl")
        )
        for seed in (10, 20)
    ]
    found = results["models"]["student"]["benchmarks"]["test"]
    assert found["rouge_l"] == pytest.approx(statistics.fmean(means))
    assert found["rouge_l_deviation"] == pytest.approx(
        abs(means[0] - means[1]) / 2**0.5
    )  # of a sample: n - 1
    assert found["samples"] == 6 and found["words"] > 0
    assert results["models"]["student"]["kl"] == pytest.approx(0, abs=1e-6)
    assert read_json(run.evaluation / "results.json") == results
    manifest = read_manifest(run.evaluation)
    assert manifest is not None and manifest.fingerprint == "e" * 64
    files = [f"{name}/test-seed{seed}.jsonl" for name in names for seed in (10, 20)]
    parts = [run.evaluation / file for file in ("held_out.json", *files)]
    taken = [read_manifest(part.parent, f"{part.name}.manifest.json") for part in parts]
    assert manifest.info["seconds"] == pytest.approx(
        sum(part.info["seconds"] for part in taken if part)
    )


def test_cut_and_seen_prompts_are_said_and_stand_beside_the_numbers(
    run: RunDirectory,
    configured: Configured,
    prompt: PromptConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(evaluate.log, "warning", lambda text, *values: said.append(text % values))
    path = tmp_path / "mine.jsonl"
    trained = json.loads((run.data / "train.jsonl").read_text().splitlines()[0])
    asked = [(trained["instruction"], trained["input"]), ("Never asked.", ""), ("word " * 400, "")]
    path.write_text(
        "".join(
            json.dumps({"instruction": one, "input": two, "output": "a"}) + "\n"
            for one, two in asked
        )
    )
    config = configured(benchmarks={"test": "test", "mine": str(path)}, loss=False)
    answer(run, config, prompt, "student")
    assert said == [
        "benchmark mine, student: 1 of 3 prompts are cut to prompt.max_prompt_tokens=300 and "
        "answered without their "
        "ends: raise it"
    ]
    info = read_manifest(run.evaluation / "student", "mine-seed20.jsonl.manifest.json").info  # type: ignore[union-attr]
    assert info["cut_prompts"] == 1
    results = evaluate.summarise(run, config, ["student"])
    assert [
        results["models"]["student"]["benchmarks"][name]["cut_prompts"] for name in ("test", "mine")
    ] == [0, 1]
    said_of_it = ["1 of 3 prompts cut by prompt.max_prompt_tokens", "1 of 3 items seen in training"]
    assert results["marks"] == {"mine": said_of_it}
    with pytest.raises(PoclError, match=r"has \d+ prompt tokens \(limit 300\)"):
        answer(run, config, prompt.model_copy(update={"overlong": "error"}), "student")


def test_an_unanswered_model_is_one_sentence(run: RunDirectory, configured: Configured) -> None:
    with pytest.raises(PoclError, match="run `pocl evaluate --model student`"):
        evaluate.summarise(run, configured(loss=False), ["student"], fingerprint="e")


def test_a_model_that_is_not_there(run: RunDirectory) -> None:
    with pytest.raises(PoclError, match="baseline"):
        evaluate.model_path(run, "baseline")


def test_a_teacher_that_is_not_the_one_of_training_is_said(
    run: RunDirectory, configured: Configured, prompt: PromptConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(evaluate, "measure", lambda *_, **__: None)
    monkeypatch.setattr(evaluate.log, "warning", lambda text, *values: said.append(text % values))
    teacher = {
        "model": "one",
        "quantization": "bnb_4bit",
        "ds_config": None,
        "ensemble": [{"model": "two"}],
    }
    for paths in ({"teacher": "one"}, {"student": "mine"}):  # without the teacher there is no KL
        evaluate.held_out(
            run, configured(), prompt, paths, teacher=TeacherConfig.model_validate(teacher)
        )
    assert said == [
        "KL to the teacher is to one alone, not to the mixture of 2 that training asked",
        "the teacher is evaluated as its model is, not quantised to bnb_4bit as training asked it",
    ]


@pytest.mark.parametrize(
    ("prompt", "config"),
    [
        ({"template": "chat", "chat_template_kwargs": {"enable_thinking": False}}, {}),
        ({"template": "chat"}, {"generation": {"backend": "transformers"}}),
        ({"template": "chat"}, {"generation": {"dtype": "bfloat16"}}),
    ],
)
def test_what_else_moves_answers_is_compared_too(prompt: dict, config: dict) -> None:
    first = settings(PromptConfig(template="chat"), EvaluateConfig())
    assert settings(PromptConfig(**prompt), EvaluateConfig(**config)) != first


def test_a_template_is_told_by_its_text_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with other templates of one name are not compared."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "t.jinja"), "~/t.jinja"):
        found = []
        for text in ("{{ instruction }}", "Say: {{ instruction }}"):
            (tmp_path / "t.jinja").write_text(text)
            found.append(settings(PromptConfig(template=name), EvaluateConfig())["template"])
        assert found[0] != found[1]
