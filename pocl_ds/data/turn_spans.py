"""Where the turns of an assistant lie in the text of a chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.thoughts import open_thought, split_thought, without_closed_thought

MARKER = "PROBEMARKER"  # stands for a message's content


@dataclass(frozen=True)
class TurnEnd:
    """Where a turn ends, in characters."""

    end: int
    has_token: bool  # a token ends the turn


class RenderMessages(Protocol):
    """Renders a sample's messages with the template. Raises DataError."""

    def __call__(self, sample: Sample, messages: Sequence[Message], *, generation: bool) -> str: ...


class TurnFinder:
    """Finds the turns of an assistant in a template's text."""

    def __init__(
        self, render: RenderMessages, ends: re.Pattern[str], special: re.Pattern[str]
    ) -> None:
        """ends: tokens that end a turn. special: all special tokens."""
        self.render, self.ends, self.special = render, ends, special

    def find_start(
        self,
        sample: Sample,
        messages: Sequence[Message],
        index: int,
        text: str,
        *,
        generation: bool,
    ) -> int | None:
        """Where turn `index` begins in `text`, the template's text of `messages`; None if unknown.

        generation: whether the text ends with the generation prompt.
        """
        if not index:
            marked = [replace(messages[0], content=MARKER), *messages[1:]]
            position = self.render(sample, marked, generation=generation).find(MARKER)
            return position if position >= 0 else None
        prompt_text = self.render(sample, messages[:index], generation=True)
        if text.startswith(prompt_text):
            return len(prompt_text)

        # Templates may render the earlier part of a longer conversation differently, as without
        # thoughts, tools or system text. What lies between the last message before the turn and the
        # turn is the same in both texts, and a marker in place of that message shows where it is.
        for anchor in range(index - 1, -1, -1):
            if not messages[anchor].content.strip():
                continue
            marked = list(messages)
            marked[anchor] = replace(messages[anchor], content=MARKER)
            prompt_text = self.render(sample, marked[:index], generation=True)
            full_text = self.render(sample, marked, generation=generation)
            between = prompt_text.rpartition(MARKER)[2]
            tail = full_text.rpartition(MARKER)[2]
            if MARKER in prompt_text and MARKER in full_text and text.endswith(tail):
                start = len(text) - len(tail)
                found_at = (start + len(b) for b in _variants(between) if tail.startswith(b))
                return next(found_at, None)
        return None

    def find_earlier_end(
        self,
        sample: Sample,
        messages: Sequence[Message],
        index: int,
        text: str,
        start: int,
    ) -> int:
        """Where turn `index`, which begins at `start`, ends in the prompt of `messages`.

        Other turns follow, and a template may end this one with another token than a last answer.
        """
        message = messages[index]
        content = split_thought(message)[1].strip()
        if content and not message.tool_calls:
            position = text.find(content, start)
            match = self.ends.match(text, position + len(content)) if position >= 0 else None
            if match:
                return match.end()

        # As the template renders the turn where it is the last.
        turns = messages[: index + 1]
        alone = self.render(sample, turns, generation=False)
        begin = self.find_start(sample, turns, index, alone, generation=False)
        if begin is not None:
            turn_end = self.find_end(alone[begin:], content)
            turn = alone[begin : begin + turn_end.end]
            if turn_end.has_token and text.startswith(turn, start):
                return start + len(turn)

        # The first special token after the content, before the next message.
        turn = text[start : self._next_content(sample, messages, index, text)]
        if content and content in turn and not message.tool_calls:
            content_end = turn.index(content) + len(content)
            between = self.special.search(turn, content_end)
            only_space = between is not None and not turn[content_end : between.start()].strip()
            return start + (between.end() if between and only_space else content_end)
        return start + self.find_end(turn, content).end

    def _next_content(
        self, sample: Sample, messages: Sequence[Message], index: int, text: str
    ) -> int | None:
        """Where the content of the message after a turn begins; None if unknown."""
        if index + 1 == len(messages):
            return None
        marked = list(messages)
        marked[index + 1] = replace(messages[index + 1], content=MARKER)
        before, marker, _ = self.render(sample, marked, generation=True).partition(MARKER)
        return len(before) if marker and text.startswith(before) else None

    def find_end(self, turn: str, content: str) -> TurnEnd:
        """Where a turn ends: with the token after its content.

        turn: text that begins with the turn. content: of its message.
        """
        content = content.strip()
        position = turn.find(content)
        content_end = position + len(content) if position >= 0 else 0
        match = self.ends.search(turn, content_end)
        if match is None:
            # Another special token may end this kind of turn, as <|eom_id|> after a tool call.
            matches = self.special.finditer(turn, content_end)
            match = next((m for m in matches if not turn[m.end() :].strip()), None)
        if match is None:
            return TurnEnd(content_end or len(turn.rstrip()), has_token=False)
        return TurnEnd(match.end(), has_token=True)

    def has_end(self, turn: str, *, of_call: bool) -> bool:
        """Whether a turn's text ends with a token that ends turns. of_call: any special token."""
        pattern = self.special if of_call else self.ends
        return any(match.end() == len(turn) for match in pattern.finditer(turn))


def _variants(between: str) -> Iterator[str]:
    """The text before a turn, and the same without the thought with which a template begins an
    answer, which it may leave out of earlier turns.
    """
    yield between
    if opened := open_thought(between):
        yield between[: between.rindex(opened.opening)]
    elif (shorter := without_closed_thought(between)) != between:
        yield shorter
