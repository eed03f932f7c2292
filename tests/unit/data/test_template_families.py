"""Conversations in the chat templates of model families, against transformers' own rendering.

What trains is written out by hand for each family.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_families import FAMILIES, family_tokenizer
from family_samples import (
    CALL,
    DATE,
    INLINE_THOUGHTS,
    OTHER_ANSWERS,
    SEPARATE_THOUGHTS,
    SYSTEM,
    TOOLS,
    TWO_TURNS,
    WITH_TOOLS,
    assert_template_ids,
    tokenize,
    trained_texts,
)

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.errors import DataError
from pocl_ds.models.load import load_tokenizer

# The answers of TWO_TURNS as each family writes them, from the prompt to the end of the turn.
ANSWERS = {
    "llama2": [" It is 0. </s>", " It is 1. </s>"],
    "llama3": ["It is 0.<|eot_id|>", "It is 1.<|eot_id|>"],
    "llama3_base": ["It is 0.<|eot_id|>", "It is 1.<|eot_id|>"],
    "llama3_1": ["It is 0.<|eot_id|>", "It is 1.<|eot_id|>"],
    "qwen2_5": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "qwen2_5_base": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "qwen3": ["It is 0.<|im_end|>", "<think>\n\n</think>\n\nIt is 1.<|im_end|>"],
    "gemma2": ["It is 0.<end_of_turn>", "It is 1.<end_of_turn>"],
    "phi3": [" It is 0.<|end|>", " It is 1.<|end|>"],  # its tokens write a space before a text
    "phi4": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "mistral": [" It is 0.</s>", " It is 1.</s>"],
    "deepseek_r1_distill": [
        "It is 0.<｜end▁of▁sentence｜>",
        "\n</think>\n\nIt is 1.<｜end▁of▁sentence｜>",
    ],
    "smollm2": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "smollm3": ["<|im_start|>assistant\nIt is 0.<|im_end|>\n", "It is 1.<|im_end|>"],
    "generation_blocks": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "chatml": ["It is 0.<|im_end|>", "It is 1.<|im_end|>"],
    "harmony": [
        "<|channel|>final<|message|>It is 0.<|end|>",
        "<|channel|>final<|message|>It is 1.<|return|>",
    ],
    "zephyr": ["It is 0.</s>", "It is 1.</s>"],
    "vicuna": [" It is 0.</s>", " It is 1.</s>"],
    "text_only": ["It is 0.\n\n", "It is 1.<|endoftext|>"],  # `.` and the line breaks are one token
}
ENDS = {
    "llama3_base": ["<|eot_id|>", "<|end_of_text|>"],
    "qwen2_5_base": ["<|im_end|>", "<|endoftext|>"],
    "gemma2": ["<end_of_turn>", "<eos>"],
    "phi3": ["<|end|>", "<|endoftext|>"],
    "phi4": ["<|im_end|>", "<|endoftext|>"],
}
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
# The answers of WITH_TOOLS.
TOOL_ANSWERS = {
    "llama3_1": [
        '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        "It rains.<|eot_id|>",
        "A coat.<|eot_id|>",
    ],
    "qwen2_5": [f"{QWEN_CALL}<|im_end|>", "It rains.<|im_end|>", "A coat.<|im_end|>"],
    "qwen2_5_base": [f"{QWEN_CALL}<|im_end|>", "It rains.<|im_end|>", "A coat.<|im_end|>"],
    "qwen3": [
        f"{QWEN_CALL}<|im_end|>",
        "It rains.<|im_end|>",
        "<think>\n\n</think>\n\nA coat.<|im_end|>",
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "call00001"}]</s>',
        " It rains.</s>",
        " A coat.</s>",
    ],
    "harmony": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        "<|channel|>final<|message|>It rains.<|end|>",
        "<|channel|>final<|message|>A coat.<|return|>",
    ],
    "deepseek_r1_distill": [  # its template shows no tools, but calls and results
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜>",
        "It rains.<｜end▁of▁sentence｜>",
        "\n</think>\n\nA coat.<｜end▁of▁sentence｜>",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_trains_through_the_templates_end_of_turn(family: str) -> None:
    result = tokenize(family, TWO_TURNS)
    assert result.trained == ANSWERS[family]
    assert result.sample.ids[: result.sample.prompt_tokens] == result.prompt
    if family not in OTHER_ANSWERS:
        assert_template_ids(result)
    assert not result.counts["altered_text"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_a_system_text(family: str) -> None:
    result = tokenize(family, (SYSTEM, *TWO_TURNS))
    assert "Be brief." in result.tokenizer.decode(result.prompt)
    assert result.trained == ANSWERS[family]
    assert result.sample.ids[: result.sample.prompt_tokens] == result.prompt
    if family not in (*OTHER_ANSWERS, "mistral"):
        assert_template_ids(result)


def test_mistral_shows_the_system_text_only_to_a_last_question() -> None:
    """Its template leaves the text out once the question is answered; the prompt has it."""
    result = tokenize("mistral", (SYSTEM, *TWO_TURNS))
    assert "Be brief." not in result.tokenizer.decode(result.complete)
    text = result.tokenizer.decode(result.sample.ids)
    assert text == (
        "<s>[INST] Say 0.[/INST] It is 0.</s>[INST] Be brief.\n\nSay 1.[/INST] It is 1.</s>"
    )


@pytest.mark.parametrize("family", ENDS)
def test_a_turn_and_eos_end_generation(family: str) -> None:
    tokenizer = family_tokenizer(family)
    ends = SampleTokenizer(tokenizer, PromptConfig(template="chat")).end_of_turn_ids
    assert tokenizer.convert_ids_to_tokens(ends) == ENDS[family]


@pytest.mark.parametrize("family", ["llama3_base", "gemma2", "phi3", "mistral", "smollm3"])
def test_a_saved_tokenizer_gives_the_same(family: str, tmp_path: Path) -> None:
    tokenizer = family_tokenizer(family)
    tokenizer.save_pretrained(tmp_path)
    config = PromptConfig(template="chat")
    saved = SampleTokenizer(load_tokenizer(str(tmp_path)), config)
    made = SampleTokenizer(tokenizer, config)
    assert saved.end_of_turn_ids == made.end_of_turn_ids
    ours, theirs = (samples.tokenize(Sample("s", TWO_TURNS)) for samples in (saved, made))
    assert ours.ids == theirs.ids
    assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()


def test_a_special_token_that_takes_the_white_space_of_an_answer_does_not_train() -> None:
    """Phi-3's tokens take the white space after them, also that with which an answer begins."""
    messages = (TWO_TURNS[0], Message("assistant", " It is 0."), *TWO_TURNS[2:])
    assert tokenize("phi3", messages).trained == ANSWERS["phi3"]


def test_the_text_of_eos_within_an_answer_does_not_end_it() -> None:
    answer = "It writes <|endoftext|> and goes on."
    messages = (TWO_TURNS[0], Message("assistant", answer))
    assert tokenize("text_only", messages).trained == [f"{answer}<|endoftext|>"]
    assert tokenize("qwen2_5_base", messages).trained == [f"{answer}<|im_end|>"]


class TestTools:
    @pytest.mark.parametrize("family", TOOL_ANSWERS)
    def test_calls_results_and_answers(self, family: str) -> None:
        tools = () if family == "deepseek_r1_distill" else TOOLS
        result = tokenize(family, WITH_TOOLS, tools)
        assert result.trained == TOOL_ANSWERS[family]
        assert result.sample.ids[: result.sample.prompt_tokens] == result.prompt
        if family not in OTHER_ANSWERS:
            assert_template_ids(result)
        shown = result.tokenizer.decode(result.prompt)
        assert "3 C, rain" in shown and ("Weather of a city." in shown) == bool(tools)

    @pytest.mark.parametrize("family", [name for name in TOOL_ANSWERS if "deep" not in name])
    def test_a_call_as_the_response(self, family: str) -> None:
        result = tokenize(family, WITH_TOOLS[:2], TOOLS)
        expected = TOOL_ANSWERS[family][0]
        thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
        assert result.trained == [thought + expected]
        assert_template_ids(result)

    def test_a_call_after_a_text(self) -> None:
        messages = (WITH_TOOLS[0], Message("assistant", "I look.", tool_calls=(CALL,)))
        assert tokenize("qwen2_5", messages, TOOLS).trained == [f"I look.\n{QWEN_CALL}<|im_end|>"]
        # Llama's template shows the call alone, which is told.
        result = tokenize("llama3_1", messages, TOOLS)
        assert result.trained == TOOL_ANSWERS["llama3_1"][:1]
        assert result.counts["altered_text"] == 1

    @pytest.mark.parametrize("family", ["llama3", "phi4", "smollm3", "chatml", "text_only"])
    def test_templates_without_calls_refuse_them(self, family: str) -> None:
        call = r"sample s \(x.jsonl line 1\): the chat template leaves out the tool call 'weather'"
        with pytest.raises(DataError, match=f"{call} of turn 2"):
            tokenize(family, WITH_TOOLS)
        last = Message("assistant", "I look.", tool_calls=(CALL,))
        with pytest.raises(DataError, match=f"{call} of turn 2"):
            tokenize(family, (WITH_TOOLS[0], last))
        with pytest.raises(DataError, match="does not show tools"):
            tokenize(family, TWO_TURNS, TOOLS)


class TestThoughts:
    @pytest.mark.parametrize("messages", [INLINE_THOUGHTS, SEPARATE_THOUGHTS])
    def test_qwen3_leaves_the_thoughts_of_earlier_questions_out(
        self, messages: tuple[Message, ...]
    ) -> None:
        result = tokenize("qwen3", messages)
        assert result.trained == [
            "It is 0.<|im_end|>",
            "<think>\nI count 1.\n</think>\n\nIt is 1.<|im_end|>",
        ]
        assert_template_ids(result)

    def test_qwen3_keeps_the_thoughts_between_tool_calls(self) -> None:
        messages = (
            WITH_TOOLS[0],
            replace(WITH_TOOLS[1], reasoning_content="I call."),
            WITH_TOOLS[2],
            replace(WITH_TOOLS[3], reasoning_content="I see."),
        )
        result = tokenize("qwen3", messages, TOOLS)
        assert result.trained == [
            f"<think>\nI call.\n</think>\n\n{QWEN_CALL}<|im_end|>",
            "<think>\nI see.\n</think>\n\nIt rains.<|im_end|>",
        ]
        assert_template_ids(result)

    def test_qwen3_without_thinking(self) -> None:
        off = {"enable_thinking": False}
        result = tokenize("qwen3", TWO_TURNS, variables=off)
        assert result.trained == ["It is 0.<|im_end|>", "It is 1.<|im_end|>"]
        assert_template_ids(result)
        with pytest.raises(DataError, match="has a thought, which the prompt .* closes already"):
            tokenize("qwen3", SEPARATE_THOUGHTS, variables=off)
        dropped = tokenize("qwen3", SEPARATE_THOUGHTS, variables=off, reasoning="drop")
        assert dropped.sample.ids == result.sample.ids

    @pytest.mark.parametrize("messages", [INLINE_THOUGHTS, SEPARATE_THOUGHTS])
    def test_deepseek_opens_the_thought(self, messages: tuple[Message, ...]) -> None:
        result = tokenize("deepseek_r1_distill", messages)
        last = "I count 1.\n</think>\n\nIt is 1.<｜end▁of▁sentence｜>"
        assert [text.lstrip("\n") for text in result.trained] == [
            "It is 0.<｜end▁of▁sentence｜>",
            last,
        ]
        assert result.trained[-1] == last and not result.counts["empty_thought"]
        assert result.sample.ids[: result.sample.prompt_tokens] == result.prompt
        assert tokenize("deepseek_r1_distill", TWO_TURNS).counts["empty_thought"] == 1

    @pytest.mark.parametrize("family", ["llama3", "gemma2", "phi4", "smollm3", "generation_blocks"])
    def test_other_templates_show_a_thought_in_the_content_alone(self, family: str) -> None:
        result = tokenize(family, INLINE_THOUGHTS)
        thoughts = [f"<think>\nI count {number}.\n</think>\n\nIt is {number}." for number in (0, 1)]
        assert result.trained == [
            answer.replace(f"It is {number}.", thoughts[number])
            for number, answer in enumerate(ANSWERS[family])
        ]
        assert_template_ids(result)
        with pytest.raises(DataError, match="leaves out the reasoning_content .*=inline"):
            tokenize(family, SEPARATE_THOUGHTS)
        inline = tokenize(family, SEPARATE_THOUGHTS, reasoning="inline")
        assert inline.sample.ids == result.sample.ids


class TestRefusals:
    def test_gemma_has_no_system_role(self) -> None:
        with pytest.raises(DataError, match=r"\(System role not supported\).*first_user_turn"):
            tokenize("gemma2", (SYSTEM, *TWO_TURNS))
        first = replace(TWO_TURNS[0], content="Be brief.\n\nSay 0.")
        expected = tokenize("gemma2", (first, *TWO_TURNS[1:]))
        config = PromptConfig(template="chat", system_message="first_user_turn")
        folded = SampleTokenizer(family_tokenizer("gemma2"), config)
        ids = folded.tokenize(Sample("s", (SYSTEM, *TWO_TURNS))).ids
        assert ids == expected.sample.ids

    @pytest.mark.parametrize("family", ["llama2", "gemma2", "mistral"])
    def test_roles_alternate(self, family: str) -> None:
        with pytest.raises(DataError, match=r"sample s \(x.jsonl line 1\): .* must alternate"):
            tokenize(family, TWO_TURNS[1:])

    def test_mistral_needs_ids_of_calls(self) -> None:
        call = {key: value for key, value in CALL.items() if key != "id"}
        messages = (WITH_TOOLS[0], Message("assistant", "", tool_calls=(call,)))
        with pytest.raises(DataError, match="Tool call IDs should be .* length 9"):
            tokenize("mistral", messages, TOOLS)


class TestGenerationBlocks:
    """The template's own `{% generation %}` blocks, as transformers finds them."""

    @pytest.mark.parametrize("messages", [TWO_TURNS, (SYSTEM, *TWO_TURNS), INLINE_THOUGHTS])
    @pytest.mark.parametrize("family", ["generation_blocks", "smollm3"])
    def test_the_mask_is_that_of_transformers(
        self, family: str, messages: tuple[Message, ...]
    ) -> None:
        result = tokenize(family, messages)
        expected = result.tokenizer.apply_chat_template(
            [message.to_template() for message in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            **DATE,
        )
        count, prompt = len(result.sample.ids), result.sample.prompt_tokens
        mask = np.array(expected["assistant_masks"], dtype=bool)
        assert result.sample.ids == expected["input_ids"][:count]
        assert result.sample.loss_mask[prompt:].all() and mask[prompt:count].all()
        if family == "generation_blocks":
            assert result.sample.loss_mask.tolist() == mask[:count].tolist()
            assert not mask[count:].any()
        else:
            # SmolLM3's last block also has its header, which is prompt, and a line break after the
            # end of the turn, where a response ends.
            header = len(result.tokenizer("<|im_start|>assistant\n")["input_ids"])
            before = prompt - header
            assert result.sample.loss_mask[:before].tolist() == mask[:before].tolist()
            assert result.tokenizer.decode(expected["input_ids"][count:]) == "\n"

    def test_a_turn_without_a_loss(self) -> None:
        messages = (TWO_TURNS[0], replace(TWO_TURNS[1], train=False), *TWO_TURNS[2:])
        assert tokenize("generation_blocks", messages).trained == ["It is 1.<|im_end|>"]

    def test_a_block_before_the_end_token(self) -> None:
        tokenizer = family_tokenizer("generation_blocks")
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "turn.content ~ '<|im_end|>' }}{% endgeneration %}",
            "turn.content }}{% endgeneration %}{{- '<|im_end|>' }}",
        )
        samples = SampleTokenizer(tokenizer, PromptConfig(template="chat"))
        tokenized = samples.tokenize(Sample("s", TWO_TURNS))
        assert trained_texts(tokenizer, tokenized) == ANSWERS["generation_blocks"]
