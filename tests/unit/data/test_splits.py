"""Keys that decide the split of a sample."""

from __future__ import annotations

import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.splits import assign_split, first_exchange, smallest_rows, split_key


def render(sample: Sample) -> str:
    return "|".join([*(turn.content for turn in sample.prompt), sample.input])


def conversation(*turns: str, **fields: str) -> Sample:
    """A sample of turns as `u:Hello`, `a:Hi`, `s:Be brief.`."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return Sample("x", tuple(Message(roles[t[0]], t[2:]) for t in turns), **fields)


def test_first_exchange_ends_with_the_first_answer_to_a_user() -> None:
    single = conversation("s:Be brief.", "u:Hi.", "a:Hello.", input="text")
    assert first_exchange(single) is single
    longer = conversation("s:Be brief.", "u:Hi.", "a:Hello.", "u:And?", "a:Yes.", input="text")
    assert first_exchange(longer).messages == single.messages and not first_exchange(longer).input
    greeting = conversation("a:How can I help?", "u:Hi.", "a:Hello.", "u:And?", "a:Yes.")
    assert [turn.content for turn in first_exchange(greeting).messages] == [
        "How can I help?",
        "Hi.",
        "Hello.",
    ]


def test_conversations_that_begin_alike_have_one_key() -> None:
    one = split_key(conversation("u:Hi.", "a:Hello.", "u:And?", "a:Yes."), render)
    assert one == split_key(conversation("u:Hi.", "a:Another answer."), render)
    assert one != split_key(conversation("u:Hi!", "a:Hello."), render)


def test_a_text_without_a_prompt_has_the_key_of_its_text() -> None:
    one, other = (split_key(conversation(f"a:{text}"), render) for text in ("A text.", "Another."))
    assert one != other


@given(st.text(min_size=1))
def test_unicode_forms_have_one_key(text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    keys = {split_key(conversation(f"u:{form}", "a:Yes."), render) for form in (*forms, text)}
    assert len(keys) == 1 and len(keys.pop()) == 16


@given(st.integers(0, 2**64 - 1), st.floats(0, 0.5), st.floats(0, 0.49))
def test_split_follows_the_fractions(key: int, validation: float, test: float) -> None:
    split = assign_split(key, validation_fraction=validation, test_fraction=test)
    position = key / 2**64
    assert (split == "test") == (position < test)
    assert (split == "train") == (position >= test + validation)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**64 - 1)), unique=True), st.data())
def test_limited_selection_is_that_of_the_smallest_keys(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    keys = np.array([key for key, _ in pairs], np.uint64)
    ties = np.array([tie for _, tie in pairs], np.uint64)
    mask = data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    rows = np.flatnonzero(np.array(mask, bool))
    limit = data.draw(st.none() | st.integers(0, len(pairs)))
    expected = sorted(rows, key=lambda row: pairs[row])[:limit]
    assert smallest_rows(rows, keys, ties, limit).tolist() == sorted(expected)
