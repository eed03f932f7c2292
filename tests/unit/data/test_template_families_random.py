"""Any texts in the chat templates of model families: the ids are those of the whole text, and each
answer trains alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from chat_families import FAMILIES
from family_samples import (
    CALL,
    OTHER_ANSWERS,
    TOOLS,
    assert_template_ids,
    cached_tokenizer,
    tokenize,
    trained_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.text_encoding import special_tokens

# What each family writes for an answer. Templates that trim a content have `trimmed`.
WRITTEN = {
    "llama2": " {trimmed} </s>",
    "llama3": "{trimmed}<|eot_id|>",
    "llama3_base": "{trimmed}<|eot_id|>",
    "llama3_1": "{trimmed}<|eot_id|>",
    "qwen2_5": "{content}<|im_end|>",
    "qwen2_5_base": "{content}<|im_end|>",
    "qwen3": "{content}<|im_end|>",
    "gemma2": "{trimmed}<end_of_turn>",
    "phi3": "{content}<|end|>",
    "phi4": "{content}<|im_end|>",
    "mistral": " {trimmed}</s>",
    "deepseek_r1_distill": "{content}<｜end▁of▁sentence｜>",
    "smollm2": "{content}<|im_end|>",
    "smollm3": "{content}<|im_end|>",
    "generation_blocks": "{content}<|im_end|>",
    "chatml": "{content}<|im_end|>",
    "harmony": "<|channel|>final<|message|>{content}<|end|>",
    "zephyr": "{content}</s>",
    "vicuna": " {trimmed}</s>",
    "text_only": "{content}",
}
NAMES = sorted({text for family in FAMILIES.values() for text in (*family.special, family.eos)})
# A SentencePiece tokenizer reads U+2581 as a space. Private planes stand for escaped texts.
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs", "Cc", "Co"), exclude_characters="\u2581"),
        st.sampled_from(" \n.:it"),
    ),
    min_size=1,
    max_size=16,
).filter(lambda text: text.strip() and not any(name in text for name in NAMES))


def written(family: str, content: str, *, last: bool) -> str:
    text = WRITTEN[family].format(content=content, trimmed=content.strip())
    if last and family == "text_only":
        text += "<|endoftext|>"
    if last and family == "harmony":
        text = f"{text.removesuffix('<|end|>')}<|return|>"
    if last and family == "qwen3":
        text = f"<think>\n\n</think>\n\n{text.lstrip(chr(10))}"
    if last and family == "deepseek_r1_distill":
        text = f"</think>\n\n{text.lstrip(chr(10))}"
    if not last and family == "smollm3":
        text = f"<|im_start|>assistant\n{text}"
    return text


def visible(text: str) -> str:
    """A text without the white space that tokens share with the text around a turn."""
    return "".join(text.split())


@given(st.sampled_from(sorted(FAMILIES)), st.lists(TEXT, min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_texts(family: str, texts: list[str]) -> None:
    texts = texts[: len(texts) // 2 * 2]
    roles = ("user", "assistant")
    result = tokenize(family, tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)))
    assert result.sample.ids[: result.sample.prompt_tokens] == result.prompt
    if family not in OTHER_ANSWERS and not result.counts["boundary_split"]:
        assert_template_ids(result)
    answers = texts[1::2]
    expected = [
        written(family, text, last=number == len(answers) - 1)
        for number, text in enumerate(answers)
    ]
    assert list(map(visible, result.trained)) == list(map(visible, expected))
    assert not result.counts["altered_text"]


@given(
    st.sampled_from(["llama3_1", "qwen2_5", "qwen3", "mistral"]),
    TEXT,
    st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none(), st.lists(TEXT))),
)
@settings(max_examples=40, deadline=None)
def test_any_tool_results_and_arguments(family: str, text: str, arguments: dict[str, Any]) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = (
        Message("user", text),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", text, name="weather", tool_call_id="call00001"),
        Message("assistant", "It rains."),
        Message("user", text),
        Message("assistant", text),
    )
    result = tokenize(family, messages, TOOLS)
    if not result.counts["boundary_split"]:
        assert_template_ids(result)
    assert len(result.trained) == 3 and "It rains." in result.trained[1]
    first = cached_tokenizer(family).decode(result.sample.ids).index(result.trained[0].strip())
    assert "weather" in result.trained[0] and first > 0
    assert visible(text) in visible(result.trained[2])


@given(st.sampled_from(sorted(FAMILIES)), st.lists(TEXT, max_size=4), st.integers(20, 120))
@settings(max_examples=100, deadline=None)
def test_a_prompt_that_is_cut_keeps_its_question_and_the_templates_end(
    family: str, texts: list[str], limit: int
) -> None:
    question, answer = Message("user", "Which one of the two?"), Message("assistant", "This one.")
    roles = ("user", "assistant")
    early = [Message(roles[i % 2], text * 3) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    system = [] if family == "gemma2" else [Message("system", "Be brief. " * 8)]
    sample = Sample("s", (*system, *early, question, answer))
    tokenizer = cached_tokenizer(family)
    config = PromptConfig(template="chat", max_prompt_tokens=limit, max_length=limit + 100)
    samples = SampleTokenizer(tokenizer, config)
    (tokenized,) = samples.tokenize_many([sample])
    if tokenized is None:
        assert samples.counts["overlong_dropped"] == 1
        return
    complete = tokenize(family, sample.messages)
    size = complete.sample.prompt_tokens
    if size <= limit:
        assert tokenized.ids == complete.sample.ids
        return
    prompt = tokenized.ids[: tokenized.prompt_tokens]
    shown = visible(tokenizer.decode(complete.prompt))
    end = shown[shown.rindex(visible(question.content)) :]
    assert len(prompt) <= limit and tokenized.truncated
    assert visible(tokenizer.decode(prompt)).endswith(end)
    assert trained_texts(tokenizer, tokenized)[-1] == complete.trained[-1]
    assert samples.counts["history_truncated"] or samples.counts["text_truncated"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_special_tokens_in_texts_can_be_escaped(family: str) -> None:
    tokenizer = cached_tokenizer(family)
    names = [name for name in special_tokens(tokenizer) if name != "<unk>"]
    config = PromptConfig(template="chat", max_prompt_tokens=4000, max_length=8000)
    counts = {}
    for text in (f"a {' b '.join(names)} c", "a b c"):
        messages = (
            Message("user", text),
            Message("assistant", text),
            Message("user", text),
            Message("assistant", text),
        )
        samples = SampleTokenizer(tokenizer, config, special_tokens_in_text="escape")
        tokenized = samples.tokenize(Sample("s", messages))
        special = set(tokenizer.convert_tokens_to_ids(names))
        counts[text] = [token for token in tokenized.ids if token in special]
        trained = trained_texts(tokenizer, tokenized)
        assert len(trained) == 2 and all(visible(text) in visible(part) for part in trained)
        assert samples.counts["special_tokens_in_text"] == (text != "a b c")
        assert not samples.counts["altered_text"]
    first, second = counts.values()
    assert first == second


@pytest.mark.parametrize("family", ["llama3_1", "qwen2_5", "qwen3", "mistral"])
def test_special_tokens_in_tools_and_calls_can_be_escaped(family: str) -> None:
    tokenizer = cached_tokenizer(family)
    names = special_tokens(tokenizer)
    config = PromptConfig(template="chat", max_prompt_tokens=4000, max_length=8000)
    counts = []
    for text in ("a", " ".join(names)):
        function = {"name": "weather", "arguments": {"city": [text], text: 1}}
        messages = (
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=({**CALL, "function": function},)),
        )
        tool = {"type": "function", "function": {"name": "weather", "description": text}}
        samples = SampleTokenizer(tokenizer, config, special_tokens_in_text="escape")
        tokenized = samples.tokenize(Sample("s", messages, tools=(tool,)))
        special = set(tokenizer.convert_tokens_to_ids(names))
        counts.append([token for token in tokenized.ids if token in special])
        (trained,) = trained_texts(tokenizer, tokenized)
        assert trained.count(text) >= 2 and samples.counts["special_tokens_in_text"] == (
            text != "a"
        )
    assert counts[0] == counts[1]
