"""Section `prompt`: how a sample becomes token ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import Positive, Section


class PromptConfig(Section):
    """How a sample becomes token ids, in scoring, training and evaluation alike."""

    template: str = Field(
        "alpaca",
        description="Prompt template: `alpaca`, `chat` (the tokenizer's chat template), `plain` "
        "(the instruction alone), or a .jinja file.",
    )
    chat_template_kwargs: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | str
    ] = Field(
        default_factory=dict,
        description="Variables passed to the chat template, as in `{enable_thinking: false}`.",
    )
    max_prompt_tokens: Positive = Field(
        256, description="Maximum prompt length in tokens. Longer prompts keep their first tokens."
    )
    max_length: Positive = Field(
        512, description="Maximum length of prompt and response together, in tokens."
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What to do with samples above these limits: truncate them, drop them, or "
        "stop with an error. Evaluation truncates prompts and counts them, unless this is `error`.",
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
