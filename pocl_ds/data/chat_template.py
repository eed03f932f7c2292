"""Conversations as a tokenizer's chat template renders them, and the parts that train.

The template's own text is the truth. The prompt of the last response is what the template renders
for generation. The response is what it renders after that prompt, through the token that ends the
turn. Earlier assistant turns are found in the prompt's text. A template with `{% generation %}`
blocks says itself which text an assistant writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from pocl_ds.compat.transformers_private import render_with_generation_blocks
from pocl_ds.data.conversation import ASSISTANT, DEVELOPER, SYSTEM, USER, Message, Sample
from pocl_ds.data.rendered import RenderedConversation, Span
from pocl_ds.data.template_limits import TemplateCostError, limited_rendering
from pocl_ds.data.template_probes import TemplateProbes
from pocl_ds.data.text_encoding import special_tokens
from pocl_ds.data.thoughts import (
    closes_thought,
    join_thought,
    open_thought,
    split_thought,
)
from pocl_ds.data.turn_spans import TurnFinder
from pocl_ds.errors import DataError, ModelError

# Llama 3's template writes today's date into the prompt unless the caller passes a date, and others
# read the clock. A prompt must not change between scoring and evaluation, so all templates get the
# default date of Llama's templates.
TEMPLATE_DATE = datetime(2024, 7, 26)
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Reasoning = Literal["template", "inline", "drop"]
SystemMessage = Literal["system_turn", "first_user_turn", "drop"]


class ChatTemplate:
    """Renders samples with the chat template of a tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        options: Mapping[str, Any],
        *,
        reasoning: Reasoning = "template",
        system_message: SystemMessage = "system_turn",
    ) -> None:
        """options: variables of the template. Raises ModelError if it renders no conversation."""
        self.tokenizer, self.reasoning, self.system_message = tokenizer, reasoning, system_message
        self.options = {
            "date_string": TEMPLATE_DATE.strftime("%d %b %Y"),
            "strftime_now": TEMPLATE_DATE.strftime,
            **options,
        }
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        self.marks_responses = any(GENERATION_BLOCK.search(text) for text in texts)
        special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)")
        self._probes = TemplateProbes(self._apply_raw, special)
        self.turn_end = self._probes.turn_end()
        ends = dict.fromkeys([self.turn_end.token, tokenizer.eos_token])
        self._ends = re.compile("|".join(re.escape(end) for end in ends if end))
        self._turns = TurnFinder(self._apply, self._ends, special)
        self.developer_role = DEVELOPER if self._probes.shows_developer_role() else SYSTEM

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends an assistant's turn; None if the template writes none."""
        return self.turn_end.token or None

    def render_prompt(self, sample: Sample) -> str:
        """The text that asks for the sample's last response. Raises DataError."""
        messages = self._messages(sample)
        text = self._apply(sample, messages[:-1], generation=True)
        self._check_prompt(sample, messages[:-1], text)
        return text

    def render(self, sample: Sample) -> RenderedConversation:
        """The conversation's text, and the ranges that train. Raises DataError."""
        messages = self._messages(sample)
        prompt = self._apply(sample, messages[:-1], generation=True)
        self._check_prompt(sample, messages[:-1], prompt)
        if sample.verbatim:
            end = self.turn_end.text if sample.ended else ""
            response, empty_thought = messages[-1].content + end, False
        else:
            complete, blocks = self._apply_complete(sample, messages)
            if blocks and complete.startswith(prompt) and _shows_thought(messages[-1], complete):
                return self._render_blocks(sample, messages, prompt, complete, blocks)
            response, empty_thought = self._response_text(sample, messages, prompt, complete)
            _check_calls(sample, messages[-1], len(messages), response)
        start, text = len(prompt), prompt + response
        trained = (*self._earlier_turns(sample, messages, prompt), (start, len(text)))
        # Another token may end a call.
        has_end = self._turns.has_end(response, of_call=bool(messages[-1].tool_calls))
        return RenderedConversation(
            text,
            start,
            trained,
            append_eos=sample.ended and not has_end,
            empty_thought=empty_thought,
            expected=self._expected(messages),
        )

    # The messages that the template gets.

    def _messages(self, sample: Sample) -> tuple[Message, ...]:
        """The messages with their thoughts, system text and roles as the recipe wants them."""
        messages = list(sample.messages_with_input)
        if self.system_message != "system_turn":
            messages = self._without_system(messages)
        return tuple(self._message(message) for message in messages)

    def _message(self, message: Message) -> Message:
        if message.role == DEVELOPER:
            return replace(message, role=self.developer_role)
        if message.role != ASSISTANT or self.reasoning == "template":
            return message
        thought, content = split_thought(message)
        if self.reasoning == "inline" and thought:
            content = join_thought(thought, content)
        return replace(message, content=content, reasoning_content="")

    def _without_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their system text before the first user message, or without it."""
        system = [m.content for m in messages if m.role in (SYSTEM, DEVELOPER) and m.content]
        turns = [m for m in messages if m.role not in (SYSTEM, DEVELOPER)]
        if self.system_message == "drop" or not system:
            return turns
        for index, message in enumerate(turns):
            if message.role == USER:
                text = "\n\n".join([*system, message.content])
                turns[index] = replace(message, content=text)
                return turns
        return turns

    def _trees(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template reads them."""
        trees = [message.to_template() for message in messages]
        for tree in trees:
            if "tool_calls" in tree and self._probes.takes_arguments_as_text:
                tree["tool_calls"] = [_with_arguments_as_text(call) for call in tree["tool_calls"]]
        return trees

    # The template's text.

    def _apply(self, sample: Sample, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            with limited_rendering():
                return self._apply_raw(
                    self._trees(messages), list(sample.tools) or None, generation=generation
                )
        # A template is a program, so any exception may occur.
        except Exception as error:
            raise self._refusal(sample, messages, error) from None

    def _apply_raw(self, messages: list[dict[str, Any]], tools: Any, *, generation: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation,
                **self.options,
            )
        )

    def _refusal(self, sample: Sample, messages: Sequence[Message], error: Exception) -> DataError:
        """What to tell of a conversation that the template refuses, or that costs too much."""
        if isinstance(error, TemplateCostError):
            return DataError(
                f"{sample.label}: the chat template costs too much with it (it {error}): fix the "
                "template's loops and widths, or the record"
            )
        remedy = "fix or remove it, or leave out such samples with data.on_invalid=skip"
        has_system = any(message.role in (SYSTEM, DEVELOPER) for message in messages)
        if has_system and self.system_message == "system_turn":
            remedy = (
                f"set prompt.system_message=first_user_turn if it refuses the role; else {remedy}"
            )
        reason = str(error) or type(error).__name__
        return DataError(
            f"{sample.label}: the chat template refuses its messages ({reason}): {remedy}"
        )

    def _apply_complete(
        self, sample: Sample, messages: Sequence[Message]
    ) -> tuple[str, list[Span]]:
        """The whole conversation's text, and the template's generation blocks."""
        if not self.marks_responses:
            return self._apply(sample, messages, generation=False), []
        try:
            return render_with_generation_blocks(
                self.tokenizer, self._trees(messages), list(sample.tools) or None, self.options
            )
        except Exception as error:
            raise self._refusal(sample, messages, error) from None

    def _check_prompt(self, sample: Sample, messages: Sequence[Message], text: str) -> None:
        """Raise DataError if the template leaves out a message's content or the tools."""
        for number, message in enumerate(messages, 1):
            content = split_thought(message)[1].strip()
            if content and content not in text and not _shown_as_json(content, text):
                raise DataError(
                    f"{sample.label}: the chat template leaves out the text of turn {number} "
                    f"({message.role}): remove that turn, or use another prompt.template"
                )
            _check_calls(sample, message, number, text)
        if sample.tools and not self._probes.shows_tools:
            raise DataError(
                f"{sample.label}: the chat template does not show tools: use a tokenizer whose "
                "template does, or set data.fields.tools=null to train without them"
            )

    # The parts that train.

    def _render_blocks(
        self,
        sample: Sample,
        messages: Sequence[Message],
        prompt: str,
        complete: str,
        blocks: list[Span],
    ) -> RenderedConversation:
        """The conversation with the template's own generation blocks as trained ranges."""
        turns = [message for message in messages if message.role == ASSISTANT]
        if len(turns) != len(blocks):
            raise DataError(
                f"{sample.label}: the chat template marks {len(blocks)} generation blocks for "
                f"{len(turns)} assistant turns: fix the template or remove the sample"
            )
        trained = [
            self._block_with_end(complete, block)
            for turn, block in zip(turns, blocks, strict=True)
            if turn.train or turn is turns[-1]
        ]
        start, end = trained.pop()
        response = complete[max(start, len(prompt)) : end]
        turn_end = self._turns.find_end(response, split_thought(messages[-1])[1])
        if turn_end.has_token:  # without a line break after it
            end = max(start, len(prompt)) + turn_end.end
        _check_calls(sample, messages[-1], len(messages), response)
        return RenderedConversation(
            complete[:end],
            len(prompt),
            (*trained, (max(start, len(prompt)), end)),
            append_eos=not turn_end.has_token,
            expected=self._expected(messages),
        )

    def _block_with_end(self, complete: str, block: Span) -> Span:
        """A generation block through the token that ends the turn, where that follows the block."""
        start, end = block
        if self.turn_end.token and complete.startswith(self.turn_end.token, end):
            return start, end + len(self.turn_end.token)
        return block

    def _expected(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The content of each turn that trains; its text must decode back to it."""
        turns = [m for m in messages[:-1] if m.role == ASSISTANT and m.train]
        return tuple(split_thought(message)[1].strip() for message in (*turns, messages[-1]))

    def _response_text(
        self, sample: Sample, messages: Sequence[Message], prompt: str, complete: str
    ) -> tuple[str, bool]:
        """The last response's text after the prompt, through the end of its turn, and whether an
        empty thought was added.
        """
        message = messages[-1]
        thought, content = split_thought(message)
        continues = complete.startswith(prompt)
        if continues and _shows_thought(message, complete[len(prompt) :]):
            return self._through_end(complete[len(prompt) :], content), False

        # The template drops the thought, or asks for one that it does not show.
        if tags := open_thought(prompt):
            before = prompt[: prompt.rindex(tags.opening)]
            answer = content + self.turn_end.text
            if complete.startswith(before):  # as the template itself renders the answer
                answer = self._through_end(complete[len(before) :], content).lstrip("\n")
            return join_thought(thought, answer, tags), not thought
        if closes_thought(prompt):
            if thought:
                raise DataError(
                    f"{sample.label}: its response has a thought, which the prompt of the chat "
                    "template closes already (as with enable_thinking: false in "
                    "prompt.chat_template_kwargs): remove that setting, or set "
                    "prompt.reasoning=drop",
                    reason="a thought after a closed one",
                )
            if not message.tool_calls:
                return content + self.turn_end.text, False
        if not continues:
            # The template renders the prompt differently once it is answered.
            start = self._turns.find_start(
                sample, messages, len(messages) - 1, complete, generation=False
            )
            if start is not None and _shows_thought(message, complete[start:]):
                return self._through_end(complete[start:], content), False
            raise DataError(
                f"{sample.label}: the chat template's text with the response does not continue "
                "the prompt: use another prompt.template, or leave out the sample",
                reason="no prefix",
            )
        if message.reasoning_content:
            raise DataError(
                f"{sample.label}: the chat template leaves out the reasoning_content of the "
                "response: set prompt.reasoning=inline to write it as <think>...</think>, or drop",
                reason="reasoning_content without a place",
            )
        # A thought within the content is text that the model writes itself.
        return message.content + self.turn_end.text, False

    def _through_end(self, turn: str, content: str) -> str:
        return turn[: self._turns.find_end(turn, content).end]

    def _earlier_turns(
        self, sample: Sample, messages: Sequence[Message], prompt: str
    ) -> list[Span]:
        """Ranges of the earlier assistant turns that train, in the prompt's text."""
        spans: list[Span] = []
        for index, message in enumerate(messages[:-1]):
            if message.role != ASSISTANT or not message.train:
                continue
            start = self._turns.find_start(sample, messages[:-1], index, prompt, generation=True)
            content = split_thought(message)[1]
            end = 0
            if start is not None:
                end = self._turns.find_earlier_end(sample, messages[:-1], index, prompt, start)
            if start is None or content.strip() not in prompt[start:end]:
                raise DataError(
                    f"{sample.label}: assistant turn {index + 1} cannot be found in the chat "
                    "template's text: set data.train_on=last_turn, or leave out the sample"
                )
            spans.append((start, end))
        return spans


def find_end_of_turn(tokenizer: Any) -> str | None:
    """The token with which the tokenizer's chat template ends an assistant's turn; None without
    such a token, or without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatTemplate(tokenizer, {}).end_of_turn
    except ModelError:  # a template that shows no answer
        return None


def _shows_thought(message: Message, text: str) -> bool:
    return split_thought(message)[0].strip() in text


def _check_calls(sample: Sample, message: Message, number: int, text: str) -> None:
    """Raise DataError if a text leaves out a tool call of a message."""
    for call in message.tool_calls:
        name = str(call["function"]["name"])
        if name not in text:
            raise DataError(
                f"{sample.label}: the chat template leaves out the tool call {name!r} of turn "
                f"{number}: use a tokenizer whose template shows tool calls, or leave out such "
                "samples"
            )


def _with_arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _shown_as_json(content: str, text: str) -> bool:
    """Whether a template shows a content inside JSON, as some do with a tool's result."""
    return (
        json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
    )
