"""Prompt templates: from a sample to the text and the token ids of its prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocl_ds.data.conversation import Sample
from pocl_ds.errors import DataError, ModelError, RecipeError

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


# Llama 3's template writes today's date into the prompt unless the caller passes a date, and others
# read the clock. A prompt must not change between scoring and evaluation, so all templates get the
# default date of Llama's templates.
TEMPLATE_DATE = datetime(2024, 7, 26)


class PromptTemplate(Protocol):
    """Turns a sample into a prompt."""

    def render(self, sample: Sample) -> str:
        """The prompt as text."""

    def token_ids(self, sample: Sample) -> list[int]:
        """The prompt's token ids, special tokens included, not truncated."""

    def token_ids_batch(self, samples: Sequence[Sample]) -> list[list[int]]:
        """`token_ids` of many samples, tokenized together."""


def load_template(
    name: str, tokenizer: Any, options: Mapping[str, Any] | None = None
) -> PromptTemplate:
    """Load the template `alpaca`, `chat`, `plain`, or a .jinja file.

    options: variables for a tokenizer's chat template. Raises ModelError if the tokenizer has no
    chat template, RecipeError if the file is missing or invalid.
    """
    if name == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "prompt.template=chat, but the tokenizer has no chat template: use alpaca, plain "
                "or a .jinja file"
            )
        return _ChatTemplate(tokenizer, options or {})
    if name == "alpaca":
        return _TextTemplate(tokenizer, _render_alpaca)
    if name == "plain":
        return _TextTemplate(tokenizer, _render_plain)
    return _TextTemplate(tokenizer, _load_jinja_renderer(name))


class _TextTemplate:
    """A template that renders text, to which the tokenizer adds its own BOS."""

    def __init__(self, tokenizer: Any, format_sample: Callable[[Sample], str]) -> None:
        self.tokenizer, self.format_sample = tokenizer, format_sample

    def render(self, sample: Sample) -> str:
        return self.format_sample(sample)

    def token_ids(self, sample: Sample) -> list[int]:
        return self.token_ids_batch([sample])[0]

    def token_ids_batch(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [self.render(sample) for sample in samples]
        prompts: list[list[int]] = self.tokenizer(texts)["input_ids"]
        for ids in prompts:
            # Some tokenizers append EOS, but the response still has to follow.
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
        return prompts


class _ChatTemplate:
    """The tokenizer's own chat template, which adds every special token itself."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = {
            "date_string": TEMPLATE_DATE.strftime("%d %b %Y"),
            "strftime_now": TEMPLATE_DATE.strftime,
            **options,
        }

    def render(self, sample: Sample) -> str:
        request = f"{sample.instruction}\n\n{sample.input}" if sample.input else sample.instruction
        messages = [
            {"role": role, "content": content}
            for role, content in (*sample.history, ("user", request))
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.options
                )
            )
        # A template is a program, so any exception may occur.
        except Exception as error:
            raise DataError(
                f"sample {sample.id}: the chat template refuses its messages ({error}): fix or "
                "remove it"
            ) from None

    def token_ids(self, sample: Sample) -> list[int]:
        return self.token_ids_batch([sample])[0]

    def token_ids_batch(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [self.render(sample) for sample in samples]
        prompts: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return prompts


def _render_alpaca(sample: Sample) -> str:
    _refuse_history(sample, "alpaca")
    template = ALPACA_WITH_INPUT if sample.input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=sample.instruction, input=sample.input)


def _render_plain(sample: Sample) -> str:
    _refuse_history(sample, "plain")
    return f"{sample.instruction}\n{sample.input}" if sample.input else sample.instruction


def _refuse_history(sample: Sample, template: str) -> None:
    if sample.history:
        raise DataError(
            f"sample {sample.id} has {len(sample.history)} earlier turns, which "
            f"prompt.template={template} cannot show: use prompt.template=chat or a .jinja file"
        )


def _load_jinja_renderer(name: str) -> Callable[[Sample], str]:
    """The function that renders a sample with a .jinja file."""
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
            f"prompt.template {name} is not UTF-8 ({error.reason} at byte {error.start}): convert "
            "it"
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"prompt.template {name} line {error.lineno} is not valid Jinja ({error.message}): "
            "fix it"
        ) from None

    def render(sample: Sample) -> str:
        history = [{"role": role, "content": content} for role, content in sample.history]
        try:
            return template.render(
                instruction=sample.instruction, input=sample.input, history=history
            )
        except Exception as error:  # a template is a program
            reason = str(error) or type(error).__name__
            raise DataError(
                f"sample {sample.id}: prompt.template {name} fails ({reason}): its variables are "
                "instruction, input and history"
            ) from None

    return render
