"""The text of a conversation, and which of its characters train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pocl_ds.data.conversation import Sample

Span: TypeAlias = tuple[int, int]  # start and end, in characters


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """The text of a conversation through the end of its last response."""

    text: str
    prompt_length: int  # characters before the last response
    trained: tuple[Span, ...]  # ascending, the last one is the last response
    append_eos: bool  # the text does not end the response, so the EOS token must
    add_special_tokens: bool = False  # the tokenizer adds its BOS
    empty_thought: bool = False  # the prompt opens a thought, and the sample has none
    expected: tuple[str, ...] = ()  # content of each trained turn, which its text must contain


class PromptTemplate(Protocol):
    """Turns a sample into text."""

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends an assistant's turn; None if the template writes none."""

    def render_prompt(self, sample: Sample) -> str:
        """The text that asks for the sample's last response. Raises DataError."""

    def render(self, sample: Sample) -> RenderedConversation:
        """The conversation's text, and the ranges that train. Raises DataError."""
