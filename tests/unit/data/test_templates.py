"""Prompt templates: the exact Alpaca text, chat templates, .jinja files, and no extra EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import processors

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.rendered import PromptTemplate
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.templates import load_template
from pocl_ds.errors import DataError, ModelError, RecipeError

CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PLAIN = Sample.from_instruction("p", "Add the numbers.", "3")
WITH_INPUT = Sample.from_instruction("i", "Add the numbers.", "3", input="1 and 2")
WITH_HISTORY = Sample(
    "h",
    (
        Message("user", "1 + 2?"),
        Message("assistant", "3"),
        Message("user", "And twice that?"),
        Message("assistant", "6"),
    ),
)


def load(name: str, tokenizer: Any, **options: Any) -> PromptTemplate:
    return load_template(tokenizer, PromptConfig(template=name, **options))


def prompt_ids(tokenizer: Any, name: str, sample: Sample) -> list[int]:
    return SampleTokenizer(tokenizer, PromptConfig(template=name)).tokenize_prompt(sample)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.make_tokenizer(chat=True)


def test_alpaca_template_is_that_of_the_paper(tokenizer: Any) -> None:
    template = load("alpaca", tokenizer)
    assert template.render_prompt(PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Response:\n"
    )
    assert template.render_prompt(WITH_INPUT) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response "
        "that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


@given(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
)
def test_braces_in_the_data_are_not_interpreted(instruction: str, given_input: str) -> None:
    text = load("alpaca", None).render_prompt(
        Sample.from_instruction("x", instruction, "", input=given_input)
    )
    assert (
        f"### Instruction:\n{instruction}\n\n### Input:\n{given_input}\n\n### Response:\n" in text
    )


def test_plain_is_instruction_and_input(tokenizer: Any) -> None:
    template = load("plain", tokenizer)
    assert (
        template.render_prompt(PLAIN) == "Add the numbers."
        and template.render_prompt(WITH_INPUT) == "Add the numbers.\n1 and 2"
    )


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_templates_without_turns_refuse_history(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match="sample h has 2 earlier turns.*chat or a .jinja"):
        load(name, tokenizer).render_prompt(WITH_HISTORY)


def test_chat_uses_the_tokenizers_template(tokenizer: Any) -> None:
    template = load("chat", tokenizer)
    assert (
        template.render_prompt(WITH_HISTORY)
        == "<user>\n1 + 2?\n<assistant>\n3\n<user>\nAnd twice that?\n<assistant>\n"
    )
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And twice that?"},
    ]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, "chat", WITH_HISTORY) == expected


def test_chat_prompts_do_not_change_with_the_day() -> None:
    """Llama 3.2's templates read today's date; prompts must not change until evaluation."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% "
        "endif %}"
        "Today: {{ date_string }} " + CONTENTS
    )
    assert load("chat", tokenizer).render_prompt(PLAIN) == "Today: 26 Jul 2024 Add the numbers."
    tokenizer.chat_template = (
        "Today: {{ strftime_now('%B %d, %Y') }}. " + CONTENTS
    )  # like Granite's
    assert load("chat", tokenizer).render_prompt(PLAIN) == "Today: July 26, 2024. Add the numbers."


def test_variables_of_a_chat_template() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}quick {% endif %}"
        "{{ date_string }} " + CONTENTS
    )
    assert load("chat", tokenizer).render_prompt(PLAIN) == "26 Jul 2024 Add the numbers."
    options = {"enable_thinking": False, "date_string": "1 Jan"}
    assert (
        load("chat", tokenizer, chat_template_kwargs=options).render_prompt(PLAIN)
        == "quick 1 Jan Add the numbers."
    )
    with pytest.raises(
        ValidationError, match="chat_template_kwargs need template=chat, and the template is alpaca"
    ):
        PromptConfig(chat_template_kwargs=options)


def test_chat_template_error_names_the_sample() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="sample p: the chat template refuses.*no system role"):
        load("chat", tokenizer).render_prompt(PLAIN)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template: use alpaca"):
        load("chat", tiny_models.make_tokenizer())


class TestJinja:
    def write(self, folder: Path, text: str) -> str:
        path = folder / "own.jinja"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def test_renders_a_jinja_file(self, tmp_path: Path, tokenizer: Any) -> None:
        name = self.write(
            tmp_path,
            "{% for turn in history %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
            "Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA:\n",
        )
        template = load(name, tokenizer)
        assert template.render_prompt(WITH_INPUT) == "Q: Add the numbers. (1 and 2)\nA:\n"
        assert template.render_prompt(WITH_HISTORY).startswith("user: 1 + 2?\nassistant: 3\nQ: And")

    def test_errors_are_one_sentence(self, tmp_path: Path, tokenizer: Any) -> None:
        with pytest.raises(RecipeError, match="missing.jinja cannot be read"):
            load(str(tmp_path / "missing.jinja"), tokenizer)
        with pytest.raises(RecipeError, match="line 2 is not valid Jinja"):
            load(self.write(tmp_path, "Q\n{% if %}"), tokenizer)
        with pytest.raises(DataError, match="sample p: .*'question' is undefined.*instruction"):
            load(self.write(tmp_path, "{{ question }}"), tokenizer).render_prompt(PLAIN)
        with pytest.raises(RecipeError, match="'llama': use alpaca, chat, plain"):
            load("llama", tokenizer)

    def test_the_sandbox_holds(self, tmp_path: Path, tokenizer: Any) -> None:
        name = self.write(tmp_path, "{{ instruction.__class__.__mro__ }}")
        with pytest.raises(DataError, match="sample p"):
            load(name, tokenizer).render_prompt(PLAIN)


class TestSpecialTokens:
    def tokenizer_with_template(self, single: str) -> Any:
        tokenizer = tiny_models.make_tokenizer()
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            special_tokens=[
                (tiny_models.EOS, tokenizer.eos_token_id),
                (tiny_models.PAD, tokenizer.pad_token_id),
            ],
        )
        return tokenizer

    def test_tokenizers_bos_is_kept_and_its_eos_removed(self) -> None:
        bare = prompt_ids(tiny_models.make_tokenizer(), "plain", PLAIN)
        tokenizer = self.tokenizer_with_template(f"{tiny_models.PAD} $A {tiny_models.EOS}")
        assert prompt_ids(tokenizer, "plain", PLAIN) == [1, *bare]

    def test_chat_ids_have_only_the_templates_special_tokens(self) -> None:
        tokenizer = self.tokenizer_with_template(f"{tiny_models.PAD} $A {tiny_models.EOS}")
        tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
        ids = prompt_ids(tokenizer, "chat", PLAIN)
        assert 0 not in ids and 1 not in ids
        assert tokenizer.decode(ids) == "<user>\nAdd the numbers.\n<assistant>\n"


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat"])
def test_prompt_ids_decode_to_the_prompt(tokenizer: Any, name: str) -> None:
    ids = prompt_ids(tokenizer, name, WITH_INPUT)
    assert tokenizer.decode(ids) == load(name, tokenizer).render_prompt(WITH_INPUT)


class TestTextTemplates:
    """What `alpaca`, `plain` and .jinja files cannot show is refused, or has a setting."""

    def test_system_text(self, tokenizer: Any) -> None:
        sample = Sample(
            "s", (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Yes"))
        )
        with pytest.raises(DataError, match="sample s has a system text.*first_user_turn or drop"):
            load("alpaca", tokenizer).render_prompt(sample)
        folded = load("plain", tokenizer, system_message="first_user_turn")
        assert folded.render_prompt(sample) == "Be kind.\n\nHi"
        assert load("plain", tokenizer, system_message="drop").render_prompt(sample) == "Hi"

    def test_tools_and_tool_calls(self, tokenizer: Any) -> None:
        tool = {"type": "function", "function": {"name": "add"}}
        sample = Sample.from_instruction("t", "Add", "3", tools=(tool,))
        with pytest.raises(DataError, match="sample t has tools.*data.fields.tools=null"):
            load("alpaca", tokenizer).render(sample)
        call = Message("assistant", "", tool_calls=({"function": {"name": "add"}},))
        with pytest.raises(DataError, match="sample c: its response is a tool call"):
            load("alpaca", tokenizer).render(Sample("c", (Message("user", "Add"), call)))

    def test_thoughts(self, tokenizer: Any) -> None:
        response = Message("assistant", "4", reasoning_content="2 + 2")
        sample = Sample("r", (Message("user", "Add"), response))
        with pytest.raises(DataError, match="sample r: .*has no place for reasoning_content"):
            load("plain", tokenizer).render(sample)
        inline = load("plain", tokenizer, reasoning="inline").render(sample)
        assert inline.text == "Add<think>\n2 + 2\n</think>\n\n4"
        assert load("plain", tokenizer, reasoning="drop").render(sample).text == "Add4"

    def test_a_written_thought_is_part_of_the_text(self, tokenizer: Any) -> None:
        sample = Sample.from_instruction("w", "Add", "<think>2 + 2</think>4")
        assert load("plain", tokenizer).render(sample).text == "Add<think>2 + 2</think>4"

    def test_bos_of_a_jinja_file_is_not_doubled(self, tmp_path: Path) -> None:
        tokenizer = tiny_models.make_sentencepiece_tokenizer()
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        for text in ("<s>[INST] {{ instruction }} [/INST]", "{{ bos_token }}Q {{ instruction }}"):
            path = tmp_path / "llama2.jinja"
            path.write_text(text, encoding="utf-8")
            assert prompt_ids(tokenizer, str(path), PLAIN).count(1) == 1
        assert prompt_ids(tokenizer, "plain", PLAIN).count(1) == 1
