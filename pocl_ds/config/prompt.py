"""Section `prompt`: how a sample becomes token ids."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import Positive, Section, VariableName


class PromptConfig(Section):
    """How a sample becomes token ids, in scoring, training and evaluation alike."""

    template: str = Field(
        "alpaca",
        description="Prompt template: `alpaca`, `chat` (the tokenizer's chat template), `plain` "
        "(the instruction alone), or a .jinja file.",
    )
    chat_template_kwargs: dict[VariableName, bool | int | str] = Field(
        default_factory=dict,
        description="Variables passed to the chat template, as in `{enable_thinking: false}`.",
    )
    max_prompt_tokens: Positive = Field(
        256,
        description="Maximum prompt length in tokens; `overlong` says how longer ones are handled.",
    )
    max_length: Positive = Field(
        512, description="Maximum length of prompt and response together, in tokens."
    )
    overlong: Literal["truncate_text", "truncate_history", "drop", "error"] = Field(
        "truncate_text",
        description="What to do with samples above these limits. `truncate_text`: leave out the "
        "earliest turns, then shorten input, tool results and system text until the prompt fits; "
        "shorten the response at its end. `truncate_history`: the same without shortening a "
        "prompt's texts. `drop`, `error`: leave the sample out, or stop. The question and the end "
        "of the template are never cut for training: a sample whose question is too long is left "
        "out. Evaluation shortens such a question, unless this is `error`.",
    )
    reasoning: Literal["template", "inline", "drop"] = Field(
        "template",
        description="Thoughts of an assistant (`reasoning_content`, or a leading "
        "`<think>...</think>`): `template` gives them to the chat template as they are, `inline` "
        "writes `reasoning_content` as `<think>...</think>` into the content, `drop` leaves them "
        "out.",
    )
    system_message: Literal["system_turn", "first_user_turn", "drop"] = Field(
        "system_turn",
        description="Where the text of a system or developer turn goes: `system_turn` keeps the "
        "turn, `first_user_turn` writes it before the first user message (for templates that have "
        "no system role, as Gemma's or `alpaca`), `drop` leaves it out.",
    )

    @model_validator(mode="after")
    def _check_limits(self) -> PromptConfig:
        if self.chat_template_kwargs and self.template != "chat":
            raise ValueError(
                f"chat_template_kwargs need template=chat, and the template is {self.template}: "
                "remove them, or set template=chat"
            )
        if self.max_prompt_tokens >= self.max_length:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response in "
                f"max_length={self.max_length}: make it smaller"
            )
        return self
