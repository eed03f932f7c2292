"""Where a thought ends and its answer begins, as texts and as tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data import thought_spans
from pocl_ds.data.thought_spans import ThoughtFinder, answer_of
from pocl_ds.data.thoughts import TAGS

TOKENIZER = tiny_models.make_tokenizer()
FINDER = ThoughtFinder(TOKENIZER)


@pytest.mark.parametrize(
    ("response", "opened", "expected"),
    [
        ("4", False, ("4", True)),
        ("<think>\n2 + 2\n</think>\n\n4", False, ("4", True)),
        ("2 + 2</think>4", True, ("4", True)),  # the prompt opens the thought
        ("[THINK]a[/THINK] b", False, ("b", True)),
        ("<think>2 + 2 and then", False, ("", False)),
        ("2 + 2 and then", True, ("", False)),
        ("<think></think>", False, ("", True)),
        ("a <think> in the middle", False, ("a <think> in the middle", True)),
    ],
)
def test_the_answer_of_a_response(response: str, opened: bool, expected: tuple[str, bool]) -> None:
    assert answer_of(response, prompt_opens_thought=opened) == expected


@pytest.mark.parametrize("window", [4, 256])
@given(
    prompt=st.text(min_size=1, max_size=20),
    thought=st.text("ab <>/thinké", max_size=40),
    answer=st.text(min_size=1, max_size=20),
    tags=st.sampled_from(TAGS),
)
def test_the_answer_begins_after_the_closing_tag(
    window: int, prompt: str, thought: str, answer: str, tags: Any
) -> None:
    """The first token after the tag: the text through it has the tag, a shorter one has not. The
    tag may lie across windows.
    """
    ids = TOKENIZER(f"{tags.opening}{thought}{tags.closing}{answer}").input_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thought_spans, "WINDOW", window)
        start = FINDER.answer_start(ids)
    closing = [t.closing for t in TAGS if t.closing in TOKENIZER.decode(ids)]
    assert start is not None
    assert any(tag in TOKENIZER.decode(ids[:start]) for tag in closing)
    assert not any(tag in TOKENIZER.decode(ids[: start - 1]) for tag in closing)
    assert FINDER.prompt_opens(TOKENIZER(f"{prompt}{tags.opening}\n").input_ids)
    assert FINDER.thought_tokens(TOKENIZER(prompt).input_ids, ids) == start


def test_a_closing_tag_of_one_token_is_found_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = tiny_models.make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    finder, text = ThoughtFinder(tokenizer), "<think>one and two</think>three"
    ids = tokenizer(text).input_ids
    monkeypatch.setattr(finder, "_decode", None)  # no text is looked at
    place = ids.index(tokenizer.convert_tokens_to_ids("</think>"))
    assert finder.thought_tokens([5], ids) == place + 1 == finder.answer_start(ids)


@pytest.mark.parametrize(
    ("prompt", "response", "all_of_it"),
    [
        ("a prompt", "and an answer", False),
        ("a prompt", "<think>that never ends", True),
        ("a prompt <think>\n", "that never ends", True),
        ("a prompt <think>\n\n</think>", "and an answer", False),
    ],
)
def test_a_response_without_a_closing_tag_is_an_answer_or_a_thought(
    prompt: str, response: str, all_of_it: bool
) -> None:
    ids = TOKENIZER(response).input_ids
    assert FINDER.answer_start(ids) is None
    assert FINDER.thought_tokens(TOKENIZER(prompt).input_ids, ids) == all_of_it * len(ids)
