"""Where the turns of an assistant lie in the text of a chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.thoughts import open_thought, without_closed_thought

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
            found = self.render(sample, marked, generation=generation).find(MARKER)
            return found if found >= 0 else None
        asked = self.render(sample, messages[:index], generation=True)
        if text.startswith(asked):
            return len(asked)

        # Templates may render the earlier part of a longer conversation differently, as without
        # thoughts, tools or system text. What lies between the last message before the turn and the
        # turn is the same in both texts, and a marker in place of that message shows where it is.
        for anchor in range(index - 1, -1, -1):
            if not messages[anchor].content.strip():
                continue
            marked = list(messages)
            marked[anchor] = replace(messages[anchor], content=MARKER)
            asked = self.render(sample, marked[:index], generation=True)
            whole = self.render(sample, marked, generation=generation)
            between = asked.rpartition(MARKER)[2]
            rest = whole.rpartition(MARKER)[2]
            if MARKER in asked and MARKER in whole and text.endswith(rest):
                start = len(text) - len(rest)
                found_at = (start + len(b) for b in _variants(between) if rest.startswith(b))
                return next(found_at, None)
        return None

    def find_end(self, turn: str, content: str) -> TurnEnd:
        """Where a turn ends: with the token after its content.

        turn: text that begins with the turn. content: of its message.
        """
        content = content.strip()
        found = turn.find(content)
        content_end = found + len(content) if found >= 0 else 0
        match = self.ends.search(turn, content_end)
        if match is None:
            # Another special token may end this kind of turn, as <|eom_id|> after a tool call.
            matches = self.special.finditer(turn, content_end)
            match = next((m for m in matches if not turn[m.end() :].strip()), None)
        if match is None:
            return TurnEnd(content_end or len(turn.rstrip()), has_token=False)
        return TurnEnd(match.end(), has_token=True)


def _variants(between: str) -> Iterator[str]:
    """The text before a turn, and the same without the thought with which a template begins an
    answer, which it may leave out of earlier turns.
    """
    yield between
    if opened := open_thought(between):
        yield between[: between.rindex(opened.opening)]
    elif (shorter := without_closed_thought(between)) != between:
        yield shorter
