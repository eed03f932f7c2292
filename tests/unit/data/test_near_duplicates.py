"""Near-duplicates: runs of 13 words in training and held-out data."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data import near_duplicates
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.near_duplicates import (
    MIN_WORDS,
    RUN_WORDS,
    HitCollector,
    OverlapTable,
    find_hits,
    hash_runs,
    sample_texts,
    split_words,
)

WORDS = st.lists(st.sampled_from("abcdefg"), max_size=40)


def table_of(texts: list[str], *, max_owners: int | None = None) -> OverlapTable:
    return OverlapTable(*hash_runs(enumerate(texts)), max_owners=max_owners)


def runs(words: list[str]) -> set[tuple[str, ...]]:
    if len(words) < MIN_WORDS:
        return set()
    return {
        tuple(words[start : start + RUN_WORDS])
        for start in range(max(len(words) - RUN_WORDS + 1, 1))
    }


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_found_texts_are_those_that_share_a_run(
    held_out: list[list[str]], training: list[list[str]]
) -> None:
    """Against the definition, with sets of tuples."""
    table = table_of([" ".join(words) for words in held_out])
    hashes, owners = hash_runs(enumerate(" ".join(words) for words in training))
    places, keys = table.find(hashes)
    expected = {
        n
        for n, words in enumerate(training)
        if any(runs(words) & runs(other) for other in held_out)
    }
    assert set(owners[places].tolist()) == expected
    found = np.zeros(len(table.keys), bool)
    found[keys] = True
    assert set(table.owners_of(found).tolist()) == {
        n
        for n, words in enumerate(held_out)
        if any(runs(words) & runs(other) for other in training)
    }


def test_order_of_words_matters() -> None:
    words = [f"w{n}" for n in range(RUN_WORDS)]
    hashes, _ = hash_runs([(0, " ".join(words)), (1, " ".join(words[1:] + words[:1]))])
    assert len(set(hashes.tolist())) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, WORLD! It's 3.5%", ["hello", "world", "it", "s", "3", "5"]),
        ("«Où êtes-vous ?»", ["où", "êtes", "vous"]),
        ("你好，世界。", ["你", "好", "世", "界"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("Привет, мир", ["привет", "мир"]),
        ("ｆｕｌｌ ｗｉｄｔｈ", ["full", "width"]),
        ("  \n", []),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_text_has_the_words_of_the_general_rule(text: str) -> None:
    assert split_words(text) == near_duplicates._WORD.findall(text.lower())


def test_runs_that_many_samples_have_are_part_of_a_template() -> None:
    template = "answer the following question in one short and simple sentence of your own words"
    texts = [f"{template} number {n}" for n in range(12)]
    assert len(table_of(texts[:10], max_owners=10).keys) > 10
    table = table_of(texts, max_owners=10)
    places, _ = table.find(hash_runs([(0, template)])[0])
    assert not len(places)
    places, _ = table.find(hash_runs([(0, texts[3])])[0])
    assert len(places)  # the end of the text with its number


def test_system_texts_are_not_compared() -> None:
    sample = Sample(
        "x",
        (Message("system", "Be brief."), Message("user", "Hi."), Message("assistant", "Hello.")),
        input="a text",
        other_references=("Good day.",),
    )
    assert sample_texts(sample) == ["Hi. a text Hello.", "Good day."]


def test_an_edited_copy_is_found_and_another_text_is_not() -> None:
    source = random.Random(0)
    words = [f"w{source.randrange(1000)}" for _ in range(60)]
    edited = [*words[:30], "another", *words[31:]]
    shuffled = source.sample(words, len(words))
    samples = [
        Sample.from_instruction(str(n), " ".join(text), "Yes.")
        for n, text in enumerate((edited, shuffled))
    ]
    places, _ = find_hits(table_of([" ".join(words)]), samples)
    assert set(places.tolist()) == {0}


def test_a_key_of_many_training_rows_counts_for_none() -> None:
    hits = HitCollector(keys=2, max_rows=3)
    for row in range(5):
        hits.add(np.array([row, row]), np.array([0, 0]))  # twice in one text
    hits.add(np.array([5]), np.array([1]))
    rows, keys = hits.result()
    assert rows.tolist() == [5] and keys.tolist() == [False, True]
