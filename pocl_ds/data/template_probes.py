"""What a chat template shows and how it ends a turn, found by rendering small conversations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from pocl_ds.data.conversation import ASSISTANT, DEVELOPER, USER
from pocl_ds.errors import ModelError

QUESTION, ANSWER = "PROBEQUESTION", "PROBEANSWER"
TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


class ApplyTemplate(Protocol):
    """Renders messages with the template. Raises whatever the template raises."""

    def __call__(self, messages: list[dict[str, Any]], tools: Any, *, generation: bool) -> str: ...


@dataclass(frozen=True)
class TurnEndText:
    """How a template ends an assistant's turn."""

    text: str  # after the content, through the token that ends the turn; empty if there is none
    token: str  # that token


class TemplateProbes:
    """Answers questions about a chat template."""

    def __init__(self, apply: ApplyTemplate, special: re.Pattern[str]) -> None:
        """special: all special tokens."""
        self._apply, self._special = apply, special

    def turn_end(self) -> TurnEndText:
        """How the template ends an assistant's turn. Raises ModelError if it renders no answer."""
        question = {"role": USER, "content": QUESTION}
        text = self._render([question, {"role": ASSISTANT, "content": ANSWER}])
        if text is None:  # the errors of a conversation are reported with its sample
            return TurnEndText("", "")
        if ANSWER not in text:
            raise ModelError(
                "prompt.template=chat: the tokenizer's chat template leaves out the assistant's "
                "answer: use another template"
            )
        tail = text.rpartition(ANSWER)[2]
        match = self._special.search(tail)
        return TurnEndText(tail[: match.end()], match[0]) if match else TurnEndText("", "")

    def shows_developer_role(self) -> bool:
        """Whether the template knows the role `developer`."""
        developer = {"role": DEVELOPER, "content": ANSWER}
        text = self._render([developer, {"role": USER, "content": QUESTION}])
        return text is not None and ANSWER in text

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template shows the tools that a model may call."""
        text = self._render([{"role": USER, "content": QUESTION}], [TOOL])
        return text is not None and "probe_tool" in text

    @cached_property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template shows a call's arguments only if they are JSON text, not an object,
        as DeepSeek's templates do.
        """
        texts = []
        for arguments in ({"probe": "value"}, '{"probe": "value"}'):
            function = {"name": "probe_tool", "arguments": arguments}
            call = {"type": "function", "id": "probecall", "function": function}
            answer = {"role": ASSISTANT, "content": "", "tool_calls": [call]}
            texts.append(self._render([{"role": USER, "content": QUESTION}, answer], [TOOL]))
        as_object, as_text = texts
        refused = as_object is None or "{'probe'" in as_object  # Python's text of an object
        return refused and as_text is not None

    def _render(self, messages: list[dict[str, Any]], tools: Any = None) -> str | None:
        try:
            return self._apply(messages, tools, generation=False)
        except Exception:  # a template is a program
            return None
