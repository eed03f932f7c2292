"""The data source `tasks`: short instruction tasks of graded difficulty, generated from a seed.

    What is 4 + 9 + 2?                                   15
    Sort these numbers from small to large: 7, 2, 5      2, 5, 7
    Anna has 3 and Ben has 8. How many has Ben?          8
    a = 4; b = a + 2; c = b. What is c?                  6

Nine families with four levels each, in several wordings. Numbers of a list have one digit, to be
within reach of a model of a million weights that is trained from scratch on a CPU. An answer is
right or wrong, and studies can afford many trainings of such models (`pocl study tasks`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from pocl_ds.data.conversation import Sample

NUM_TASKS = 24_000
LEVELS = (1, 2, 3, 4)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
WORDS = (
    *("red", "blue", "green", "black", "white", "cat", "dog", "bird"),
    *("fish", "horse", "tea", "milk", "bread", "rice", "soup", "cake"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth")
VARIABLES = "abcde"
# An instruction, and its answer.
Task = tuple[str, str]


def generate_tasks(*, seed: int = 0, count: int = NUM_TASKS) -> Iterator[Sample]:
    """`count` samples with different prompts, the same ones for a seed.

    Families and levels take turns. An id such as `sort-3-00042` names both, and the level is the
    domain, `level-3`.
    """
    source = random.Random(seed)
    kinds = [(family, level) for level in LEVELS for family in FAMILIES]
    prompts: set[str] = set()
    attempt = 0
    while len(prompts) < count:
        family, level = kinds[attempt % len(kinds)]
        prompt, answer = FAMILIES[family](source, level)
        attempt += 1
        if prompt not in prompts:
            name = f"{family}-{level}-{len(prompts):05}"
            yield Sample.from_instruction(name, prompt, answer, domain=f"level-{level}")
            prompts.add(prompt)


def _sum(source: random.Random, level: int) -> Task:
    numbers = [source.randint(0, 9) for _ in range(level + 1)]
    text = " + ".join(map(str, numbers))
    wording = source.choice(("What is {}?", "Add up: {}", "Compute {}.", "{} ="))
    return wording.format(text), str(sum(numbers))


def _largest(source: random.Random, level: int) -> Task:
    numbers = source.sample(range(10), level + 1)
    choose, word = source.choice(((max, "largest"), (min, "smallest")))
    wording = source.choice(
        ("What is the {1} number of {0}?", "Find the {1}: {0}", "Which of {0} is the {1}?")
    )
    return wording.format(_listed(numbers), word), str(choose(numbers))


def _sort(source: random.Random, level: int) -> Task:
    numbers = source.sample(range(10), level + 1)
    wording = source.choice(
        ("Sort these numbers from small to large: {}", "Sort {}.", "Put {} in ascending order.")
    )
    return wording.format(_listed(numbers)), _listed(sorted(numbers))


def _reverse(source: random.Random, level: int) -> Task:
    words = source.sample(WORDS, level + 1)
    wording = source.choice(
        ("Reverse: {}", "Write these words backwards: {}", "Read {} in reverse.")
    )
    return wording.format(_listed(words)), _listed(words[::-1])


def _position(source: random.Random, level: int) -> Task:
    words = source.sample(WORDS, level + 1)
    place = source.randrange(len(words))
    wording = source.choice(
        ("What is the {1} word of {0}?", "Give the {1} of these: {0}", "{0}: which one is {1}?")
    )
    return wording.format(_listed(words), ORDINALS[place]), words[place]


def _count(source: random.Random, level: int) -> Task:
    one, two = source.sample(WORDS, 2)
    words = [source.choice((one, two)) for _ in range(2 * level)]
    wording = source.choice(
        ("How often does {1} occur in {0}?", "Count {1}: {0}", "How many times is {1} in {0}?")
    )
    return wording.format(_listed(words), one), str(words.count(one))


def _replace(source: random.Random, level: int) -> Task:
    old, new, *others = source.sample(WORDS, 5)
    words = [source.choice((old, *others)) for _ in range(level + 1)]
    words[source.randrange(level + 1)] = old
    wording = source.choice(
        ("Replace {1} by {2}: {0}", "Write {0} with {2} for each {1}.", "Change {1} to {2} in {0}.")
    )
    changed = [new if word == old else word for word in words]
    return wording.format(_listed(words), old, new), _listed(changed)


def _table(source: random.Random, level: int) -> Task:
    names, numbers = source.sample(NAMES, level + 1), source.sample(range(10), level + 1)
    row = source.randrange(level + 1)
    table = source.choice(
        (
            ", ".join(f"{name} has {n}" for name, n in zip(names, numbers, strict=True)) + ".",
            "; ".join(f"{name}: {n}" for name, n in zip(names, numbers, strict=True)) + ".",
        )
    )
    if source.random() < 0.5:
        wording = source.choice(("How many has {}?", "Which number is next to {}?"))
        return f"{table} {wording.format(names[row])}", str(numbers[row])
    wording = source.choice(("Who has {}?", "Whose number is {}?"))
    return f"{table} {wording.format(numbers[row])}", names[row]


def _program(source: random.Random, level: int) -> Task:
    """Assignments, of which each but the first uses an earlier variable."""
    values = {VARIABLES[0]: source.randint(0, 9)}
    lines = [f"{VARIABLES[0]} = {values[VARIABLES[0]]}"]
    for name in VARIABLES[1 : level + 1]:
        other, change = source.choice(list(values)), source.randint(0, 3)
        values[name] = values[other] + change
        lines.append(f"{name} = {other} + {change}" if change else f"{name} = {other}")
    variable = source.choice(list(values))
    wording = source.choice(("What is {}?", "Print {}.", "Give the value of {}."))
    return f"{'; '.join(lines)}. {wording.format(variable)}", str(values[variable])


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


FAMILIES: dict[str, Callable[[random.Random, int], Task]] = {
    "sum": _sum,
    "largest": _largest,
    "sort": _sort,
    "reverse": _reverse,
    "position": _position,
    "count": _count,
    "replace": _replace,
    "table": _table,
    "program": _program,
}
