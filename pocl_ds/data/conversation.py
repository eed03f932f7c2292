"""Samples: conversations that end with the response to learn."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError

ASSISTANT, USER, SYSTEM, DEVELOPER, TOOL = "assistant", "user", "system", "developer", "tool"
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, with the keys that chat templates read."""

    role: str  # one of ROLES
    content: str
    reasoning_content: str = ""  # the thought before an assistant's content
    tool_calls: tuple[dict[str, Any], ...] = ()  # JSON objects, as in the OpenAI API
    name: str = ""  # of a tool, or of a speaker
    tool_call_id: str = ""  # of the call that a tool message answers
    train: bool = True  # false: an assistant's turn without a loss

    @property
    def text(self) -> str:
        """The content, and the tool calls as JSON: what ROUGE-L compares with a response."""
        calls = [
            json.dumps(call.get("function", call), ensure_ascii=False) for call in self.tool_calls
        ]
        return "\n".join(filter(None, [self.content, *calls]))

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template reads it, without empty optional keys."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "name", "tool_call_id"):
            if value := getattr(self, key):
                message[key] = value
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message

    def to_tree(self) -> dict[str, Any]:
        """The message as JSON, which `from_tree` reads."""
        tree = self.to_template()
        return tree if self.train else {**tree, "train": False}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Message:
        """The message of a `to_tree`."""
        return cls(**{**tree, "tool_calls": tuple(tree.get("tool_calls", ()))})


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation whose last message is the training response, an assistant's turn.

    The messages before it are the prompt that scoring, rollouts and evaluation ask. A `text` sample
    has no prompt: its only message is the text.
    """

    id: str
    messages: tuple[Message, ...]
    input: str = ""  # Alpaca's input, which templates show beside the last user message
    other_references: tuple[str, ...] = ()  # answers as good as the training response
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of the tools that a model may call
    source: str = ""  # name of the data source, where a recipe has several
    domain: str = ""  # what `data.fields.domain` names, else the name of the source
    place: str = ""  # file and line of the record, for messages
    verbatim: bool = False  # the response is what a model wrote after the prompt
    ended: bool = True  # false if such a response was cut off: no end of turn may follow it

    @classmethod
    def from_instruction(
        cls, sample_id: str, instruction: str, response: str, input: str = "", **fields: Any
    ) -> Sample:
        """A sample of one user message and its response."""
        messages = (Message(USER, instruction), Message(ASSISTANT, response))
        return cls(sample_id, messages, input, **fields)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the training response."""
        return self.messages[:-1]

    @property
    def messages_with_input(self) -> tuple[Message, ...]:
        """All messages, with Alpaca's input at the end of the prompt's last user message."""
        if not self.input:
            return self.messages
        messages = list(self.messages)
        index = max(i for i, turn in enumerate(messages[:-1]) if turn.role == USER)
        content = f"{messages[index].content}\n\n{self.input}"
        messages[index] = replace(messages[index], content=content)
        return tuple(messages)

    @property
    def response(self) -> Message:
        """The training response."""
        return self.messages[-1]

    @property
    def references(self) -> tuple[str, ...]:
        """Texts that count as correct answers; the first is the training response."""
        return (self.messages[-1].text, *self.other_references)

    @property
    def instruction(self) -> str:
        """Content of the last user message of the prompt; empty without one."""
        return next((turn.content for turn in reversed(self.prompt) if turn.role == USER), "")

    @property
    def label(self) -> str:
        """The sample as error messages name it: its id, and its file and line."""
        return f"sample {self.id} ({self.place})" if self.place else f"sample {self.id}"

    def with_reference(self, text: str) -> Sample:
        """The sample with one of its references as the training response."""
        response = self.response
        if text != response.text:
            response = replace(response, content=text, reasoning_content="", tool_calls=())
        return replace(self, messages=(*self.prompt, response), other_references=())

    def with_last_turn_trained(self) -> Sample:
        """The sample with a loss on its last response alone."""
        prompt = (replace(message, train=False) for message in self.prompt)
        return replace(self, messages=(*prompt, replace(self.response, train=True)))

    def with_response(self, text: str, *, ended: bool = True) -> Sample:
        """The sample with a model's response as its only reference and the only turn that trains.

        ended: whether the model ended the response.
        """
        prompt = (replace(message, train=False) for message in self.prompt)
        messages = (*prompt, Message(ASSISTANT, text))
        return replace(self, messages=messages, other_references=(), verbatim=True, ended=ended)

    def to_json(self) -> str:
        """The sample as one line of a sample file."""
        tree: dict[str, Any] = {"id": self.id, "messages": [m.to_tree() for m in self.messages]}
        for name in ("input", "other_references", "tools", "source", "domain", "place", "verbatim"):
            if value := getattr(self, name):
                tree[name] = value
        if not self.ended:
            tree["ended"] = False
        return json.dumps(tree, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """The sample of a `to_json` line. Raises ValueError, KeyError or TypeError for another."""
        tree = json.loads(line)
        return cls(
            **{
                **tree,
                "messages": tuple(map(Message.from_tree, tree["messages"])),
                "other_references": tuple(tree.get("other_references", ())),
                "tools": tuple(tree.get("tools", ())),
            }
        )


def read_sample_file(path: Path, rows: Container[int] | None = None) -> Iterator[Sample]:
    """Read a jsonl file of `Sample.to_json` lines, or the given rows of it, in their order.

    Lines of other rows are not parsed. Raises ArtifactError if the file is missing or damaged.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl preprocess` first")
    with path.open(encoding="utf-8") as stream:
        for row, line in enumerate(stream):
            if rows is not None and row not in rows:
                continue
            try:
                sample = Sample.from_json(line)
            except (ValueError, KeyError, TypeError):
                raise ArtifactError(
                    f"{path} line {row + 1} is damaged: remove its folder and run its step again"
                ) from None
            yield sample
