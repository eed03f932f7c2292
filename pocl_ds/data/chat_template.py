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
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from pocl_ds.compat.transformers_private import render_with_generation_blocks
from pocl_ds.data.conversation import ASSISTANT, DEVELOPER, SYSTEM, USER, Message, Sample
from pocl_ds.data.rendered import RenderedConversation, Span
from pocl_ds.data.thoughts import (
    closes_thought,
    join_thought,
    open_thought,
    split_thought,
)
from pocl_ds.errors import DataError, ModelError

# Llama 3's template writes today's date into the prompt unless the caller passes a date, and others
# read the clock. A prompt must not change between scoring and evaluation, so all templates get the
# default date of Llama's templates.
TEMPLATE_DATE = datetime(2024, 7, 26)
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_QUESTION, PROBE_ANSWER = "PROBEQUESTION", "PROBEANSWER"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

Reasoning = Literal["template", "inline", "drop"]
SystemMessage = Literal["system_turn", "first_user_turn", "drop"]


@dataclass(frozen=True)
class _TurnEnd:
    """How the template ends an assistant's turn."""

    text: str  # after the content, through the token that ends the turn; empty if there is none
    token: str  # that token


@dataclass(frozen=True)
class _TurnSpan:
    """Ends of a turn in characters: of its content, and of its end token."""

    content_end: int
    end: int
    has_end: bool


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
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.turn_end = self._probe_turn_end()
        ends = dict.fromkeys([self.turn_end.token, tokenizer.eos_token])
        self._ends = re.compile("|".join(re.escape(end) for end in ends if end))
        self.developer_role = DEVELOPER if self._shows_developer_role() else SYSTEM
        self._shows_tools: bool | None = None  # unknown until a sample has tools

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
            if blocks and complete.startswith(prompt):
                return self._render_blocks(sample, messages, prompt, complete, blocks)
            response, empty_thought = self._response_text(sample, messages[-1], prompt, complete)
        start, text = len(prompt), prompt + response
        trained = (*self._earlier_turns(sample, messages, prompt), (start, len(text)))
        ends = self._ends.search(response[-len(self.turn_end.text) :]) if response else None
        return RenderedConversation(
            text,
            start,
            trained,
            append_eos=sample.ended and ends is None,
            empty_thought=empty_thought,
            expected=self._expected(messages),
        )

    # The messages that the template gets.

    def _messages(self, sample: Sample) -> tuple[Message, ...]:
        """The messages with their thoughts, system text and roles as the recipe wants them."""
        messages = list(sample.messages)
        if sample.input:  # Alpaca's input belongs to the last user message
            index = max(i for i, turn in enumerate(messages[:-1]) if turn.role == USER)
            content = f"{messages[index].content}\n\n{sample.input}"
            messages[index] = replace(messages[index], content=content)
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
        rest = [m for m in messages if m.role not in (SYSTEM, DEVELOPER)]
        if self.system_message == "drop" or not system:
            return rest
        for index, message in enumerate(rest):
            if message.role == USER:
                text = "\n\n".join([*system, message.content])
                rest[index] = replace(message, content=text)
                return rest
        return rest

    # The template's text.

    def _apply(self, sample: Sample, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            return self._apply_raw(
                [message.to_template() for message in messages],
                list(sample.tools) or None,
                generation=generation,
            )
        # A template is a program, so any exception may occur.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{sample.label}: the chat template refuses its messages ({reason}): "
                f"{self._refusal_remedy(messages)}"
            ) from None

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

    def _refusal_remedy(self, messages: Sequence[Message]) -> str:
        has_system = any(message.role in (SYSTEM, DEVELOPER) for message in messages)
        remedy = "fix or remove it, or leave out such samples with data.on_invalid=skip"
        if has_system and self.system_message == "system_turn":
            return (
                f"set prompt.system_message=first_user_turn if it refuses the role; else {remedy}"
            )
        return remedy

    def _apply_complete(
        self, sample: Sample, messages: Sequence[Message]
    ) -> tuple[str, list[Span]]:
        """The whole conversation's text, and the template's generation blocks."""
        if not self.marks_responses:
            return self._apply(sample, messages, generation=False), []
        trees = [message.to_template() for message in messages]
        try:
            return render_with_generation_blocks(
                self.tokenizer, trees, list(sample.tools) or None, self.options
            )
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{sample.label}: the chat template refuses its messages ({reason}): "
                f"{self._refusal_remedy(messages)}"
            ) from None

    def _check_prompt(self, sample: Sample, messages: Sequence[Message], text: str) -> None:
        """Raise DataError if the template leaves out a message's content or the tools."""
        for number, message in enumerate(messages, 1):
            content = split_thought(message)[1].strip()
            if content and content not in text and not _shown_as_json(content, text):
                raise DataError(
                    f"{sample.label}: the chat template leaves out the text of turn {number} "
                    f"({message.role}): remove that turn, or use another prompt.template"
                )
            for call in message.tool_calls:
                name = str(call.get("function", call).get("name", ""))
                if name not in text:
                    raise DataError(
                        f"{sample.label}: the chat template leaves out the tool call {name!r} of "
                        f"turn {number}: use a tokenizer whose template shows tool calls, or leave "
                        "out such samples"
                    )
        if sample.tools and not self._knows_tools():
            raise DataError(
                f"{sample.label}: the chat template does not show tools: use a tokenizer whose "
                "template does, or set data.fields.tools=null to train without them"
            )

    # Probes of the template, once.

    def _probe(self, messages: list[dict[str, Any]], tools: Any = None) -> str | None:
        try:
            return self._apply_raw(messages, tools, generation=False)
        except Exception:  # a template is a program
            return None

    def _probe_turn_end(self) -> _TurnEnd:
        """How the template ends an assistant's turn. Raises ModelError if it renders no answer."""
        question = {"role": USER, "content": PROBE_QUESTION}
        answer = {"role": ASSISTANT, "content": PROBE_ANSWER}
        text = self._probe([question, answer])
        if text is None or PROBE_ANSWER not in text:
            # Errors of a single conversation are reported with its sample; without any answer in
            # the text, nothing can be trained.
            if text is not None:
                raise ModelError(
                    "prompt.template=chat: the tokenizer's chat template leaves out the "
                    "assistant's answer: use another template"
                )
            return _TurnEnd("", "")
        tail = text.rpartition(PROBE_ANSWER)[2]
        match = self._special.search(tail)
        if not match:
            return _TurnEnd("", "")
        return _TurnEnd(tail[: match.end()], match[0])

    def _shows_developer_role(self) -> bool:
        developer = {"role": DEVELOPER, "content": PROBE_ANSWER}
        text = self._probe([developer, {"role": USER, "content": PROBE_QUESTION}])
        return text is not None and PROBE_ANSWER in text

    def _knows_tools(self) -> bool:
        if self._shows_tools is None:
            text = self._probe([{"role": USER, "content": PROBE_QUESTION}], [PROBE_TOOL])
            self._shows_tools = text is not None and "probe_tool" in text
        return self._shows_tools

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
        trained = [block for turn, block in zip(turns[:-1], blocks[:-1], strict=True) if turn.train]
        start, end = blocks[-1]
        return RenderedConversation(
            complete[:end],
            len(prompt),
            (*trained, (max(start, len(prompt)), end)),
            append_eos=not self.end_of_turn,
            expected=self._expected(messages),
        )

    def _expected(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The content of each turn that trains; its text must decode back to it."""
        turns = [m for m in messages[:-1] if m.role == ASSISTANT and m.train]
        return tuple(split_thought(message)[1].strip() for message in (*turns, messages[-1]))

    def _response_text(
        self, sample: Sample, message: Message, prompt: str, complete: str
    ) -> tuple[str, bool]:
        """The last response's text after the prompt, through the end of its turn, and whether an
        empty thought was added.
        """
        thought, content = split_thought(message)
        continues = complete.startswith(prompt)
        if continues:
            region = complete[len(prompt) :]
            if not thought or thought.strip() in region:
                return region[: self._turn_span(region, content).end], False

        # The template drops the thought, or asks for one that it does not show.
        if tags := open_thought(prompt):
            before = prompt[: prompt.rindex(tags.opening)]
            answer = content + self.turn_end.text
            if complete.startswith(before):  # as the template itself renders the answer
                region = complete[len(before) :]
                answer = region[: self._turn_span(region, content).end]
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

    def _earlier_turns(
        self, sample: Sample, messages: Sequence[Message], prompt: str
    ) -> list[Span]:
        """Ranges of the earlier assistant turns that train, in the prompt's text."""
        spans: list[Span] = []
        for index, message in enumerate(messages[:-1]):
            if message.role != ASSISTANT or not message.train:
                continue
            start = self._turn_start(sample, messages, index, prompt)
            _, content = split_thought(message)
            turn = self._turn_span(prompt[start:], content)
            end = start + turn.end
            if start < 0 or content.strip() not in prompt[start:end]:
                raise DataError(
                    f"{sample.label}: assistant turn {index + 1} cannot be found in the chat "
                    "template's text: set data.train_on=last_turn, or leave out the sample"
                )
            spans.append((start, end))
        return spans

    def _turn_start(
        self, sample: Sample, messages: Sequence[Message], index: int, prompt: str
    ) -> int:
        """Where the text of an assistant turn begins in the prompt; -1 if it is not found."""
        if index:
            asked = self._apply(sample, messages[:index], generation=True)
            if prompt.startswith(asked):
                return len(asked)
        # Templates may render the earlier part of a longer conversation differently, as without
        # thoughts or tools. Then the turn follows the contents before it.
        position = 0
        for message in messages[:index]:
            content = split_thought(message)[1].strip()
            found = prompt.find(content, position)
            if found < 0:
                return -1
            position = found + len(content)
        header = ""
        if index:
            before = self._apply(sample, messages[:index], generation=False)
            header = asked[len(before) :] if asked.startswith(before) else ""
            if opened := open_thought(header):
                header = header[: header.rindex(opened.opening)]
        if header:
            found = prompt.find(header, position)
            return found + len(header) if found >= 0 else -1
        return prompt.find(split_thought(messages[index])[1].strip(), position)

    def _turn_span(self, region: str, content: str) -> _TurnSpan:
        """Where a turn that begins a text ends: after its content, and after its end token."""
        content = content.strip()
        found = region.find(content)
        content_end = found + len(content) if found >= 0 else 0
        match = self._ends.search(region, content_end)
        if match is None:
            # Another special token may end this kind of turn, as <|eom_id|> after a tool call.
            match = next(
                (
                    m
                    for m in self._special.finditer(region, content_end)
                    if not region[m.end() :].strip()
                ),
                None,
            )
        if match is None:
            end = content_end or len(region.rstrip())
            return _TurnSpan(end, end, has_end=False)
        if not content:
            content_end = match.start()
        return _TurnSpan(max(content_end, 0), match.end(), has_end=True)


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


def _shown_as_json(content: str, text: str) -> bool:
    """Whether a template shows a content inside JSON, as some do with a tool's result."""
    return (
        json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
    )
