"""ROUGE-L against rouge-score itself, bit for bit."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pocl_ds.bench.rouge import texts
from pocl_ds.errors import DataError
from pocl_ds.metrics import rouge
from pocl_ds.metrics.rouge import clear_stem_cache, rouge_l, rouge_l_many

SCORER = RougeScorer(["rougeL"], use_stemmer=True)
SUFFIXES = [
    "",
    "s",
    "ed",
    "ing",
    "ies",
    "eed",
    "ational",
    "alli",
    "logi",
    "ness",
    "ion",
    "fulli",
    "y",
    "ll",
    "sses",
    "ied",
    "e",
]
WORDS = st.builds(
    lambda stem, suffix: stem + suffix,
    st.text("aeiouybcdlmnrst", min_size=0, max_size=6),
    st.sampled_from(SUFFIXES),
)
WORD_LISTS = st.lists(
    st.one_of(
        WORDS,
        st.sampled_from(
            [
                "the",
                "Cats",
                "RUNNING",
                "dying",
                "2024",
                "x1",
                "don't",
                "e.g.",
                "K",
                "İstanbul",
                "ſs",
            ]
        ),
    ),
    max_size=60,
).map(" ".join)
TEXT = st.one_of(st.text(), st.text("abé İK\n\t.sSyY0١", max_size=80), WORD_LISTS)


def expected(prediction: str, references: list[str]) -> float:
    return float(SCORER.score_multi(references, prediction)["rougeL"].fmeasure)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
@settings(max_examples=500, deadline=None)
def test_equals_rouge_score_on_any_text(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == expected(prediction, references)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_equals_rouge_score_on_texts_that_overlap(data: st.DataObject) -> None:
    words = data.draw(st.lists(WORDS, min_size=1, max_size=12))
    prediction, reference = (
        " ".join(data.draw(st.lists(st.sampled_from(words), max_size=90))) for _ in range(2)
    )
    assert rouge_l(prediction, [reference]) == expected(prediction, [reference])


def test_every_character_alone() -> None:
    """Each code point between two words: where it splits words, and what its lower case is."""
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF]
    for start in range(0, len(points), 4096):
        text = "".join(f"ab{c}cd " for c in points[start : start + 4096])
        assert rouge._StemNumbers().stem_numbers(text) == _numbered(text)


def _numbered(text: str) -> list[int]:
    numbers: dict[str, int] = {}
    stem_numbers = rouge._StemNumbers()
    for word in SCORER._tokenizer.tokenize(text):
        numbers[word] = stem_numbers[word]
    return [numbers[word] for word in SCORER._tokenizer.tokenize(text)]


@pytest.mark.parametrize("words", [1, 63, 64, 65, 128, 300])
def test_long_texts_over_word_boundaries_of_the_bit_vectors(words: int) -> None:
    for prediction, reference in zip(
        texts(4, words, seed=1), texts(4, words + 3, seed=2), strict=True
    ):
        assert rouge_l(prediction, [reference]) == expected(prediction, [reference])


def test_real_pairs(shared_data: Path) -> None:
    lines = (shared_data / "eval_vicuna80.jsonl").read_text(encoding="utf-8").splitlines()[:26]
    answers = [json.loads(line)["output"][:900] for line in lines]
    for prediction, reference in itertools.pairwise(answers):
        assert rouge_l(prediction, [reference]) == expected(prediction, [reference])


def test_known_values() -> None:
    assert rouge_l("the cat sat", ["the cats sit"]) == pytest.approx(2 / 3)
    assert rouge_l("a b c", ["a b c"]) == 1.0
    assert rouge_l("", ["a"]) == rouge_l("a", [""]) == rouge_l("…", ["…"]) == 0.0


def test_uses_the_best_reference() -> None:
    assert rouge_l("one two three", ["four", "one two three", "one"]) == 1.0


def test_many_equals_single_calls() -> None:
    predictions = texts(20, 30, seed=3)
    references = [
        list(pair) for pair in zip(texts(20, 9, seed=4), texts(20, 40, seed=5), strict=True)
    ]
    scores = rouge_l_many(predictions, references)
    assert scores.dtype == np.float64
    assert scores.tolist() == [rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]
    assert rouge_l_many([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 predictions and 0"):
        rouge_l_many(["a"], [])


@pytest.mark.parametrize("references", [[], "a string"])
def test_missing_references_are_an_error(references: list[str] | str) -> None:
    with pytest.raises(DataError, match="reference"):
        rouge_l("a", references)


def test_clearing_the_cache_changes_nothing_and_bounds_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = list(zip(texts(30, 50, seed=6), texts(30, 50, seed=7), strict=True))
    before = [rouge_l(a, [b]) for a, b in pairs]
    monkeypatch.setattr(rouge, "MAX_CACHED_WORDS", 20)
    assert [rouge_l(a, [b]) for a, b in pairs] == before
    assert 0 < len(rouge._cache) <= 20 + 100  # words of one pair
    clear_stem_cache()
    assert not rouge._cache


def test_concurrent_cache_clears() -> None:
    pairs = list(zip(texts(40, 60, seed=8), texts(40, 60, seed=9), strict=True))
    before = [rouge_l(a, [b]) for a, b in pairs]
    mismatches: list[int] = []

    def score_pairs(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(300):
            i = source.randrange(len(pairs))
            if source.random() < 0.1:
                clear_stem_cache()
            if rouge_l(pairs[i][0], [pairs[i][1]]) != before[i]:
                mismatches.append(i)

    threads = [threading.Thread(target=score_pairs, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mismatches
