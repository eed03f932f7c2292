"""The source `stories` is deterministic, and its answers follow from its stories."""

from __future__ import annotations

import re
from collections import Counter

from pocl_ds.data.stories import MAX_PEOPLE, NUM_STORIES, generate_stories

SENTENCE = re.compile(r"(\w+) lives in (\w+) and likes (\w+)\.")


def test_a_seed_gives_the_same_stories() -> None:
    first = list(generate_stories(count=50))
    assert first == list(generate_stories(count=50))
    assert first != list(generate_stories(seed=1, count=50))
    assert [sample.id for sample in first[:2]] == ["story-00000", "story-00001"]


def test_answers_follow_from_the_story() -> None:
    prompts, people_counts, questions = set[str](), Counter[int](), Counter[str]()
    for sample in generate_stories():
        prompt, answer = (message.content for message in sample.messages)
        story = SENTENCE.findall(prompt)
        home = {name: city for name, city, _ in story} | {city: city for _, city, _ in story}
        taste = {name: food for name, _, food in story} | {food: food for _, _, food in story}
        owner = {word: person[0] for person in story for word in person}
        question = prompt.rpartition(". ")[2]
        verb, facts = ("lives in", home) if "live" in question else ("likes", taste)
        asked = [word for word in re.findall(r"\w+", question) if word in owner]
        clauses = [f"{owner[word]} {verb} {facts[word]}" for word in asked]
        assert answer == " and ".join(clauses) + "."
        prompts.add(prompt)
        people_counts[len(story)] += 1
        questions[f"{question.split()[0]} {len(asked)}"] += 1
    assert len(prompts) == NUM_STORIES and set(people_counts) == {*range(1, MAX_PEOPLE + 1)}
    assert min(people_counts.values()) > NUM_STORIES / MAX_PEOPLE / 2
    assert set(questions) == {"Where 1", "Where 2", "What 1", "What 2", "Who 1"}
