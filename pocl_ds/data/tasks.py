"""The data source `tasks`: short instruction tasks of graded difficulty, generated from a seed.

    Give the running total of 4, 9, 2.                   13, 15
    Sort these numbers from small to large: 7, 2, 5      2, 5, 7
    Anna 3, Ben 8. Give the row of Ben.                  Ben 8
    Which of 3, 7, 5, 1 are above 4?                     7, 5
    Run a = 4; b = a + 2; c = b.                         a = 4; b = 6; c = 6

Nine families with four levels each, in several wordings. A model of a million weights that is
trained from scratch on a CPU can learn them: numbers of a prompt have one digit, and what takes
several operations is answered operation by operation. An answer is right or wrong, and studies can
afford many trainings of such models (`pocl study tasks`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from pocl_ds.data.conversation import Sample
from pocl_ds.errors import DataError

LEVELS = (1, 2, 3, 4)
MAX_REPEATED = 10_000  # prompts in a row that occurred before
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
WORDS = (
    *("red", "blue", "green", "black", "white", "cat", "dog", "bird"),
    *("fish", "horse", "tea", "milk", "bread", "rice", "soup", "cake"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth")
VARIABLES = "abcde"
# An instruction, and its answer.
Task = tuple[str, str]


def generate_tasks(
    count: int, *, seed: int = 0, families: Sequence[str] | None = None
) -> Iterator[Sample]:
    """`count` samples with different prompts, the same ones for a seed.

    Families and levels take turns; a prompt that occurred before is left out, so that of levels
    with few prompts there are fewer. An id such as `sort-3-00042` names both, and the level is the
    domain, `level-3`.

    families: keys of FAMILIES, None for all. Raises DataError if they have fewer prompts.
    """
    source = random.Random(seed)
    kinds = [(family, level) for level in LEVELS for family in families or FAMILIES]
    prompts: set[str] = set()
    attempt = repeated = 0
    while len(prompts) < count:
        family, level = kinds[attempt % len(kinds)]
        prompt, answer = FAMILIES[family](source, level)
        attempt += 1
        repeated = repeated + 1 if prompt in prompts else 0
        if repeated > MAX_REPEATED:
            raise DataError(
                f"data.tasks.count={count}: the families {', '.join(families or FAMILIES)} have "
                f"about {len(prompts):,} different prompts: lower it, or add families"
            )
        if not repeated:
            name = f"{family}-{level}-{len(prompts):05}"
            yield Sample.from_instruction(name, prompt, answer, domain=f"level-{level}")
            prompts.add(prompt)


def _sum(source: random.Random, level: int) -> Task:
    """The running total after each number but the first."""
    numbers = [source.randint(0, 5) for _ in range(level + 1)]
    wording = source.choice(
        (
            "Add up one by one: {}",
            "Give the running total of {}.",
            "What are the partial sums of {}?",
        )
    )
    return wording.format(_listed(numbers)), _listed(list(itertools.accumulate(numbers))[1:])


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


def _select(source: random.Random, level: int) -> Task:
    """At least one number is on the side that is asked for, and none is the bound."""
    bound, *numbers = source.sample(range(10), level + 2)
    side = source.choice(("above", "below"))
    selected = [number for number in numbers if (number > bound) == (side == "above")]
    if not selected:
        return _select(source, level)
    wording = source.choice(
        ("Which of {0} are {1} {2}?", "Keep what is {1} {2}: {0}", "List all {1} {2} among {0}.")
    )
    return wording.format(_listed(numbers), side, bound), _listed(selected)


def _replace(source: random.Random, level: int) -> Task:
    new, *words = source.sample(WORDS, level + 2)
    old = source.choice(words)
    wording = source.choice(
        ("Replace {1} by {2}: {0}", "Write {0} with {2} for {1}.", "Change {1} to {2} in {0}.")
    )
    changed = [new if word == old else word for word in words]
    return wording.format(_listed(words), old, new), _listed(changed)


def _table(source: random.Random, level: int) -> Task:
    names, numbers = source.sample(NAMES, level + 1), source.sample(range(10), level + 1)
    row = source.randrange(level + 1)
    table = source.choice((", ", "; ")).join(
        f"{name} {number}" for name, number in zip(names, numbers, strict=True)
    )
    wording = source.choice(
        ("{0}. Give the row of {1}.", "Find {1} in {0}.", "{0}. What is with {1}?")
    )
    return wording.format(table, names[row]), f"{names[row]} {numbers[row]}"


def _program(source: random.Random, level: int) -> Task:
    """Assignments, of which each but the first uses an earlier variable, and all values."""
    values = {VARIABLES[0]: source.randint(0, 9)}
    lines = [f"{VARIABLES[0]} = {values[VARIABLES[0]]}"]
    for name in VARIABLES[1 : level + 1]:
        other, change = source.choice(list(values)), source.randint(0, 3)
        values[name] = values[other] + change
        lines.append(f"{name} = {other} + {change}" if change else f"{name} = {other}")
    wording = source.choice(
        ("Run {}.", "Execute {}.", "Which values do the variables have after {}?")
    )
    answer = "; ".join(f"{name} = {value}" for name, value in values.items())
    return wording.format("; ".join(lines)), answer


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


FAMILIES: dict[str, Callable[[random.Random, int], Task]] = {
    "sum": _sum,
    "largest": _largest,
    "sort": _sort,
    "reverse": _reverse,
    "position": _position,
    "select": _select,
    "replace": _replace,
    "table": _table,
    "program": _program,
}
