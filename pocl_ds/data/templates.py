"""Prompt templates by name: `alpaca`, `plain`, `chat`, or a .jinja file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocl_ds.config import PromptConfig
from pocl_ds.data.chat_template import ChatTemplate
from pocl_ds.data.conversation import ASSISTANT, DEVELOPER, SYSTEM, USER, Sample
from pocl_ds.data.rendered import PromptTemplate, RenderedConversation
from pocl_ds.data.template_limits import TemplateCostError, exceeded_limit, limited_rendering
from pocl_ds.data.thoughts import join_thought, split_thought
from pocl_ds.errors import DataError, ModelError, RecipeError, decode_fault

# The Stanford Alpaca template, which MiniLLM and the POCL release use.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


BUILT_IN = ("alpaca", "plain")
_checked: set[tuple[str, str, str]] = set()


def load_template(tokenizer: Any, config: PromptConfig) -> PromptTemplate:
    """Load the recipe's prompt template for a tokenizer.

    Raises ModelError if the tokenizer has no chat template, RecipeError if the file is missing or
    invalid. Either is raised for a template that takes too much time or memory.
    """
    if config.template in BUILT_IN:
        return _load(tokenizer, config)
    _check_cost(tokenizer, config)
    try:
        with limited_rendering():  # constants are computed when a template is compiled
            return _load(tokenizer, config)
    except TemplateCostError as error:
        raise _refusal(config.template, str(error)) from None


def _refusal(name: str, cost: str) -> RecipeError | ModelError:
    """The error for a template that costs too much. cost: `takes more than 10 s ...`."""
    if name == "chat":
        return ModelError(f"the tokenizer's chat template {cost}: fix its loops and widths")
    return RecipeError(f"prompt.template {name} {cost}: fix its loops and widths")


def _check_cost(tokenizer: Any, config: PromptConfig) -> None:
    """Render a short sample within limits, once for each template of this process."""
    name, own = config.template, str(getattr(tokenizer, "chat_template", None))
    path = Path(os.path.expanduser(name))
    text = own if name == "chat" else str(path.stat().st_mtime_ns if path.is_file() else None)
    key = (name, text, repr(config.chat_template_kwargs))
    if key in _checked:
        return
    sample = Sample.from_instruction("probe", "What is this?", "A short sample.")
    if limit := exceeded_limit(lambda: _load(tokenizer, config).render(sample)):
        raise _refusal(name, f"takes more than {limit} for one short sample")
    _checked.add(key)


def _load(tokenizer: Any, config: PromptConfig) -> PromptTemplate:
    name = config.template
    if name == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "prompt.template=chat, but the tokenizer has no chat template: use alpaca, plain "
                "or a .jinja file"
            )
        return ChatTemplate(
            tokenizer,
            config.chat_template_kwargs,
            reasoning=config.reasoning,
            system_message=config.system_message,
        )
    if name == "alpaca":
        return TextTemplate(config, _render_alpaca)
    if name == "plain":
        return TextTemplate(config, _render_plain)
    return TextTemplate(config, _load_jinja_renderer(name, tokenizer), shows_conversation=True)


class TextTemplate:
    """A template that renders a prompt as text, to which the tokenizer adds its own BOS.

    The response follows the prompt, and EOS ends it.
    """

    end_of_turn: str | None = None

    def __init__(
        self,
        config: PromptConfig,
        format_prompt: Callable[[Sample, str], str],
        *,
        shows_conversation: bool = False,
    ) -> None:
        """format_prompt: text of a sample's prompt, from the sample and its instruction.
        shows_conversation: the template can show system text, earlier turns and tools.
        """
        self.config, self.format_prompt = config, format_prompt
        self.shows_conversation = shows_conversation

    def render_prompt(self, sample: Sample) -> str:
        """See `PromptTemplate`."""
        if not self.shows_conversation:
            self._check_single_turn(sample)
        return self.format_prompt(sample, self._instruction(sample))

    def render(self, sample: Sample) -> RenderedConversation:
        """See `PromptTemplate`."""
        prompt, response = self.render_prompt(sample), self._response(sample)
        return RenderedConversation(
            prompt + response,
            len(prompt),
            ((len(prompt), len(prompt) + len(response)),),
            append_eos=sample.ended,
            add_special_tokens=True,
            expected=(response.strip(),),
        )

    def _instruction(self, sample: Sample) -> str:
        if self.config.system_message != "first_user_turn":
            return sample.instruction
        return "\n\n".join([*_system_texts(sample), sample.instruction])

    def _response(self, sample: Sample) -> str:
        if sample.verbatim:
            return sample.response.content
        thought, content = split_thought(sample.response)
        if sample.response.tool_calls:
            raise DataError(
                f"{sample.label}: its response is a tool call, which "
                f"prompt.template={self.config.template} cannot show: use prompt.template=chat"
            )
        if self.config.reasoning == "drop":
            return content
        if sample.response.reasoning_content and self.config.reasoning == "template":
            raise DataError(
                f"{sample.label}: prompt.template={self.config.template} has no place for "
                "reasoning_content: set prompt.reasoning=inline to write it as "
                "<think>...</think>, or drop"
            )
        if sample.response.reasoning_content:
            return join_thought(thought, content)
        return sample.response.content

    def _check_single_turn(self, sample: Sample) -> None:
        """Raise DataError if the sample has turns or tools that the template cannot show."""
        template = self.config.template
        if _system_texts(sample) and self.config.system_message == "system_turn":
            raise DataError(
                f"{sample.label} has a system text, which prompt.template={template} cannot show: "
                "use prompt.template=chat, or set prompt.system_message to first_user_turn or drop"
            )
        earlier = [turn for turn in sample.prompt if turn.role not in (SYSTEM, DEVELOPER)][:-1]
        if earlier:
            raise DataError(
                f"{sample.label} has {len(earlier)} earlier turns, which prompt.template="
                f"{template} cannot show: use prompt.template=chat or a .jinja file"
            )
        if sample.tools:
            raise DataError(
                f"{sample.label} has tools, which prompt.template={template} cannot show: use "
                "prompt.template=chat, or set data.fields.tools=null to train without them"
            )


def _system_texts(sample: Sample) -> list[str]:
    texts = (turn.content for turn in sample.prompt if turn.role in (SYSTEM, DEVELOPER))
    return [text for text in texts if text]


def _render_alpaca(sample: Sample, instruction: str) -> str:
    template = ALPACA_WITH_INPUT if sample.input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=sample.input)


def _render_plain(sample: Sample, instruction: str) -> str:
    return f"{instruction}\n{sample.input}" if sample.input else instruction


def _load_jinja_renderer(name: str, tokenizer: Any) -> Callable[[Sample, str], str]:
    """The function that renders a sample's prompt with a .jinja file."""
    path = Path(os.path.expanduser(name))
    if path.suffix != ".jinja":
        raise RecipeError(f"prompt.template={name!r}: use alpaca, chat, plain, or a .jinja file")
    # Read and compile the template in a sandbox.
    try:
        source = path.read_text(encoding="utf-8")
        template = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        ).from_string(source)
    except OSError as error:
        raise RecipeError(
            f"prompt.template {name} cannot be read ({error.strerror}): check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"prompt.template {name} is not UTF-8 ({decode_fault(error)}): convert it"
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"prompt.template {name} line {error.lineno} is not valid Jinja ({error.message}): "
            "fix it"
        ) from None
    tokens = {key: getattr(tokenizer, key, None) or "" for key in ("bos_token", "eos_token")}

    def render(sample: Sample, instruction: str) -> str:
        messages = [turn.to_template() for turn in sample.prompt]
        last_user = max((i for i, turn in enumerate(sample.prompt) if turn.role == USER), default=0)
        history = [turn for turn in messages[:last_user] if turn["role"] in (USER, ASSISTANT)]
        try:
            with limited_rendering():
                return template.render(
                    instruction=instruction,
                    input=sample.input,
                    history=history,
                    system="\n\n".join(_system_texts(sample)),
                    messages=messages,
                    tools=list(sample.tools),
                    **tokens,
                )
        except TemplateCostError as error:
            raise DataError(
                f"{sample.label}: prompt.template {name} costs too much with it (it {error}): fix "
                "the template's loops and widths, or the record"
            ) from None
        except Exception as error:  # a template is a program
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{sample.label}: prompt.template {name} fails ({reason}): its variables are "
                "instruction, input, history, system, messages, tools, bos_token and eos_token"
            ) from None

    return render
