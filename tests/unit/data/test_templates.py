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
from pocl_ds.data.conversation import Sample
from pocl_ds.data.templates import load_template
from pocl_ds.errors import DataError, ModelError, RecipeError

PLAIN = Sample("p", "Add the numbers.", "", ("3",))
WITH_INPUT = Sample("i", "Add the numbers.", "1 and 2", ("3",))
WITH_HISTORY = Sample("h", "And twice that?", "", ("6",), (("user", "1 + 2?"), ("assistant", "3")))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.make_tokenizer(chat=True)


def test_alpaca_template_is_that_of_the_paper(tokenizer: Any) -> None:
    template = load_template("alpaca", tokenizer)
    assert template.render(PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Response:\n"
    )
    assert template.render(WITH_INPUT) == (
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
    text = load_template("alpaca", None).render(Sample("x", instruction, given_input, ("",)))
    assert (
        f"### Instruction:\n{instruction}\n\n### Input:\n{given_input}\n\n### Response:\n" in text
    )


def test_plain_is_instruction_and_input(tokenizer: Any) -> None:
    template = load_template("plain", tokenizer)
    assert (
        template.render(PLAIN) == "Add the numbers."
        and template.render(WITH_INPUT) == "Add the numbers.\n1 and 2"
    )


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_templates_without_turns_refuse_history(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match="sample h has 2 earlier turns.*chat or a .jinja"):
        load_template(name, tokenizer).render(WITH_HISTORY)


def test_chat_uses_the_tokenizers_template(tokenizer: Any) -> None:
    template = load_template("chat", tokenizer)
    assert (
        template.render(WITH_HISTORY)
        == "<user>\n1 + 2?\n<assistant>\n3\n<user>\nAnd twice that?\n<assistant>\n"
    )
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And twice that?"},
    ]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert template.token_ids(WITH_HISTORY) == expected


def test_chat_prompts_do_not_change_with_the_day() -> None:
    """Llama 3.2's templates read today's date; prompts must not change until evaluation."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% "
        "endif %}"
        "Today: {{ date_string }} {{ messages[0]['content'] }}"
    )
    assert load_template("chat", tokenizer).render(PLAIN) == "Today: 26 Jul 2024 Add the numbers."
    tokenizer.chat_template = "Today: {{ strftime_now('%B %d, %Y') }}."  # like Granite's
    assert load_template("chat", tokenizer).render(PLAIN) == "Today: July 26, 2024."


def test_variables_of_a_chat_template() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}quick {% endif %}"
        "{{ date_string }}"
    )
    assert load_template("chat", tokenizer).render(PLAIN) == "26 Jul 2024"
    options = {"enable_thinking": False, "date_string": "1 Jan"}
    assert load_template("chat", tokenizer, options).render(PLAIN) == "quick 1 Jan"
    with pytest.raises(
        ValidationError, match="chat_template_kwargs need template=chat, and the template is alpaca"
    ):
        PromptConfig(chat_template_kwargs=options)


def test_chat_template_error_names_the_sample() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="sample p: the chat template refuses.*no system role"):
        load_template("chat", tokenizer).render(PLAIN)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template: use alpaca"):
        load_template("chat", tiny_models.make_tokenizer())


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
        template = load_template(name, tokenizer)
        assert template.render(WITH_INPUT) == "Q: Add the numbers. (1 and 2)\nA:\n"
        assert template.render(WITH_HISTORY).startswith("user: 1 + 2?\nassistant: 3\nQ: And")

    def test_errors_are_one_sentence(self, tmp_path: Path, tokenizer: Any) -> None:
        with pytest.raises(RecipeError, match="missing.jinja cannot be read"):
            load_template(str(tmp_path / "missing.jinja"), tokenizer)
        with pytest.raises(RecipeError, match="line 2 is not valid Jinja"):
            load_template(self.write(tmp_path, "Q\n{% if %}"), tokenizer)
        with pytest.raises(DataError, match="sample p: .*'question' is undefined.*instruction"):
            load_template(self.write(tmp_path, "{{ question }}"), tokenizer).render(PLAIN)
        with pytest.raises(RecipeError, match="'llama': use alpaca, chat, plain"):
            load_template("llama", tokenizer)

    def test_the_sandbox_holds(self, tmp_path: Path, tokenizer: Any) -> None:
        name = self.write(tmp_path, "{{ instruction.__class__.__mro__ }}")
        with pytest.raises(DataError, match="sample p"):
            load_template(name, tokenizer).render(PLAIN)


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
        without_special_tokens = load_template("plain", tiny_models.make_tokenizer()).token_ids(
            PLAIN
        )
        template = load_template(
            "plain", self.tokenizer_with_template(f"{tiny_models.PAD} $A {tiny_models.EOS}")
        )
        assert template.token_ids(PLAIN) == [1, *without_special_tokens]
        assert template.token_ids_batch([PLAIN, WITH_INPUT]) == [
            template.token_ids(PLAIN),
            template.token_ids(WITH_INPUT),
        ]

    def test_chat_ids_have_only_the_templates_special_tokens(self) -> None:
        tokenizer = self.tokenizer_with_template(f"{tiny_models.PAD} $A {tiny_models.EOS}")
        tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
        ids = load_template("chat", tokenizer).token_ids(PLAIN)
        assert 0 not in ids and 1 not in ids
        assert tokenizer.decode(ids) == "<user>\nAdd the numbers.\n<assistant>\n"


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat"])
def test_batch_of_prompts_equals_single_prompts(tokenizer: Any, name: str) -> None:
    template = load_template(name, tokenizer)
    samples = [PLAIN, WITH_INPUT, PLAIN]
    assert template.token_ids_batch(samples) == [template.token_ids(sample) for sample in samples]
    assert tokenizer.decode(template.token_ids(WITH_INPUT)) == template.render(WITH_INPUT)
