"""The benchmarks run at small sizes and show the properties that the documentation states."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hidden_state_child import start_child_instead

from pocl_ds.bench import (
    BENCHMARKS,
    balance,
    checkpoint,
    estimate,
    loss,
    overhead,
    records,
    rollout,
    rouge,
    scale,
    step,
    teacher,
    workloads,
)
from pocl_ds.bench.step_worker import time_trainer
from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.cli.main import main
from pocl_ds.errors import ArtifactError, RecipeError


def test_every_benchmark_names_a_module_with_run() -> None:
    for module, purpose in BENCHMARKS.values():
        assert callable(importlib.import_module(module).run) and purpose


def test_rouge_is_twenty_times_as_fast_at_128_words() -> None:
    lines: list[str] = []
    (row,) = rouge.run(["128"], lines.append, rounds=3, pairs=60)
    assert max(row.warm) > 20
    assert any(line.split()[:1] == ["128"] for line in lines)


def test_texts_have_the_length_and_repeat() -> None:
    assert rouge.texts(3, 17, seed=1) == rouge.texts(3, 17, seed=1) != rouge.texts(3, 17, seed=2)
    assert [len(text.split()) for text in rouge.texts(3, 17, seed=1)] == [17] * 3


def test_scale_prints_a_row_per_size_and_needs_little_memory() -> None:
    lines: list[str] = []
    small, large = scale.run([1000, "100_000"], lines.append)
    assert large["samples"] == 100_000
    assert large["rank"] + large["plan"] + large["first_batch"] + large["resumed_batch"] < 20
    assert large["peak_mib"] - small["peak_mib"] < 120  # about 250 bytes per sample, and noise
    assert sum(line.split()[:1] in (["1000"], ["100000"]) for line in lines) == 2


def test_contenders_compute_the_same_loss_and_full_logits_need_more_memory() -> None:
    lines: list[str] = []
    (table,) = loss.run([600, 8000, 16], lines.append, rounds=1)
    fused, plain = table[:2]
    assert fused.loss == pytest.approx(plain.loss, rel=1e-5)
    assert plain.extra_mib > 2 * 600 * 8000 * 4 / 2**20  # both sides' log-probabilities at least
    assert any(line.startswith("pocl") for line in lines)


def test_extra_memory_does_not_grow_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond hidden states, their gradient and the head's gradient only a chunk is allocated."""
    from pocl_ds.losses import fused_head

    monkeypatch.setattr(
        fused_head.loss_sums,
        "__kwdefaults__",
        {**fused_head.loss_sums.__kwdefaults__, "chunk_bytes": 16 << 20},
    )
    small, large = (
        loss.run([tokens, 8000, 16], lambda _: None, rounds=1)[0][0].extra_mib
        for tokens in (600, 4000)
    )
    # 3,400 more tokens in the plain form: 109 MB for one side's logits alone.
    assert large - small < 12


def test_step_prints_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind: a separate process takes most of the time."""
    kinds = ("torch+cached", "zero3", "sft", "full")
    chosen = tuple(row for row in step.CONTENDERS if row[1] in kinds and row[2] == 1)
    assert len(chosen) == len(kinds)
    monkeypatch.setattr(step, "CONTENDERS", chosen)
    lines: list[str] = []
    results = step.run(["tiny"], lines.append, rounds=1, steps=1)["tiny"]
    assert [label for label in results if label != "floor"] == [
        label for label, _, _ in step.CONTENDERS
    ]
    timed = [row for label, row in results.items() if label != "floor"]
    assert all(row["min"] <= row["median"] <= row["max"] and row["peak_mib"] > 100 for row in timed)
    with pytest.raises(RecipeError, match="there is no workload 'C'"):
        step.run(["C"])


@pytest.mark.parametrize("option", list(step.OPTIONS))
def test_settings_and_hooks_replace_the_contenders(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(work: object, contenders: step.Contenders, *_: object) -> None:
        measured.extend(label for label, *_ in contenders)
        raise InterruptedError

    monkeypatch.setattr(step, "measure_in_turn", measure)
    with pytest.raises(InterruptedError):
        step.run(["tiny", option], lambda _: None)
    assert measured == [label for label, *_ in step.OPTIONS[option]]


def test_settings_and_hooks_together_are_refused() -> None:
    with pytest.raises(RecipeError, match="--settings and --hooks each replace the contenders"):
        step.run(["tiny", *step.OPTIONS], lambda _: None)


@pytest.mark.parametrize("hook", ["adakd", "sample_weights"])
def test_a_hook_changes_the_loss(hook: str, tmp_path: Path) -> None:
    """The benchmark trains with the hook that it names."""
    write_models(WORKLOADS["tiny"], tmp_path)
    losses = [
        time_trainer(variant, WORKLOADS["tiny"], tmp_path, 1)[1]
        for variant in ("torch", f"torch+{hook}")
    ]
    assert losses[0] != losses[1]


def test_checkpoint_measures_every_part() -> None:
    lines: list[str] = []
    results = checkpoint.run(["tiny"], lines.append)
    assert all(results[part] for part in ("step", "save", "stall", "complete", "load", "convert"))
    # Weights and two moments in float32, and the overhead of small files.
    assert 12 <= results["bytes_per_parameter"] < 40
    with pytest.raises(RecipeError, match="there is no workload"):
        checkpoint.run(["C"])


@pytest.mark.vllm
def test_teacher_measures_steps_runs_reads_and_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the engine of vLLM computes the same states."""
    start_child_instead(monkeypatch)
    lines: list[str] = []
    results = teacher.run(["tiny"], lines.append, rounds=1, steps=1, epochs=1)
    assert list(results["steps"]) == [label for label, *_ in teacher.CONTENDERS]
    cached = results["runs"][teacher.CACHED]
    assert cached["steps"] == 10 and cached["cache-teacher"] > 0 and len(cached["read"]) == 10
    assert results["filling"]["ratio"] > 0 and "times as fast as transformers" in lines[-1]
    assert 0 < results["read_share"] < 1 and results["share"] > 0
    with pytest.raises(RecipeError, match="there is no workload"):
        teacher.run(["C"])


@pytest.mark.vllm
def test_rollout_prints_both_backends() -> None:
    lines: list[str] = []
    results = rollout.run(["tiny"], lines.append, rounds=1, steps=2, max_new_tokens=12)
    assert list(results["steps"]) == list(rollout.BACKENDS)
    for (steps,) in results["steps"].values():
        assert len(steps) == 2 and all(
            0 < step["weight_sync_seconds"] < step["rollout_seconds"] for step in steps
        )
        lengths = [length for step in steps for length in step["lengths"]]
        assert len(set(lengths)) > 1 and max(lengths) <= 12
        assert sum(lengths) == sum(step["rollout_tokens"] for step in steps)
    assert len(results["ratios"]) == 1 and lines[-1].startswith("  vllm generates")
    with pytest.raises(RecipeError, match="there is no workload"):
        rollout.run(["C"])


def test_estimate_predicts_the_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: a rank needs nearly as much without them, so this only shows that both sides are
    measured.
    """
    monkeypatch.setattr(estimate, "RANKS", (1,))
    rows = estimate.run(["tiny"], lambda _: None, steps=1)
    assert [row["mode"] for row in rows] == ["online", "cached_hidden_states"]
    assert all(
        0.8 < row["measured"] / row["predicted"] < 1.25 and row["predicted"] > row["base"]
        for row in rows
    )
    counted, formula = estimate.flops(workloads.WORKLOADS["A"])
    assert formula == pytest.approx(counted, rel=0.02)
    with pytest.raises(RecipeError, match="there is no workload 'C'"):
        estimate.run(["C"])


def test_sampled_records_have_noise_and_top_k_records_have_bias() -> None:
    lines: list[str] = []
    rows = records.run(["zipf"], lines.append, size=300, tokens=12, seeds=60)
    assert len(rows) == 9 + 18 and sum("sampled ids" in line for line in lines) == 3 + 6
    for row in rows:
        if "sampled" in row["records"]:
            assert row["bias"] < 0.2 * row["error"]
        else:
            assert row["bias"] == row["error"]
    with pytest.raises(RecipeError, match="choose one of random, zipf, smollm2"):
        records.run(["normal"])


def test_hidden_states_of_fewer_bits() -> None:
    """Channels of different size: float8 and int8 take the same bytes, and int8 errs less."""
    source = torch.Generator().manual_seed(0)
    spread = torch.where(torch.arange(64) % 16 == 0, 30.0, 0.5)
    before, hidden = (spread * torch.randn(2, 50, 64, generator=source)).unbind()
    head = 0.2 * torch.randn(200, 64, generator=source) / spread.sqrt()
    states = records.TeacherStates(hidden, before, head)
    student = hidden @ head.T + torch.randn(50, 200, generator=source)
    rows = records.measure_states("some", states, student, [1.0, 2.0])
    by_label = {row.records: row for row in rows if row.temperature == 1.0}
    assert [row.bytes for row in by_label.values()] == [128, 68, 68] and len(rows) == 6
    bfloat16, float8, int8 = (row.error for row in by_label.values())
    assert 0 < bfloat16 < int8 < float8 / 2 and float8 < 0.5


def test_overhead_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the directory of a finished run"):
        overhead.run([])
    with pytest.raises(ArtifactError, match="holds no finished training"):
        overhead.run([str(tmp_path)])


def test_options_of_a_benchmark_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "tiny", "--trl"]) == 2
    assert "--trl needs the path of a Python that has TRL installed" in capsys.readouterr().err


def test_flops_of_a_workload_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    work = workloads.WORKLOADS["tiny"]
    total = 0.0
    for shape, passes in ((work.teacher, 1), (work.student, 3)):
        model = LlamaForCausalLM(LlamaConfig(**shape))
        for prompt, length in work.lengths:
            ids = torch.zeros(1, length, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[
                    0, max(prompt, 1) - 1 : -1
                ]
                model.lm_head(hidden)
            total += passes * counter.get_total_flops()
    assert workloads.flops(work) == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("arguments", [["many"], ["0"], ["-5"], ["1e6"]])
@pytest.mark.parametrize("module", [rouge, scale])
def test_an_argument_that_is_not_a_number_is_refused(
    module: ModuleType, arguments: list[str]
) -> None:
    with pytest.raises(RecipeError, match="whole numbers"):
        module.run(arguments)


def test_balance_prints_imbalances_and_the_steps_of_two_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = []

    def run_ranks(
        label: str, module: str, arguments: list[str], *_: object, **__: object
    ) -> object:
        assert callable(importlib.import_module(module).main)
        variants.append(arguments[0])
        return {"seconds": [2.0], "processor_seconds": [[3.0], [1.0]]}

    monkeypatch.setattr(balance, "run_ranks", run_ranks)
    lines: list[str] = []
    table = balance.run(["8"], lines.append, rounds=1)
    assert variants == ["zero3+equal_tokens", "zero3"]
    assert {row["measured_imbalance"] for row in table["steps"]} == {1.5}
    for row in table["imbalance"]:
        assert 1 <= row["floor"] <= row["arithmetic"] <= row["tokens"]
    roomy = table["imbalance"][3]
    assert roomy["tokens"] > 1.08 and roomy["arithmetic"] < 1.02
    by_tokens, by_cost = (row["load_imbalance"] for row in table["steps"])
    assert by_tokens > 1.1 > 1.02 > by_cost
    assert any("equal arithmetic" in line for line in lines)
    with pytest.raises(RecipeError, match="'x' is not a number of ranks"):
        balance.run(["x"])
