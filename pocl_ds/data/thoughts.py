"""Thoughts of reasoning models: text between tags such as <think> before an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pocl_ds.data.conversation import Message


@dataclass(frozen=True)
class ThoughtTags:
    """The tags around a thought."""

    opening: str
    closing: str


TAGS = tuple(
    ThoughtTags(*pair)
    for pair in (
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("[THINK]", "[/THINK]"),
    )
)
_EMPTY = re.compile(
    "|".join(rf"{re.escape(tags.opening)}\s*{re.escape(tags.closing)}\s*\Z" for tags in TAGS)
)
_CLOSED = re.compile("(" + "|".join(re.escape(tags.closing) for tags in TAGS) + r")\s*\Z")


def split_thought(message: Message) -> tuple[str, str]:
    """The thought of a message without its tags, and the content after it.

    A thought is `reasoning_content`, or a tagged text at the beginning of the content.
    """
    if message.reasoning_content:
        return message.reasoning_content, message.content
    return split_inline_thought(message.content)


def split_inline_thought(text: str) -> tuple[str, str]:
    """The tagged thought at the beginning of a text without its tags, and the rest.

    A text that closes a thought which the prompt opened has one too.
    """
    for tags in TAGS:
        head, closing, tail = text.partition(tags.closing)
        if closing and (head.lstrip().startswith(tags.opening) or tags.opening not in head):
            return head.lstrip().removeprefix(tags.opening).strip(), tail.lstrip("\n")
    return "", text


def join_thought(thought: str, content: str, opened: ThoughtTags | None = None) -> str:
    """A thought and the content after it, as reasoning models write them.

    opened: tags of a thought that the prompt has opened already, which is then closed even if it
    is empty.
    """
    tags = opened or TAGS[0]
    opening = "" if opened else f"{tags.opening}\n"
    return f"{opening}{thought.strip()}\n{tags.closing}\n\n{content}"


def open_thought(prompt: str) -> ThoughtTags | None:
    """The tags of a thought that the end of a prompt opens; None if it opens none."""
    text = prompt.rstrip()
    return next((tags for tags in TAGS if text.endswith(tags.opening)), None)


def closes_thought(prompt: str) -> bool:
    """Whether a prompt ends with a thought that is already closed."""
    return _CLOSED.search(prompt) is not None


def without_closed_thought(prompt: str) -> str:
    """A prompt without the empty thought with which it ends."""
    return _EMPTY.sub("", prompt)
