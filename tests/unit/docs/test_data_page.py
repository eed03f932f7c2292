"""The page about data: its examples are files that the reader reads as the page says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_families import FAMILIES, family_tokenizer
from doc_pages import DOCS, Page

from pocl_ds.config.data import DataConfig
from pocl_ds.config.prompt import PromptConfig
from pocl_ds.data.chat_template import find_end_of_turn
from pocl_ds.data.conversation import Sample
from pocl_ds.data.messages import ROLE_NAMES
from pocl_ds.data.record_formats import RECORD_FORMATS
from pocl_ds.data.sources import read_records, read_samples
from pocl_ds.errors import DataError

EXAMPLES = DOCS / "examples" / "data"
PAGE = Page("docs/data.md", (DOCS / "data.md").read_text(encoding="utf-8"))
# Fields of the recipe that a file needs, as the page gives them.
OPTIONS: dict[str, dict[str, Any]] = {
    "nested.jsonl": {"fields": {"output": "answers.text.0", "id": None}},
    "preferences.jsonl": {"fields": {"output": "chosen"}},
    "roles.jsonl": {"roles": {"narrator": "system", "customer": "user", "clerk": "assistant"}},
}
PRIME = "user: Name a prime. | assistant: 7"
TOOLS = (
    "user: Weather in Oslo? | assistant: [weather] | tool: 3 C, rain | "
    "assistant: It rains at 3 degrees."
)
# What each record becomes: `role: content`, with the names of tool calls, and (-) without a loss.
CONVERSATIONS = {
    "alpaca.jsonl": [
        "user: Classify the sentiment. + I love it. | assistant: positive",
        "user: Name a prime number. | assistant: 7",
        "system: Answer in one word. | user: What is the capital of Peru? | assistant: Lima",
        "user: What is the capital of Peru? | assistant: Lima | user: And of Chile? | "
        "assistant: Santiago",
    ],
    "content_parts.jsonl": [PRIME, PRIME],
    "domains.jsonl": ["user: What is 2 + 2? | assistant: 4"],
    "loss_marks.jsonl": [
        "user: Name a prime. | assistant (-): 8 | user: That is even. | assistant: 7"
    ]
    * 2,
    "messages.jsonl": [f"system: Be brief. | {PRIME} | user: Another one. | assistant: 11"],
    "nested.jsonl": [
        "user: What is the capital of Peru? + Lima is the capital of Peru. | assistant: Lima"
    ],
    "preferences.jsonl": [PRIME],
    "prompt.jsonl": ["user: Name a prime number. | assistant: 7"] * 2,
    "roles.jsonl": ["system: A shop. | user: Is it open? | assistant: Until six."],
    "sharegpt.jsonl": [PRIME, f"system: Be brief. | {PRIME}"],
    "splits.json": [PRIME],
    "table.csv": [
        "user: Classify the sentiment. + I love it. | assistant: positive",
        "user: Name two primes, in order. | assistant: 2, 3",
    ],
    "table.tsv": [PRIME],
    "text.jsonl": ["assistant: The tide comes in twice a day."],
    "thoughts.jsonl": [
        "user: What is 2 + 2? | assistant: <Two and two make four.> It is 4.",
        "user: What is 2 + 2? | assistant: <think>\nTwo and two make four.\n</think>\n\nIt is 4.",
    ],
    "tools.jsonl": [TOOLS, TOOLS],
}


def conversation(sample: Sample) -> str:
    turns = []
    for number, message in enumerate(sample.messages):
        content = message.content
        if message.reasoning_content:
            content = f"<{message.reasoning_content}> {content}"
        if message.tool_calls:
            content = f"[{', '.join(call['function']['name'] for call in message.tool_calls)}]"
        if sample.input and number == len(sample.messages) - 2:
            content += f" + {sample.input}"
        turns.append(f"{message.role}{'' if message.train else ' (-)'}: {content}")
    return " | ".join(turns)


def test_every_example_has_an_expectation() -> None:
    assert {file.name for file in EXAMPLES.iterdir()} == set(CONVERSATIONS)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_example_is_read_as_the_page_says(name: str) -> None:
    samples = list(read_samples(str(EXAMPLES / name), **OPTIONS.get(name, {})))
    assert list(map(conversation, samples)) == CONVERSATIONS[name]
    assert all(len(sample.tools) == (name == "tools.jsonl") for sample in samples)


def test_the_page_shows_the_files() -> None:
    shown = {block.title: block.body for block in PAGE.blocks if block.title}
    assert set(shown) == set(CONVERSATIONS) - {"table.tsv"}
    for name, text in shown.items():
        assert text == (EXAMPLES / name).read_text(encoding="utf-8"), name


def test_references_and_splits() -> None:
    samples = list(read_samples(str(EXAMPLES / "alpaca.jsonl")))
    assert samples[1].references == ("7", "11")
    (test,) = read_records(str(EXAMPLES / "splits.json"), hub_split="test")
    assert test[1]["output"] == "8"


@pytest.mark.parametrize("name", OPTIONS)
def test_without_their_fields_these_examples_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        list(read_samples(str(EXAMPLES / name)))


def test_the_tables_are_complete() -> None:
    for name in (*RECORD_FORMATS, *ROLE_NAMES):
        assert f"`{name}`" in PAGE.text, name
    choices = {
        "data": (DataConfig, ("train_on", "special_tokens_in_text", "decontaminate")),
        "prompt": (PromptConfig, ("overlong", "reasoning", "system_message")),
    }
    for section, (config, fields) in choices.items():
        for field in fields:
            schema = config.model_json_schema()["properties"][field]
            assert f"{section}.{field}" in PAGE.text
            for value in schema["enum"]:
                assert (
                    f"`{value}`" in PAGE.text
                    or f".{field}: {value}`" in PAGE.text
                    or (value == schema["default"])
                ), (field, value)


@pytest.mark.parametrize(
    ("family", "row"),
    [
        ("llama3", "Llama 3 Instruct"),
        ("llama3_base", "Llama 3 base with that template"),
        ("qwen2_5", "Qwen 2.5 and 3, SmolLM2"),
        ("qwen3", "Qwen 2.5 and 3, SmolLM2"),
        ("smollm2", "Qwen 2.5 and 3, SmolLM2"),
        ("qwen2_5_base", "Qwen 2.5 base"),
        ("gemma2", "Gemma 2"),
        ("phi3", "Phi-3"),
    ],
)
def test_the_ends_of_turns(family: str, row: str) -> None:
    end = find_end_of_turn(family_tokenizer(family))
    assert f"- {row}: `{end}` (EOS `{FAMILIES[family].eos}`)" in PAGE.text


def test_the_manifest_has_what_the_page_lists() -> None:
    table = PAGE.text.partition("holds, under `info`:")[2].partition("Beside it")[0]
    source = (DOCS.parent / "pocl_ds" / "data" / "preprocess.py").read_text(encoding="utf-8")
    names = [name for line in table.splitlines() for name in _keys(line)]
    assert len(names) > 6
    for name in names:
        assert json.dumps(name) in source, name


def _keys(line: str) -> list[str]:
    cells = line.split(" | ")
    return [part.strip("| `") for part in cells[0].split(",") if "`" in part]
