"""The data source `stories`: short stories with a question about them, generated from a fixed seed.

    Anna lives in Rome and likes tea. Ben lives in Oslo and likes rice. Where does Ben live?
    Ben lives in Oslo.

The difficulty is graded: one to four people, and a question about one or about two of them. A small
language model masters it after a few steps of fine-tuning, so that a teacher and its students can
be made in minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pocl_ds.data.conversation import Sample

NUM_STORIES = 4000
MAX_PEOPLE = 4
NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry"),
    *("Ivan", "Julia", "Kate", "Leo", "Maria", "Nina", "Oscar", "Peter"),
)
CITIES = (
    *("Rome", "Oslo", "Paris", "Berlin", "Madrid", "Vienna", "London", "Dublin"),
    *("Prague", "Athens", "Lisbon", "Warsaw", "Cairo", "Tokyo", "Boston", "Sydney"),
)
FOODS = (
    *("tea", "rice", "soup", "bread", "cheese", "fish", "coffee", "milk"),
    *("pasta", "salad", "apples", "honey", "beans", "cake", "eggs", "corn"),
)


def generate_stories(*, seed: int = 0, count: int = NUM_STORIES) -> Iterator[Sample]:
    """`count` samples with different prompts, the same ones for a seed. Ids are `story-00000` and
    so on.
    """
    source = random.Random(seed)
    prompts: set[str] = set()
    while len(prompts) < count:
        prompt, answer = _story(source)
        if prompt not in prompts:
            yield Sample.from_instruction(f"story-{len(prompts):05}", prompt, answer)
            prompts.add(prompt)


def _story(source: random.Random) -> tuple[str, str]:
    """A story with its question, and the answer."""
    people = source.randint(1, MAX_PEOPLE)
    names, cities, foods = (source.sample(words, people) for words in (NAMES, CITIES, FOODS))
    story = " ".join(
        f"{name} lives in {city} and likes {food}."
        for name, city, food in zip(names, cities, foods, strict=True)
    )
    person, other = source.randrange(people), source.randrange(people)
    home, taste = (
        f"{names[person]} lives in {cities[person]}",
        f"{names[person]} likes {foods[person]}",
    )
    questions = [
        (f"Where does {names[person]} live?", f"{home}."),
        (f"What does {names[person]} like?", f"{taste}."),
        (f"Who lives in {cities[person]}?", f"{home}."),
        (f"Who likes {foods[person]}?", f"{taste}."),
    ]
    if person != other:
        questions += [
            (
                f"Where do {names[person]} and {names[other]} live?",
                f"{home} and {names[other]} lives in {cities[other]}.",
            ),
            (
                f"What do {names[person]} and {names[other]} like?",
                f"{taste} and {names[other]} likes {foods[other]}.",
            ),
        ]
    question, answer = source.choice(questions)
    return f"{story} {question}", answer
