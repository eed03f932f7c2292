"""Conversations in a chat template's own text: what trains, and what is refused.

tests/unit/data/test_template_families.py compares the templates of model families.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import PromptConfig
from pocl_ds.data.chat_template import ChatTemplate, find_end_of_turn
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.errors import DataError, ModelError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSES_THOUGHT = CHATML.replace(
    "assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"
)
BLOCKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
QUESTION = Message("user", "2 + 2?")
THREE_TURNS = (
    Message("system", "You add."),
    Message("user", "3 + 4?"),
    Message("assistant", "Seven."),
    Message("user", "And 6 more?"),
    Message("assistant", "Thirteen."),
    Message("user", "And 6 more?"),
    Message("assistant", "Nineteen."),
)


@functools.cache
def chat_tokenizer(template: str = CHATML) -> Any:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def render(sample: Sample, template: str = CHATML, **options: Any) -> tuple[str, list[str]]:
    """The prompt's text, and the texts that train."""
    rendered = ChatTemplate(chat_tokenizer(template), {}, **options).render(sample)
    parts = [rendered.text[start:end] for start, end in rendered.trained]
    return rendered.text[: rendered.prompt_length], parts


def test_every_assistant_turn_trains_through_its_end() -> None:
    prompt, trained = render(Sample("s", THREE_TURNS))
    assert trained == ["Seven.<|im_end|>", "Thirteen.<|im_end|>", "Nineteen.<|im_end|>"]
    assert prompt.endswith("<|im_start|>user\nAnd 6 more?<|im_end|>\n<|im_start|>assistant\n")
    first = (replace(THREE_TURNS[2], train=False), *THREE_TURNS[3:])
    assert render(Sample("s", (*THREE_TURNS[:2], *first)))[1] == trained[1:]


def test_generation_blocks_of_the_template_train() -> None:
    sample = Sample("s", THREE_TURNS)
    assert render(sample, BLOCKS) == render(sample)
    tokenizer = chat_tokenizer(BLOCKS)
    tokenized = SampleTokenizer(tokenizer, PromptConfig(template="chat")).tokenize(sample)
    expected = tokenizer.apply_chat_template(
        [message.to_template() for message in THREE_TURNS],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    count = len(tokenized.ids)
    assert tokenized.ids == expected["input_ids"][:count]
    assert tokenized.loss_mask.tolist() == list(map(bool, expected["assistant_masks"][:count]))
    assert not any(expected["assistant_masks"][count:])


class TestThoughts:
    """A thought is neither doubled nor lost."""

    INLINE = Message("assistant", "<think>\nTwo and two.\n</think>\n\nIt is 4.")
    SEPARATE = Message("assistant", "It is 4.", reasoning_content="Two and two.")

    @pytest.mark.parametrize("response", [INLINE, SEPARATE])
    def test_a_template_that_opens_the_thought(self, response: Message) -> None:
        prompt, trained = render(Sample("s", (QUESTION, response)), OPENS_THOUGHT)
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        assert trained == ["Two and two.\n</think>\n\nIt is 4.<|im_end|>"]

    def test_an_empty_thought_is_added_and_counted(self) -> None:
        sample = Sample("s", (QUESTION, Message("assistant", "It is 4.")))
        assert render(sample, OPENS_THOUGHT)[1] == ["\n</think>\n\nIt is 4.<|im_end|>"]
        tokenizer = SampleTokenizer(chat_tokenizer(OPENS_THOUGHT), PromptConfig(template="chat"))
        tokenizer.tokenize(sample)
        assert tokenizer.counts["empty_thought"] == 1

    @pytest.mark.parametrize("response", [INLINE, SEPARATE])
    def test_a_thought_after_a_closed_one_is_refused(self, response: Message) -> None:
        sample = Sample("s", (QUESTION, response), place="x.jsonl line 3")
        with pytest.raises(DataError, match=r"sample s \(x.jsonl line 3\): .*closes already"):
            render(sample, CLOSES_THOUGHT)
        prompt, trained = render(sample, CLOSES_THOUGHT, reasoning="drop")
        assert prompt.endswith("</think>\n\n") and trained == ["It is 4.<|im_end|>"]

    def test_a_template_without_thoughts(self) -> None:
        assert render(Sample("s", (QUESTION, self.INLINE)))[1] == [
            "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"
        ]
        separate = Sample("s", (QUESTION, self.SEPARATE))
        with pytest.raises(DataError, match="leaves out the reasoning_content.*reasoning=inline"):
            render(separate)
        assert render(separate, reasoning="inline") == render(Sample("s", (QUESTION, self.INLINE)))
        assert render(separate, reasoning="drop")[1] == ["It is 4.<|im_end|>"]

    def test_a_models_own_response_is_not_changed(self) -> None:
        sample = Sample("s", THREE_TURNS).with_response("Two and two.\n</think>\n\n4")
        assert render(sample, OPENS_THOUGHT)[1] == ["Two and two.\n</think>\n\n4<|im_end|>"]
        cut = Sample("s", THREE_TURNS).with_response("Two and", ended=False)
        assert render(cut, OPENS_THOUGHT)[1] == ["Two and"]


class TestRoles:
    def test_a_refused_system_role_names_line_and_remedy(self) -> None:
        sample = Sample("s", THREE_TURNS, place="x.jsonl line 6")
        with pytest.raises(
            DataError,
            match=r"sample s \(x.jsonl line 6\): the chat template refuses its messages \(System "
            r"role not supported\): set prompt.system_message=first_user_turn",
        ):
            render(sample, REFUSES_SYSTEM)
        folded = render(sample, REFUSES_SYSTEM, system_message="first_user_turn")[0]
        assert folded.startswith("<|im_start|>user\nYou add.\n\n3 + 4?<|im_end|>")
        dropped = render(sample, REFUSES_SYSTEM, system_message="drop")[0]
        assert dropped.startswith("<|im_start|>user\n3 + 4?<|im_end|>")

    def test_a_developer_role_that_the_template_drops_becomes_system(self) -> None:
        sample = Sample(
            "s", (Message("developer", "Be kind."), QUESTION, Message("assistant", "4"))
        )
        assert render(sample)[0].startswith("<|im_start|>developer\nBe kind.")
        known = CHATML.replace(
            "{% for message in messages %}",
            "{% for message in messages if message['role'] in ['system', 'user', 'assistant'] %}",
        )
        assert render(sample, known)[0].startswith("<|im_start|>system\nBe kind.")

    def test_a_turn_that_the_template_leaves_out_is_refused(self) -> None:
        known = CHATML.replace(
            "{% for message in messages %}",
            "{% for message in messages if message['role'] in ['user', 'assistant'] %}",
        )
        with pytest.raises(DataError, match=r"leaves out the text of turn 1 \(system\)"):
            render(Sample("s", THREE_TURNS), known)

    def test_tools_need_a_template_that_shows_them(self) -> None:
        sample = Sample.from_instruction("s", "Hi", "Yes", tools=({"function": {"name": "add"}},))
        with pytest.raises(DataError, match="does not show tools.*data.fields.tools=null"):
            render(sample)
        call = ({"type": "function", "function": {"name": "add", "arguments": {}}},)
        calls = Sample(
            "s", (QUESTION, Message("assistant", "", tool_calls=call), QUESTION, THREE_TURNS[2])
        )
        with pytest.raises(DataError, match="leaves out the tool call 'add' of turn 2"):
            render(calls)


class TestEndOfTurn:
    def test_it_is_the_templates(self) -> None:
        assert find_end_of_turn(chat_tokenizer()) == "<|im_end|>"
        tokenizer = SampleTokenizer(chat_tokenizer(), PromptConfig(template="chat"))
        assert tokenizer.end_of_turn_ids == [tokenizer.tokenizer.vocab["<|im_end|>"], 0]
        plain = SampleTokenizer(chat_tokenizer(), PromptConfig(template="plain"))
        assert plain.end_of_turn_ids == [0]

    def test_eos_ends_a_turn_without_a_special_token(self) -> None:
        tokenizer = tiny_models.make_tokenizer(chat=True)
        assert find_end_of_turn(tokenizer) is None
        sample = Sample("s", THREE_TURNS[1:])
        tokenized = SampleTokenizer(tokenizer, PromptConfig(template="chat")).tokenize(sample)
        assert tokenized.ids[-1] == 0
        trained = tokenizer.decode(
            [
                token
                for token, trains in zip(tokenized.ids, tokenized.loss_mask, strict=True)
                if trains
            ]
        )
        assert trained == "Seven.Thirteen.Nineteen.<|endoftext|>"

    def test_another_special_token_may_end_a_tool_call(self) -> None:
        template = CHATML.replace(
            "{{ message['content'] }}<|im_end|>",
            "{% if message.tool_calls %}{{ message.tool_calls | tojson }}<|call|>"
            "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
        )
        tokenizer = chat_tokenizer(template)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|call|>"]}
        )
        call = ({"type": "function", "function": {"name": "add", "arguments": {"x": 1}}},)
        sample = Sample("s", (QUESTION, Message("assistant", "", tool_calls=call)))
        rendered = ChatTemplate(tokenizer, {}).render(sample)
        start, end = rendered.trained[-1]
        assert rendered.text[start:end].startswith("[{") and rendered.text.endswith("}]<|call|>")

    def test_a_template_without_answers_is_refused(self) -> None:
        tokenizer = chat_tokenizer("{{ messages[0]['content'] }}")
        with pytest.raises(ModelError, match="leaves out the assistant's answer"):
            ChatTemplate(tokenizer, {})
        assert find_end_of_turn(tokenizer) is None


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text and "<" not in text and "[" not in text
)


@given(st.lists(TEXT, min_size=2, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_text_is_that_of_the_template(texts: list[str], blocks: bool) -> None:
    """Of any texts, the conversation's ids are the template's, and each answer trains alone."""
    texts = texts[: len(texts) // 2 * 2]
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    tokenizer = chat_tokenizer(BLOCKS if blocks else CHATML)
    config = PromptConfig(template="chat", max_prompt_tokens=4000, max_length=8000)
    tokenized = SampleTokenizer(tokenizer, config).tokenize(Sample("s", messages))
    trees = [message.to_template() for message in messages]
    expected = tokenizer.apply_chat_template(trees, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        trees[:-1], add_generation_prompt=True, return_dict=False
    )
    assert tokenized.ids == expected[: len(tokenized.ids)]
    assert tokenizer.decode(expected[len(tokenized.ids) :]) == "\n"
    assert tokenized.ids[: tokenized.prompt_tokens] == prompt
    trained = [t for t, trains in zip(tokenized.ids, tokenized.loss_mask, strict=True) if trains]
    assert tokenizer.decode(trained) == "".join(f"{text}<|im_end|>" for text in texts[1::2])
