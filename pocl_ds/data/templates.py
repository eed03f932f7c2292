"""Templates: from a sample to the text, and the ids, that a model is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocl_ds.data.records import Sample
from pocl_ds.errors import DataError, ModelError, RecipeError

# The template of Stanford Alpaca, as MiniLLM and the POCL release use it.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


# Templates of Llama 3 write today's date into the prompt unless they are told one, others ask a
# clock; a sample's prompt must not change between the day it is scored and the day it is evaluated.
# This is the date that Llama's templates fall back on.
DATE = datetime(2024, 7, 26)


class PromptTemplate(Protocol):
    """How a sample is put to a model."""

    def text(self, sample: Sample) -> str:
        """The prompt as a person reads it."""

    def ids(self, sample: Sample) -> list[int]:
        """The prompt's token ids, special tokens included, not cut."""

    def many(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The ids of many prompts, tokenised together; equal to `ids` of each."""


def load_template(
    name: str, tokenizer: Any, options: Mapping[str, Any] | None = None
) -> PromptTemplate:
    """The template of a recipe: `alpaca`, `chat`, `plain`, or a .jinja file. options: variables for
    a tokenizer's chat template.

    Raises ModelError where the tokenizer has no chat template, RecipeError for a file that is
    missing or broken.
    """
    if name == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "prompt.template=chat, but the tokenizer has no chat template: use alpaca, plain "
                "or a .jinja file"
            )
        return _Chat(tokenizer, options or {})
    if name == "alpaca":
        return _Text(tokenizer, _alpaca)
    if name == "plain":
        return _Text(tokenizer, _plain)
    return _Text(tokenizer, _jinja(name))


class _Text:
    """A template that gives text; the tokenizer adds its own BOS."""

    def __init__(self, tokenizer: Any, render: Any) -> None:
        self.tokenizer, self.render = tokenizer, render

    def text(self, sample: Sample) -> str:
        return str(self.render(sample))

    def ids(self, sample: Sample) -> list[int]:
        return self.many([sample])[0]

    def many(self, samples: Sequence[Sample]) -> list[list[int]]:
        prompts: list[list[int]] = self.tokenizer([self.text(sample) for sample in samples])[
            "input_ids"
        ]
        for ids in prompts:
            # Some tokenizers close what they encode with EOS: a prompt is not finished.
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
        return prompts


class _Chat:
    """The tokenizer's own chat template, which places every special token itself."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = {
            "date_string": DATE.strftime("%d %b %Y"),
            "strftime_now": DATE.strftime,
            **options,
        }

    def text(self, sample: Sample) -> str:
        asked = f"{sample.instruction}\n\n{sample.input}" if sample.input else sample.instruction
        turns = [
            {"role": role, "content": content}
            for role, content in (*sample.history, ("user", asked))
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True, **self.options
                )
            )
        except Exception as error:  # a template is a program: it divides by zero, recurses, adds a text to a number
            raise DataError(
                f"sample {sample.id}: the chat template refuses its turns ({error}): mend or "
                f"remove it"
            ) from None

    def ids(self, sample: Sample) -> list[int]:
        return self.many([sample])[0]

    def many(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [self.text(sample) for sample in samples]
        prompts: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return prompts


def _alpaca(sample: Sample) -> str:
    _no_history(sample, "alpaca")
    template = ALPACA_WITH_INPUT if sample.input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=sample.instruction, input=sample.input)


def _plain(sample: Sample) -> str:
    _no_history(sample, "plain")
    return f"{sample.instruction}\n{sample.input}" if sample.input else sample.instruction


def _no_history(sample: Sample, template: str) -> None:
    if sample.history:
        raise DataError(
            f"sample {sample.id} has {len(sample.history)} earlier turns, which "
            f"prompt.template={template} cannot show: "
            "use prompt.template=chat or a .jinja file"
        )


def _jinja(name: str) -> Any:
    path = Path(os.path.expanduser(name))
    if path.suffix != ".jinja":
        raise RecipeError(f"prompt.template={name!r}: take alpaca, chat, plain, or a .jinja file")
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
            f"it"
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"prompt.template {name} line {error.lineno} is not valid Jinja ({error.message}): "
            f"mend it"
        ) from None

    def render(sample: Sample) -> str:
        history = [{"role": role, "content": content} for role, content in sample.history]
        try:
            return template.render(
                instruction=sample.instruction, input=sample.input, history=history
            )
        except Exception as error:  # as above
            reason = str(error) or type(error).__name__
            raise DataError(
                f"sample {sample.id}: prompt.template {name} fails ({reason}): its variables are "
                f"instruction, "
                "input and history"
            ) from None

    return render
