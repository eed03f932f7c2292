"""Teachers that answer samples: in an engine of this process, or at the servers of
`teacher.endpoint`, which are asked by token ids or by messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from pocl_ds.config import GenerationConfig, PromptConfig, TeacherConfig
from pocl_ds.data.conversation import DEVELOPER, SYSTEM, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer, SpecialTokensInText
from pocl_ds.errors import DataError
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import (
    Generator,
    ProgressCallback,
    SamplingParams,
    decode_response,
    find_stop_token_ids,
)
from pocl_ds.generation.served_model import ServedModel, connect_to_teacher
from pocl_ds.models.load import load_generation_config, load_teacher_tokenizer, resolve_model
from pocl_ds.models.token_checks import check_sequences, read_embedding_rows

Prompt = TypeVar("Prompt")


class Responder(Protocol):
    """A teacher that answers samples."""

    def respond(
        self, samples: Sequence[Sample], sampling: SamplingParams, on_progress: ProgressCallback
    ) -> Iterator[tuple[int, str, bool]]:
        """The response to each sample's prompt, in any order: the sample's place, the text, and
        whether the teacher ended it.
        """

    def close(self) -> None:
        """Free the teacher."""


class PromptReader:
    """Prompts of samples in the teacher's tokens, and its responses as texts."""

    def __init__(
        self, tokenizer: SampleTokenizer, stop_token_ids: Sequence[int], rows: Mapping[str, int]
    ) -> None:
        """tokenizer: of the teacher. rows: of its embedding, by its path."""
        self.tokenizer, self.stop_token_ids, self.rows = tokenizer, stop_token_ids, rows

    def prompts(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The ids that ask for each response. Raises ModelError for one that the teacher cannot
        read.
        """
        prompts = [self.tokenizer.tokenize_prompt(sample) for sample in samples]
        check_sequences(prompts, self.tokenizer.tokenizer, self.rows, "a prompt of the teacher")
        return prompts

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """A response's text, and whether an id that ends responses is its last."""
        text = decode_response(self.tokenizer.tokenizer, ids, self.stop_token_ids)
        return text, bool(ids) and ids[-1] in self.stop_token_ids


class LocalResponder:
    """See `Responder`: a teacher in an engine of this process."""

    def __init__(self, generator: Generator, reader: PromptReader) -> None:
        self.generator, self.reader = generator, reader

    def respond(
        self, samples: Sequence[Sample], sampling: SamplingParams, on_progress: ProgressCallback
    ) -> Iterator[tuple[int, str, bool]]:
        """See `Responder`."""
        prompts = self.reader.prompts(samples)
        for index, ids in enumerate(self.generator.generate_ids(prompts, sampling, on_progress)):
            yield index, *self.reader.text(ids)

    def close(self) -> None:
        """See `Responder`."""
        self.generator.close()


class ServedResponder(Generic[Prompt]):
    """See `Responder`: a served teacher, which gets several requests at a time.

    prepare: makes the prompts of samples. ask: sends one, with its place, for its seed.
    """

    def __init__(
        self,
        model: ServedModel,
        prepare: Callable[[Sequence[Sample]], Sequence[Prompt]],
        ask: Callable[[Prompt, SamplingParams, int], tuple[str, bool]],
    ) -> None:
        self.model, self._prepare, self._ask = model, prepare, ask

    def respond(
        self, samples: Sequence[Sample], sampling: SamplingParams, on_progress: ProgressCallback
    ) -> Iterator[tuple[int, str, bool]]:
        """See `Responder`."""
        answers = self.model.answer_all(
            self._prepare(samples), lambda prompt, index: self._ask(prompt, sampling, index)
        )
        for index, (text, ended) in answers:
            yield index, text, ended
            on_progress(1)

    def close(self) -> None:
        """See `Responder`."""
        self.model.close()


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """A sample's prompt as messages of OpenAI's form. Raises DataError for a sample without a
    prompt or with tools.
    """
    messages = sample.messages_with_input[:-1]
    if not messages:
        raise DataError(
            f"{sample.label} is a text without a prompt, and teacher.endpoint.api=chat answers "
            "messages: remove it, or set teacher.endpoint.api=completions"
        )
    if sample.tools:
        raise DataError(
            f"{sample.label} has tools, which teacher.endpoint.api=chat does not send: set "
            "teacher.endpoint.api=completions, or data.fields.tools=null to answer without them"
        )
    return [
        replace(message, role=SYSTEM if message.role == DEVELOPER else message.role).to_template()
        for message in messages
    ]


def open_responder(
    teacher: TeacherConfig,
    student_tokenizer: Any,
    prompt: PromptConfig,
    *,
    template: Literal["student", "own"],
    special_tokens_in_text: SpecialTokensInText,
    max_new_tokens: int,
    generation: GenerationConfig,
    threads: int | None,
    saved: str,
) -> Responder:
    """The teacher, loaded or connected to. Close it after use.

    template: whose chat template asks the teacher. generation: the settings of an engine in this
    process. threads: its CPU threads. saved: what a failure of a server does not lose. Raises
    ModelError or ResourceError.
    """
    if teacher.endpoint and teacher.is_text_only:
        model = connect_to_teacher(teacher.endpoint, saved=saved)
        return ServedResponder(
            model, lambda samples: [chat_messages(sample) for sample in samples], model.chat
        )

    # Overlong prompts are cut, never left out: each row gets a response.
    path = resolve_model(teacher)
    tokenizer = load_teacher_tokenizer(path, teacher, student_tokenizer, template)
    sample_tokenizer = SampleTokenizer(
        tokenizer, prompt, special_tokens_in_text=special_tokens_in_text, keep_all=True
    )
    rows = read_embedding_rows([(teacher, path)])
    max_length = prompt.max_prompt_tokens + max_new_tokens
    if teacher.endpoint is None:
        generator = open_generator(
            path,
            generation.model_copy(update={"dtype": teacher.dtype}),
            tokenizer,
            threads=threads,
            max_length=max_length,
            trust_remote_code=teacher.trust_remote_code,
            revision=teacher.revision,
            alternative="score.generation.backend=transformers",
        )
        reader = PromptReader(sample_tokenizer, generator.stop_token_ids, rows)
        return LocalResponder(generator, reader)
    stop_ids = find_stop_token_ids(tokenizer, load_generation_config(path, teacher.revision))
    model = connect_to_teacher(teacher.endpoint, saved=saved, max_length=max_length)
    reader = PromptReader(sample_tokenizer, stop_ids, rows)
    return ServedResponder(
        model,
        reader.prompts,
        lambda ids, sampling, index: reader.text(model.complete(ids, sampling, index, stop_ids)),
    )
