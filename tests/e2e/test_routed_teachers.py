"""Teachers by stage and by domain, on tiny models: each step has the loss of its own teacher, both
online and cached, and a resumed training gives the same result.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from several_commands import run_on_ranks
from tiny_runs import computed, records
from transformers import AutoModelForCausalLM
from two_domains import run_here, write_models_and_data

from pocl_ds.cli.main import main
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.curriculum.sampler import Sampler

SEED, BATCH = 42, 8
ROUTES = ("by_stage", "by_domain")
CACHED = "teacher.mode=cached_hidden_states"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, and 60 samples of two domains."""
    return write_models_and_data(tmp_path_factory.mktemp("routed"), 60)


def write_recipe(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    """A recipe of three stages."""
    tree: dict[str, Any] = {
        "name": "routed",
        "seed": SEED,
        "data": {
            "source": str(folder / "data.jsonl"),
            "fields": {"domain": "kind"},
            "test_fraction": 0.0,
            "validation_fraction": 0.1,
            "max_train_samples": 48,
        },
        "prompt": {"template": "alpaca", "max_prompt_tokens": 256, "max_length": 320},
        "teacher": {"model": str(folder / "first")},
        "student": {"model": str(folder / "student")},
        "ranking": {"strategy": "random"},
        "loss": {"name": "fkl"},
        "curriculum": {"num_subsets": 3, "epochs_per_stage": 1},
        "train": {
            "batch_size": BATCH,
            "micro_batch_size": 2,
            "lr": 1e-3,
            "checkpoint": {"every_n_steps": 2, "keep_last": 20},
        },
        "launch": {"ranks": 2, "threads_per_rank": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def plan_run(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    recipe, run = write_recipe(folder, name, **changes), folder / name
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def online(folder: Path) -> dict[str, Path]:
    """Finished runs of the plain engine with online teachers."""
    second = {"model": str(folder / "second")}
    teachers: dict[str, Any] = {"by_stage": {2: second, 3: second}, "by_domain": {"math": second}}
    runs = {}
    for routes in ROUTES:
        runs[routes] = plan_run(
            folder,
            f"online-{routes}",
            teacher={routes: teachers[routes]},
            train={"engine": "torch", "validate_every_n_steps": 1},
            launch={"ranks": 1},
        )
        assert run_here("train", runs[routes]) == 0
    return runs


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[str, Path]:
    """Finished runs on two ranks; `cached` is that by domain, with cached teachers."""
    second = {"model": str(folder / "second")}
    runs = {
        "by_stage": plan_run(folder, "two-by_stage", teacher={"by_stage": {2: second}}),
        "by_domain": plan_run(folder, "two-by_domain", teacher={"by_domain": {"math": second}}),
    }
    runs["cached"] = shutil.copytree(runs["by_domain"], folder / "two-cached")
    run_on_ranks(
        folder,
        2,
        ["train", "--run-dir", str(runs["by_stage"])],
        ["train", "--run-dir", str(runs["by_domain"])],
        *([step, "--run-dir", str(runs["cached"]), CACHED] for step in ("cache-teacher", "train")),
    )
    return runs


def copy_until(run: Path, target: Path, step: int) -> Path:
    """A copy of a finished run as it was after `step` optimizer steps, without its logs; after 0,
    before training.
    """
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("logs"))
    if step == 0:
        shutil.rmtree(target / "train")
        return target
    shutil.rmtree(target / "train" / "final")
    (target / "train" / "manifest.json").unlink()
    for path in (target / "train" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return target


def log_of(run: Path, step: str = "train") -> str:
    return " ".join((run / "logs" / f"{step}.log").read_text().split())


def divergence(run: Path, step: int, student: Any, teachers: list[Path], temperature: float) -> Any:
    """tau^2 KL per loss token of a step in float64, without code of the package.

    teachers: of each row of the training data.
    """
    index = np.load(run / "data" / "train.index.npy")
    tokens = np.fromfile(run / "data" / "train.tokens.bin", np.uint32)
    models = {path: load(path) for path in set(teachers)}
    total, count = 0.0, 0
    for row in Sampler(load_plan(run / "plan" / "plan.json"), SEED).batch(step):
        start, prompt, size = (int(value) for value in index[row][:3])
        ids = torch.from_numpy(tokens[start : start + size].astype(np.int64))[None]
        with torch.no_grad():
            log_q, log_p = (
                (model(input_ids=ids).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
                for model in (student, models[teachers[row]])
            )
        total += float((log_p.exp() * (log_p - log_q)).sum()) * temperature**2
        count += size - prompt
    return total / count


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


def student_after(run: Path, step: int) -> Any:
    """The student after `step` optimizer steps of the plain engine."""
    student = load(run.parent / "student")
    if step:
        checkpoint = run / "train" / "checkpoints" / f"step-{step:08d}" / "torch.pt"
        state = torch.load(checkpoint, weights_only=True)["module"]
        own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        student.load_state_dict(own)
    return student


def test_each_stage_has_its_teacher(online: dict[str, Path], folder: Path) -> None:
    run = online["by_stage"]
    log = log_of(run)
    assert log.count("has the teacher") == 2, "stages 2 and 3 share one, which is not loaded again"
    assert log.count("freed the teacher") == 1

    names = [str(folder / name) for name in ("first", "second", "second")]
    steps = records(run)
    assert [step["stage"] for step in steps] == [0] * 2 + [1] * 4 + [2] * 6
    assert all(step["teacher"] == names[step["stage"]] for step in steps)
    validations = records(run, kind="validation")
    assert all(validation["teacher"] == names[validation["stage"]] for validation in validations)
    for number in (0, 2, 6):
        student, step = student_after(run, number), steps[number]
        losses = [
            divergence(run, number, student, [folder / name] * 48, step["temperature"])
            for name in ("first", "second")
        ]
        own, other = losses if step["stage"] == 0 else losses[::-1]
        assert step["kd_loss"] == pytest.approx(own, rel=1e-4)
        assert step["kd_loss"] != pytest.approx(other, rel=1e-3)


def test_each_domain_has_its_teacher(online: dict[str, Path], folder: Path) -> None:
    run = online["by_domain"]
    steps = records(run)
    names = json.loads((run / "data" / "domains.json").read_text())
    numbers = np.load(run / "data" / "train.domains.npy")
    teachers = [folder / ("second" if names[n] == "math" else "first") for n in numbers]
    for number in (0, 2, 6):
        loss = divergence(
            run, number, student_after(run, number), teachers, steps[number]["temperature"]
        )
        assert steps[number]["kd_loss"] == pytest.approx(loss, rel=1e-4)
    for step in steps:
        assert sum(step["teacher_samples"].values()) == BATCH
    assert any(len(step["teacher_samples"]) == 2 for step in steps)
    assert len(records(run, kind="validation")[0]["teacher_samples"]) == 2


@pytest.fixture(scope="module")
def cached(online: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same runs with cached teachers, in two shards."""
    runs = {}
    for routes in ROUTES:
        run = runs[routes] = copy_until(online[routes], folder / f"cached-{routes}", 0)
        assert run_here("cache-teacher", run, CACHED, "--shard", "1/2") == 0
        assert not (run / "teacher_cache" / "manifest.json").exists()
        assert run_here("cache-teacher", run, CACHED, "teacher_cache.shards=2") == 0
        assert run_here("train", run, CACHED) == 0
    return runs


def caches(run: Path) -> dict[str, Path]:
    """The folder of each teacher's cache, by the name of its model."""
    manifest = json.loads((run / "teacher_cache" / "manifest.json").read_text())
    return {
        Path(entry["model"]).name: run / "teacher_cache" / entry["folder"]
        for entry in manifest["info"]["teachers"]
    }


def cached_rows(run: Path, split: str) -> dict[str, list[int]]:
    """The cached rows of a split by the name of their teacher's model."""
    return {n: np.load(f / f"{split}.rows.npy").tolist() for n, f in caches(run).items()}


def test_each_teacher_caches_the_samples_that_it_is_used_for(cached: dict[str, Path]) -> None:
    run = cached["by_stage"]
    order = np.load(run / "ranking" / "order.npy").tolist()
    validation = list(range(len(np.load(run / "data" / "validation.ids.npy"))))
    assert cached_rows(run, "train") == {"first": sorted(order[:16]), "second": sorted(order)}
    assert cached_rows(run, "validation") == {"first": validation, "second": validation}

    run = cached["by_domain"]
    names = json.loads((run / "data" / "domains.json").read_text())
    for split in ("train", "validation"):
        numbers = np.load(run / "data" / f"{split}.domains.npy")
        is_math = numbers == names.index("math")
        assert cached_rows(run, split) == {
            "first": np.flatnonzero(~is_math).tolist(),
            "second": np.flatnonzero(is_math).tolist(),
        }


@pytest.mark.parametrize("routes", ROUTES)
def test_cached_teachers_give_the_same_training(
    routes: str, online: dict[str, Path], cached: dict[str, Path]
) -> None:
    run = cached[routes]
    log = log_of(run)
    assert "the teacher's outputs are cached" in log
    assert log.count("freed the teacher") == (routes == "by_stage")
    for kind in ("step", "validation"):
        pairs = zip(records(run, kind=kind), records(online[routes], kind=kind), strict=True)
        for own, expected in pairs:
            for name in ("loss", "kd_loss", "sft_loss", "validation_loss", "validation_kd_loss"):
                assert own.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-5)
            for name in ("teacher", "teacher_samples", "sample_ids_digest", "samples"):
                assert own.get(name) == expected.get(name)


@pytest.mark.parametrize("routes", ROUTES)
def test_a_training_with_cached_teachers_resumes(
    routes: str, cached: dict[str, Path], tmp_path: Path
) -> None:
    run = copy_until(cached[routes], tmp_path / "run", 4)
    assert run_here("train", run, CACHED) == 0
    assert computed(run) == computed(cached[routes])


def test_only_the_cache_of_a_changed_teacher_is_written_again(
    cached: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """A changed model, the baseline's need of all samples, and a removed shard."""
    run = copy_until(cached["by_stage"], tmp_path / "run", 0)

    def written(*words: str) -> dict[str, set[str]]:
        """The files that a call of the step writes, by the model of their cache."""
        before = {path: path.stat().st_mtime_ns for path in (run / "teacher_cache").glob("*/*.bin")}
        assert run_here("cache-teacher", run, CACHED, "teacher_cache.shards=2", *words) == 0
        return {
            name: {p.name for p in path.glob("*.bin") if before.get(p) != p.stat().st_mtime_ns}
            for name, path in caches(run).items()
        }

    everything = {
        f"{split}-0000{n}-of-00002.bin" for split in ("train", "validation") for n in (0, 1)
    }
    assert written() == {"first": set(), "second": set()}
    shard = "train-00001-of-00002.bin"
    (caches(run)["second"] / shard).unlink()
    (caches(run)["second"] / "manifest.json").unlink()
    assert written() == {"first": set(), "second": {shard}}
    assert written("baseline.enabled=true") == {"first": everything, "second": set()}
    assert len(cached_rows(run, "train")["first"]) == 48
    assert run_here("baseline", run, CACHED, "baseline.enabled=true") == 0
    assert all(record["kd_loss"] > 0 for record in records(run, "baseline"))
    third = [f"teacher.by_stage.{stage}.model={folder / 'student'}" for stage in (2, 3)]
    assert written("baseline.enabled=true", *third) == {"first": set(), "student": everything}
    folders = [path for path in (run / "teacher_cache").glob("*") if path.is_dir()]
    assert len(folders) == 2, "that of the former teacher is removed"


def test_records_of_several_teachers_and_a_damaged_one(
    cached: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(cached["by_domain"], tmp_path / "run", 0)
    words = ("teacher.mode=cached_topk", "teacher_cache.top_k=64")
    assert run_here("cache-teacher", run, *words) == 0
    assert run_here("train", run, *words) == 0
    for own, other in zip(records(run), records(cached["by_domain"]), strict=True):
        assert 0 < own["kd_loss"] < other["kd_loss"], "over fewer outcomes"
        assert own["teacher_samples"] == other["teacher_samples"]
    shutil.rmtree(run / "train")
    path = caches(run)["second"] / "train-00000-of-00001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_here("train", run, *words) == 2
    assert f"{path} is damaged at row" in " ".join(capsys.readouterr().err.split())


def test_a_cache_by_stage_needs_the_plan(
    online: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(online["by_stage"], tmp_path / "run", 0)
    shutil.rmtree(run / "plan")
    assert run_here("cache-teacher", run, CACHED) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "holds no plan of this recipe" in message and "run `pocl plan` first" in message


def test_two_ranks_train_alike_with_cached_teachers(on_two_ranks: dict[str, Path]) -> None:
    pairs = zip(computed(on_two_ranks["cached"]), computed(on_two_ranks["by_domain"]), strict=True)
    for own, other in pairs:
        assert own.pop("sample_ids_digest") == other.pop("sample_ids_digest")
        assert own == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_a_resumed_training_gives_the_same_result(
    on_two_ranks: dict[str, Path], tmp_path: Path
) -> None:
    """The same bits on as many ranks, and the same losses on another number."""
    assert log_of(on_two_ranks["by_stage"]).count("freed the teacher") == 2
    # In the middle of stage 2.
    stopped = {r: copy_until(on_two_ranks[r], tmp_path / r, 4) for r in ROUTES}
    run_on_ranks(tmp_path, 2, *(["train", "--run-dir", str(run)] for run in stopped.values()))
    for routes, run in stopped.items():
        assert computed(run) == computed(on_two_ranks[routes])
    fewer = {r: copy_until(on_two_ranks[r], tmp_path / f"fewer-{r}", 4) for r in ROUTES}
    words = (["train", "--run-dir", str(run), "launch.ranks=1"] for run in fewer.values())
    run_on_ranks(tmp_path, 1, *words)
    for routes, run in fewer.items():
        for own, other in zip(computed(run), computed(on_two_ranks[routes]), strict=True):
            assert own.pop("sample_ids_digest") == other.pop("sample_ids_digest")
            assert own == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_a_domain_that_does_not_occur_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = {"model": str(folder / "second")}
    recipe = write_recipe(folder, "law", teacher={"by_domain": {"math": second, "law": second}})
    assert main(["preprocess", str(recipe), "--run-dir", str(tmp_path / "run")]) != 0
    message = " ".join(capsys.readouterr().err.split())
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    domains = manifest["info"]["domains"]["train"]
    assert "teacher.by_domain.law: no training sample has the domain 'law'" in message
    assert all(f"{name} {count}" in message for name, count in domains.items())
