"""The source `tasks` is deterministic, and its answers are right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from pocl_ds.data.tasks import FAMILIES, LEVELS, NUM_TASKS, WORDS, generate_tasks

SAMPLES = list(generate_tasks())


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def words_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in WORDS]


def answer_sum(prompt: str) -> str:
    return str(sum(numbers_in(prompt)))


def answer_largest(prompt: str) -> str:
    return str((max if "largest" in prompt else min)(numbers_in(prompt)))


def answer_sort(prompt: str) -> str:
    return ", ".join(map(str, sorted(numbers_in(prompt))))


def answer_reverse(prompt: str) -> str:
    return ", ".join(reversed(words_in(prompt)))


def answer_position(prompt: str) -> str:
    ordinals = ["first", "second", "third", "fourth", "fifth"]
    (place,) = [ordinals.index(word) for word in re.findall(r"[a-z]+", prompt) if word in ordinals]
    return words_in(prompt)[place]


def answer_count(prompt: str) -> str:
    """The word that is counted stands outside the list, so it occurs once more in the prompt."""
    listed = max(re.split(r"[:?] ?| in | does ", prompt), key=lambda part: part.count(","))
    (asked,) = {*words_in(prompt.replace(listed, "", 1))} or {*words_in(listed)}
    return str(words_in(listed).count(asked))


def answer_replace(prompt: str) -> str:
    patterns = (
        r"Replace (?P<old>\w+) by (?P<new>\w+): (?P<listed>.*)",
        r"Change (?P<old>\w+) to (?P<new>\w+) in (?P<listed>.*)\.",
        r"Write (?P<listed>.*) with (?P<new>\w+) for each (?P<old>\w+)\.",
    )
    (found,) = [match for pattern in patterns if (match := re.fullmatch(pattern, prompt))]
    words = found["listed"].split(", ")
    return ", ".join(found["new"] if word == found["old"] else word for word in words)


def answer_table(prompt: str) -> str:
    rows = dict(re.findall(r"([A-Z][a-z]+)(?: has|:) (\d)", prompt))
    question = prompt.rpartition(". ")[2]
    if question.startswith(("Who", "Whose")):
        (asked,) = re.findall(r"\d", question)
        return next(name for name, number in rows.items() if number == asked)
    return next(number for name, number in rows.items() if name in question)


def answer_program(prompt: str) -> str:
    code, _, question = prompt.partition(". ")
    values: dict[str, int] = {}
    exec(code, {}, values)  # noqa: S102
    (asked,) = [word for word in re.findall(r"[a-z]+", question) if word in values]
    return str(values[asked])


ANSWERS: dict[str, Callable[[str], str]] = {
    "sum": answer_sum,
    "largest": answer_largest,
    "sort": answer_sort,
    "reverse": answer_reverse,
    "position": answer_position,
    "count": answer_count,
    "replace": answer_replace,
    "table": answer_table,
    "program": answer_program,
}


def test_a_seed_gives_the_same_tasks() -> None:
    first = list(generate_tasks(count=50))
    assert first == SAMPLES[:50]
    assert first != list(generate_tasks(seed=1, count=50))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family: str) -> None:
    samples = [sample for sample in SAMPLES if sample.id.startswith(f"{family}-")]
    wordings = Counter[str]()
    for sample in samples:
        prompt, answer = (message.content for message in sample.messages)
        assert answer == ANSWERS[family](prompt), prompt
        wordings[re.sub(r"\d+|[a-z]+, |[A-Z]\w+|" + "|".join(WORDS), "", prompt)[:12]] += 1
    assert len(wordings) >= 2


def test_families_and_levels_take_turns() -> None:
    """Prompts differ, and a level is longer than the one before it."""
    assert len({sample.messages[0].content for sample in SAMPLES}) == len(SAMPLES) == NUM_TASKS
    counts = Counter(sample.id.rsplit("-", 1)[0] for sample in SAMPLES)
    assert counts.keys() == {f"{family}-{level}" for family in FAMILIES for level in LEVELS}
    assert min(counts.values()) > 200  # of the programs of two lines there are few
    for sample in SAMPLES:
        assert sample.domain == f"level-{sample.id.split('-')[1]}"
    for family in FAMILIES:
        lengths = [
            [len(s.messages[0].content) for s in SAMPLES if s.id.startswith(f"{family}-{level}-")]
            for level in LEVELS
        ]
        means = [sum(values) / len(values) for values in lengths]
        assert means == sorted(means)
