"""The benchmarks run, and they hold what the program promises, at sizes a test can afford."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from pocl_ds.bench import BENCHMARKS, rouge, scale
from pocl_ds.errors import RecipeError


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


def test_scale_prints_a_row_a_size_and_stays_small() -> None:
    lines: list[str] = []
    small, large = scale.run([1000, "100_000"], lines.append)
    assert large["samples"] == 100_000
    assert large["rank"] + large["plan"] + large["first_batch"] + large["resumed_batch"] < 20
    assert large["peak_mib"] - small["peak_mib"] < 120  # some 250 bytes a sample, and noise
    assert sum(line.split()[:1] in (["1000"], ["100000"]) for line in lines) == 2


@pytest.mark.parametrize("arguments", [["many"], ["0"], ["-5"], ["1e6"]])
@pytest.mark.parametrize("module", [rouge, scale])
def test_what_is_not_a_number_is_one_sentence(module: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(RecipeError, match="whole numbers"):
        module.run(arguments)
