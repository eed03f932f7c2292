"""The source `tasks` is deterministic, and its answers are right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from pocl_ds.config import TasksConfig
from pocl_ds.data.tasks import FAMILIES, LEVELS, WORDS, generate_tasks
from pocl_ds.errors import DataError

NUM_TASKS = TasksConfig().count
SAMPLES = list(generate_tasks(NUM_TASKS))


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def words_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in WORDS]


def answer_sum(prompt: str) -> str:
    first, *others = numbers_in(prompt)
    totals = []
    for number in others:
        first += number
        totals.append(str(first))
    return ", ".join(totals)


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


def answer_select(prompt: str) -> str:
    ((side, bound),) = re.findall(r"(above|below) (\d)", prompt)
    numbers = numbers_in(prompt.replace(f"{side} {bound}", ""))
    is_asked = {"above": int(bound).__lt__, "below": int(bound).__gt__}[side]
    return ", ".join(str(number) for number in numbers if is_asked(number))


def answer_replace(prompt: str) -> str:
    patterns = (
        r"Replace (?P<old>\w+) by (?P<new>\w+): (?P<listed>.*)",
        r"Change (?P<old>\w+) to (?P<new>\w+) in (?P<listed>.*)\.",
        r"Write (?P<listed>.*) with (?P<new>\w+) for (?P<old>\w+)\.",
    )
    (found,) = [match for pattern in patterns if (match := re.fullmatch(pattern, prompt))]
    words = found["listed"].split(", ")
    return ", ".join(found["new"] if word == found["old"] else word for word in words)


def answer_table(prompt: str) -> str:
    rows = dict(re.findall(r"([A-Z][a-z]+) (\d)", prompt))
    (name,) = [name for name in rows if re.search(rf"{name}(?! \d)", prompt)]
    return f"{name} {rows[name]}"


def answer_program(prompt: str) -> str:
    (code,) = re.findall(r"a = .*(?=[.?])", prompt)
    values: dict[str, int] = {}
    exec(code, {}, values)  # noqa: S102
    return "; ".join(f"{name} = {value}" for name, value in values.items())


ANSWERS: dict[str, Callable[[str], str]] = {
    "sum": answer_sum,
    "largest": answer_largest,
    "sort": answer_sort,
    "reverse": answer_reverse,
    "position": answer_position,
    "select": answer_select,
    "replace": answer_replace,
    "table": answer_table,
    "program": answer_program,
}


def test_a_seed_gives_the_same_tasks() -> None:
    first = list(generate_tasks(50))
    assert first == SAMPLES[:50]
    assert first != list(generate_tasks(50, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family: str) -> None:
    samples = [sample for sample in SAMPLES if sample.id.startswith(f"{family}-")]
    wordings = Counter[str]()
    for sample in samples:
        prompt, answer = (message.content for message in sample.messages)
        assert answer == ANSWERS[family](prompt), prompt
        wordings[re.sub(r"\d+|[a-z]+, |[A-Z]\w+|" + "|".join(WORDS), "", prompt)[:12]] += 1
    assert len(wordings) >= 2


def test_too_many_tasks_of_a_family_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl_ds.data.tasks.MAX_REPEATED", 100)
    with pytest.raises(DataError, match=r"count=200000: the families sort have about .* lower it"):
        list(generate_tasks(200_000, families=("sort",)))


def test_families_can_be_chosen() -> None:
    assert TasksConfig().families == tuple(FAMILIES)
    chosen = list(generate_tasks(100, families=("sort", "sum")))
    assert {sample.id.split("-")[0] for sample in chosen} == {"sort", "sum"}


def test_families_and_levels_take_turns() -> None:
    """Prompts differ, and a level is longer than the one before it."""
    assert len({sample.messages[0].content for sample in SAMPLES}) == len(SAMPLES) == NUM_TASKS
    counts = Counter(sample.id.rsplit("-", 1)[0] for sample in SAMPLES)
    assert counts.keys() == {f"{family}-{level}" for family in FAMILIES for level in LEVELS}
    assert min(counts.values()) > 100  # of the programs of two lines there are few
    for sample in SAMPLES:
        assert sample.domain == f"level-{sample.id.split('-')[1]}"
    for family in FAMILIES:
        lengths = [
            [len(s.messages[0].content) for s in SAMPLES if s.id.startswith(f"{family}-{level}-")]
            for level in LEVELS
        ]
        means = [sum(values) / len(values) for values in lengths]
        assert means == sorted(means)
