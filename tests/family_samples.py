"""Conversations in the chat templates of model families, and their tokens beside those that
transformers gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
from chat_families import family_tokenizer

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer, TokenizedSample

DATE = {"date_string": "26 Jul 2024", "strftime_now": datetime(2024, 7, 26).strftime}
SYSTEM = Message("system", "Be brief.")
TWO_TURNS = (
    Message("user", "Say 0."),
    Message("assistant", "It is 0."),
    Message("user", "Say 1."),
    Message("assistant", "It is 1."),
)
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "weather", "arguments": {"city": "Rome"}},
}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
WITH_TOOLS = (
    Message("user", "Weather in Rome?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "3 C, rain", name="weather", tool_call_id="call00001"),
    Message("assistant", "It rains."),
    Message("user", "And what shall I wear?"),
    Message("assistant", "A coat."),
)
INLINE_THOUGHTS = tuple(
    replace(turn, content=f"<think>\nI count {number}.\n</think>\n\n{turn.content}")
    if turn.role == "assistant"
    else turn
    for number, turn in zip((0, 0, 1, 1), TWO_TURNS, strict=True)
)
SEPARATE_THOUGHTS = tuple(
    replace(turn, reasoning_content=f"I count {number}.") if turn.role == "assistant" else turn
    for number, turn in zip((0, 0, 1, 1), TWO_TURNS, strict=True)
)
# The text of an answer that the template renders does not continue its prompt, or has no end.
OTHER_ANSWERS = ("deepseek_r1_distill", "text_only")


@dataclass(frozen=True)
class Result:
    """A sample's tokens beside what transformers makes of its messages."""

    tokenizer: Any
    sample: TokenizedSample
    trained: list[str]  # the text of each run of tokens that train
    complete: list[int]  # ids of the whole conversation
    prompt: list[int]  # ids of the messages before the last, with the generation prompt
    counts: dict[str, int]


def tokenize(
    family: str,
    messages: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...] = (),
    variables: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    tokenizer = cached_tokenizer(family)
    variables = variables or {}
    config = PromptConfig(
        template="chat",
        max_prompt_tokens=4000,
        max_length=5000,
        chat_template_kwargs=variables,
        **options,
    )
    samples = SampleTokenizer(tokenizer, config)
    sample = Sample("s", messages, tools=tools, place="x.jsonl line 1")
    tokenized = samples.tokenize(sample)
    assert samples.tokenize_prompt(sample) == tokenized.ids[: tokenized.prompt_tokens]
    trees = [message.to_template() for message in messages]
    if family == "deepseek_r1_distill":  # needs the arguments of a call as text
        for tree in trees:
            for call in tree.get("tool_calls", ()):
                function = {"name": "weather", "arguments": '{"city": "Rome"}'}
                tree["tool_calls"] = [{**call, "function": function}]
    render = {"tools": list(tools) or None, "return_dict": False, **DATE, **variables}
    return Result(
        tokenizer,
        tokenized,
        trained_texts(tokenizer, tokenized),
        tokenizer.apply_chat_template(trees, **render),
        tokenizer.apply_chat_template(trees[:-1], add_generation_prompt=True, **render),
        samples.counts,
    )


@cache
def cached_tokenizer(family: str) -> Any:
    """The tokenizer of a family, which callers must not change."""
    return family_tokenizer(family)


def trained_texts(tokenizer: Any, sample: TokenizedSample) -> list[str]:
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]  # keeps a space after it
    edges = np.flatnonzero(np.diff([0, *sample.loss_mask.astype(int), 0]))
    runs = [sample.ids[start:stop] for start, stop in edges.reshape(-1, 2)]
    return [tokenizer.decode([*lead, *run])[len(tokenizer.decode(lead)) :] for run in runs]


def assert_template_ids(result: Result) -> None:
    """The ids are the template's through the last token that trains."""
    ids = result.sample.ids
    assert ids == result.complete[: len(ids)]
    assert ids[: result.sample.prompt_tokens] == result.prompt
    assert result.sample.loss_mask[-1]
