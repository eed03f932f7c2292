"""The evaluation of tiny models, from answers to results."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from answer_generation import generate
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.config import EvaluateConfig, PromptConfig, TeacherConfig
from pocl_ds.data.conversation import read_sample_file
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, ModelError, PoclError
from pocl_ds.evaluation import evaluate, held_out_loss
from pocl_ds.evaluation.answers import answer_settings, read_answers
from pocl_ds.evaluation.evaluated_models import model_path
from pocl_ds.evaluation.held_out_loss import measure_held_out_loss
from pocl_ds.generation.reused_generator import ReusedGenerator
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

MakeConfig = Callable[..., EvaluateConfig]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_scored_and_have_the_ids_of_their_items(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig
) -> None:
    generate(run, make_config(), prompt, "student")
    samples = {sample.id: sample for sample in read_sample_file(run.data / "test.jsonl")}
    by_seed = [records(run.evaluation / "student" / f"test-seed{seed}.jsonl") for seed in (10, 20)]
    for answers in by_seed:
        assert len(answers) == 6
        for record in answers:
            assert record["references"] == list(samples[record["id"]].references)
            assert samples[record["id"]].instruction in record["prompt"]
            assert record["rouge_l"] == rouge_l(record["response"], record["references"])
    assert [r["id"] for r in by_seed[0]] == [r["id"] for r in by_seed[1]]
    assert [r["response"] for r in by_seed[0]] != [r["response"] for r in by_seed[1]]


def test_only_unfinished_answers_are_generated_again(
    run: RunDirectory,
    make_config: MakeConfig,
    prompt: PromptConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config()
    generate(run, config, prompt, "student")
    folder = run.evaluation / "student"
    finished, unfinished = (folder / f"test-seed{seed}.jsonl" for seed in (10, 20))
    modified, texts = finished.stat().st_mtime_ns, unfinished.read_text()
    (folder / f"{unfinished.name}.manifest.json").unlink()  # as a killed process leaves it
    generate(run, config, prompt, "student")
    assert finished.stat().st_mtime_ns == modified
    assert unfinished.read_text() == texts  # the same seed gives the same answers

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ReusedGenerator, "open", fail)
    generate(run, config, prompt, "student")
    with pytest.raises(AssertionError):
        generate(run, make_config(max_new_tokens=9), prompt, "student")


@pytest.mark.parametrize("damage", ["half", "nothing", "a flipped bit", "no manifest's text"])
def test_damaged_answers_are_generated_again(
    damage: str, run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig
) -> None:
    """Half of the answers were summarized as if they were all."""
    config = make_config(seeds=(10,))
    generate(run, config, prompt, "student")
    file = run.evaluation / "student" / "test-seed10.jsonl"
    complete = file.read_bytes()
    lines = complete.splitlines(keepends=True)
    if damage == "no manifest's text":
        file.with_name(f"{file.name}.manifest.json").write_text("")
    else:
        parts = {"half": b"".join(lines[: len(lines) // 2]), "nothing": b""}
        file.write_bytes(parts.get(damage, complete.replace(b"the", b"The", 1)))
    with pytest.raises(ArtifactError, match="missing, unfinished or damaged: run `pocl evaluate"):
        read_answers(file)
    generate(run, config, prompt, "student")
    assert file.read_bytes() == complete


def test_a_benchmark_file_has_the_format_of_training_data(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig, tmp_path: Path
) -> None:
    path = tmp_path / "bench.jsonl"
    items = [{"instruction": f"Ask {i}.", "input": "", "output": ["a", f"b {i}"]} for i in range(9)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    config = make_config(benchmarks={"mine": str(path)}, seeds=(10,), max_samples=4)
    generate(run, config, prompt, "initial")
    answers = records(run.evaluation / "initial" / "mine-seed10.jsonl")
    assert len(answers) == 4 and all(len(record["references"]) == 2 for record in answers)
    missing = make_config(benchmarks={"mine": str(tmp_path / "none.jsonl")}, seeds=(10,))
    with pytest.raises(PoclError, match=r"none\.jsonl does not exist"):
        generate(run, missing, prompt, "initial")


def reference(
    run: RunDirectory, path: str, teacher: str, rows: int, ids: int, samples: int
) -> tuple[float, float]:
    """Loss and KL per token from full logits, sample by sample, in float64."""
    split = TokenizedSplit.open(run.data, "test")
    model, teacher_model = (
        AutoModelForCausalLM.from_pretrained(p).double().eval() for p in (path, teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == ids
    loss = kl = 0.0
    count = 0
    for row in range(samples):
        tokens = torch.from_numpy(split.tokens(row).astype("int64"))[None]
        start = int(split.prompt_tokens[row])
        with torch.no_grad():
            q, p = (
                m(tokens).logits[0, start - 1 : -1, :rows].log_softmax(-1)
                for m in (model, teacher_model)
            )
        labels = tokens[0, start:]
        loss -= float(q[torch.arange(len(labels)), labels].sum())
        kl += float((p.exp() * (p - q)).sum())
        count += len(labels)
    return loss / count, kl / count


def test_held_out_loss_equals_float64_over_full_logits(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig
) -> None:
    paths = {name: model_path(run, name) for name in ("teacher", "initial", "student")}
    size = len(TokenizedSplit.open(run.data, "test"))
    measure_held_out_loss(run, make_config(max_samples=None), prompt, paths)
    losses = read_json(run.evaluation / "held_out_loss.json")
    # The teacher has 8 rows beyond the tokenizer, which are masked.
    expected = reference(run, paths["initial"], paths["teacher"], 320, 320, size)
    assert (losses["initial"]["loss"], losses["initial"]["kl"]) == pytest.approx(expected, rel=1e-5)
    assert expected[1] > 0.01
    assert losses["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert losses["student"]["kl"] == pytest.approx(
        0, abs=1e-6
    )  # in this run student and teacher have equal weights
    assert losses["student"]["loss"] == pytest.approx(losses["teacher"]["loss"], rel=1e-6)


def test_references_of_a_benchmark_are_measured_like_the_test_split(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig, tmp_path: Path
) -> None:
    """A benchmark with the items of the test split has its numbers; each reference counts."""
    items = list(read_sample_file(run.data / "test.jsonl"))
    for name, second_reference in (("same", []), ("twice", ["another text"])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "id": item.id,
                        "instruction": item.instruction,
                        "input": item.input,
                        "output": [*item.references, *second_reference],
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
    config = make_config(max_samples=None, benchmarks=sources, seeds=(10,), max_new_tokens=2)
    names = ["teacher", "initial"]
    measure_held_out_loss(run, config, prompt, {name: model_path(run, name) for name in names})
    losses = read_json(run.evaluation / "held_out_loss.json")
    for name in names:
        entry = losses[name]
        for key in ("loss", "kl", "tokens"):
            assert entry["benchmarks"]["same"][key] == pytest.approx(entry[key], rel=1e-5)
        assert entry["benchmarks"]["twice"]["tokens"] > 1.1 * entry["tokens"]
        assert entry["benchmarks"]["twice"]["loss"] != pytest.approx(entry["loss"], rel=1e-3)
    for name in names:
        generate(run, config, prompt, name)
    results = evaluate.summarize_results(run, config, names, fingerprint="e")["models"]["initial"]
    assert (
        results["benchmarks"]["test"]["kl"]
        == results["kl"]
        == pytest.approx(results["benchmarks"]["same"]["kl"], rel=1e-5)
    )
    assert "tokens" not in results["benchmarks"]["same"]
    assert results["benchmarks"]["twice"]["references"] == 2


def test_cut_references_are_a_warning(
    run: RunDirectory,
    make_config: MakeConfig,
    prompt: PromptConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"instruction": "q", "output": ["a", "word " * 400, "b"]}) + "\n"
    )
    config = make_config(benchmarks={"test": "test", "b": str(tmp_path / "b.jsonl")})
    with caplog.at_level(logging.WARNING, "pocl_ds"):
        measure_held_out_loss(run, config, prompt, {"initial": model_path(run, "initial")})
    assert (
        "benchmark b: 1 of 3 references or their prompts are cut" in caplog.text
        and "benchmark test" not in caplog.text
    )


def test_shards_write_the_same_answers_as_one_process(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig, tmp_path: Path
) -> None:
    config = make_config()
    paths = [run.evaluation / "student" / f"test-seed{seed}.jsonl" for seed in config.seeds]
    for number in range(2):
        with closing(ReusedGenerator()) as generators:
            evaluate.generate_answers(
                run,
                config,
                prompt,
                model="student",
                path=model_path(run, "student"),
                generators=generators,
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
    generate(run, config, prompt, "student")
    assert [path.read_text() for path in paths] == texts


def test_without_a_teacher_there_is_a_loss_but_no_kl(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig
) -> None:
    measure_held_out_loss(
        run, make_config(max_samples=None), prompt, {"initial": model_path(run, "initial")}
    )
    losses = read_json(run.evaluation / "held_out_loss.json")
    assert losses["initial"]["loss"] > 0 and losses["initial"].get("kl") is None


def test_results_average_over_seeds_and_finish_the_step(
    run: RunDirectory, make_config: MakeConfig, prompt: PromptConfig
) -> None:
    config = make_config(models=("teacher", "student"))
    names = ["teacher", "student"]
    for model in names:
        generate(run, config, prompt, model)
    measure_held_out_loss(run, config, prompt, {name: model_path(run, name) for name in names})
    results = evaluate.summarize_results(run, config, names, fingerprint="e" * 64)
    means = [
        100
        * statistics.fmean(
            r["rouge_l"] for r in records(run.evaluation / "student" / f"test-seed{seed}.jsonl")
        )
        for seed in (10, 20)
    ]
    student = results["models"]["student"]["benchmarks"]["test"]
    assert student["rouge_l"] == pytest.approx(statistics.fmean(means))
    assert student["rouge_l_deviation"] == pytest.approx(
        abs(means[0] - means[1]) / 2**0.5
    )  # divided by n - 1
    assert student["samples"] == 6 and student["words"] > 0
    assert results["models"]["student"]["kl"] == pytest.approx(0, abs=1e-6)
    assert read_json(run.evaluation / "results.json") == results
    manifest = read_manifest(run.evaluation)
    assert manifest is not None and manifest.fingerprint == "e" * 64
    files = [f"{name}/test-seed{seed}.jsonl" for name in names for seed in (10, 20)]
    parts = [run.evaluation / file for file in ("held_out_loss.json", *files)]
    manifests = [read_manifest(part.parent, f"{part.name}.manifest.json") for part in parts]
    assert manifest.info["seconds"] == pytest.approx(
        sum(part.info["seconds"] for part in manifests if part)
    )


def test_cut_and_seen_prompts_are_warnings_and_footnotes(
    run: RunDirectory,
    make_config: MakeConfig,
    prompt: PromptConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        evaluate.log, "warning", lambda text, *values: warnings.append(text % values)
    )
    path = tmp_path / "mine.jsonl"
    trained = next(read_sample_file(run.data / "train.jsonl"))
    prompts = [
        (trained.instruction, trained.input),
        ("Never asked.", ""),
        ("word " * 400, ""),
    ]
    path.write_text(
        "".join(
            json.dumps({"instruction": instruction, "input": text, "output": "a"}) + "\n"
            for instruction, text in prompts
        )
    )
    config = make_config(benchmarks={"test": "test", "mine": str(path)}, held_out_loss=False)
    generate(run, config, prompt, "student")
    assert warnings == [
        "benchmark mine, student: 1 of 3 prompts are longer than prompt.max_prompt_tokens=300, "
        "and lost earlier turns or parts of their texts: raise it"
    ]
    info = read_manifest(run.evaluation / "student", "mine-seed20.jsonl.manifest.json").info  # type: ignore[union-attr]
    assert info["cut_prompts"] == 1
    results = evaluate.summarize_results(run, config, ["student"])
    assert [
        results["models"]["student"]["benchmarks"][name]["cut_prompts"] for name in ("test", "mine")
    ] == [0, 1]
    footnotes = ["1 of 3 prompts cut by prompt.max_prompt_tokens", "1 of 3 items seen in training"]
    assert results["footnotes"] == {"mine": footnotes}
    with pytest.raises(PoclError, match=r"has \d+ prompt tokens \(limit 300\)"):
        generate(run, config, prompt.model_copy(update={"overlong": "error"}), "student")


def test_a_model_without_answers_is_one_sentence(
    run: RunDirectory, make_config: MakeConfig
) -> None:
    with pytest.raises(PoclError, match="run `pocl evaluate --model student`"):
        evaluate.summarize_results(
            run, make_config(held_out_loss=False), ["student"], fingerprint="e"
        )


def test_a_missing_model_names_its_step(run: RunDirectory) -> None:
    with pytest.raises(PoclError, match="baseline"):
        model_path(run, "baseline")


def test_a_teacher_that_training_uses_differently_is_a_warning(
    run: RunDirectory,
    make_config: MakeConfig,
    prompt: PromptConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(held_out_loss, "_measure", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(
        evaluate.log, "warning", lambda text, *values: warnings.append(text % values)
    )
    teacher = {
        "model": "one",
        "quantization": "bnb_4bit",
        "ds_config": None,
        "ensemble": [{"model": "two"}],
    }
    for paths in ({"teacher": "one"}, {"student": "mine"}):  # without the teacher there is no KL
        measure_held_out_loss(
            run, make_config(), prompt, paths, teacher=TeacherConfig.model_validate(teacher)
        )
    assert warnings == [
        "the KL to the teacher is computed with one alone, while training uses a mixture of 2 "
        "teachers",
        "the teacher is evaluated without quantization, while training quantizes it to bnb_4bit",
    ]


@pytest.mark.parametrize(
    ("prompt", "config"),
    [
        ({"template": "chat", "chat_template_kwargs": {"enable_thinking": False}}, {}),
        ({"template": "chat"}, {"generation": {"backend": "transformers"}}),
        ({"template": "chat"}, {"generation": {"dtype": "bfloat16"}}),
    ],
)
def test_everything_that_changes_answers_is_a_setting(prompt: dict, config: dict) -> None:
    default = answer_settings(PromptConfig(template="chat"), EvaluateConfig())
    assert answer_settings(PromptConfig(**prompt), EvaluateConfig(**config)) != default


def test_a_template_file_is_identified_by_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with different templates of the same name are not comparable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "t.jinja"), "~/t.jinja"):
        templates = []
        for text in ("{{ instruction }}", "Say: {{ instruction }}"):
            (tmp_path / "t.jinja").write_text(text)
            templates.append(
                answer_settings(PromptConfig(template=name), EvaluateConfig())["template"]
            )
        assert templates[0] != templates[1]


def test_a_prompt_with_a_token_beyond_the_rows_is_refused_before_the_model_is_loaded(
    run: RunDirectory, tmp_path: Path
) -> None:
    """A text of a benchmark may hold a token that no sample of the training data held."""
    model = shutil.copytree(model_path(run, "student"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [f"<|{number}|>" for number in range(200)]  # more than the model has empty rows
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(model)
    (tmp_path / "b.jsonl").write_text('{"instruction": "Say <|199|>.", "output": "Yes"}\n')
    config = EvaluateConfig.model_validate({"benchmarks": {"b": str(tmp_path / "b.jsonl")}})
    with pytest.raises(
        ModelError, match=r"^a prompt of benchmark b holds token id \d+ \('<\|199\|>'\), and the"
    ):
        evaluate.generate_answers(
            run,
            config,
            PromptConfig(),
            model="student",
            path=str(model),
            generators=None,  # type: ignore[arg-type]
        )
