"""From samples to token ids, and which of them train.

The whole text of a conversation is tokenized at once, so that tokens at the boundary of prompt and
response are those of the text. The prompt's tokens are those that scoring, rollouts and evaluation
ask with: where a token would span the end of the prompt, the two are tokenized apart, and counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.generated import runs_of
from pocl_ds.data.prompt_fitting import fit_prompt, without_text
from pocl_ds.data.rendered import RenderedConversation
from pocl_ds.data.templates import load_template
from pocl_ds.data.text_encoding import (
    EncodedText,
    JoinedEncoding,
    TextEncoder,
    escape_sample,
    sample_texts,
    special_tokens,
)
from pocl_ds.errors import DataError, ModelError

SpecialTokensInText = Literal["allow", "escape", "drop"]
OnInvalidSample = Callable[[Sample, DataError], object]
# Events that a `SampleTokenizer` counts, one per sample, as logs and manifests name them.
EVENTS = {
    "history_truncated": "lost earlier turns to prompt.max_prompt_tokens",
    "text_truncated": "have shortened texts in their prompt",
    "response_truncated": "have a response that prompt.max_length cut",
    "overlong_dropped": "were left out, because their prompt or response is too long",
    "special_tokens_in_text": "contain the text of a special token",
    "end_token_removed": "ended with the text of the end token, which was removed",
    "boundary_split": "have a prompt and a response that would share a token, and are tokenized "
    "apart",
    "empty_thought": "have no thought where the prompt opens one, and train an empty thought",
    "altered_text": "have a response that does not decode back to the text of the record",
}


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids of a conversation through the end of its last response."""

    ids: list[int]
    prompt_tokens: int  # before the last response
    loss_mask: NDArray[np.bool_]  # which tokens train: [len(ids)]
    truncated: bool  # turns, texts or the end of the response were cut off


class SampleTokenizer:
    """Turns samples into token ids with one tokenizer and one prompt configuration."""

    def __init__(
        self,
        tokenizer: Any,
        config: PromptConfig,
        *,
        special_tokens_in_text: SpecialTokensInText = "allow",
        keep_all: bool = False,
    ) -> None:
        """keep_all: leave out no sample: a question that is too long is cut, and special tokens
        are escaped where samples with them would be dropped.

        Raises ModelError if the tokenizer has no EOS token.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so a response would never end: set eos_token in "
                "its folder"
            )
        self.tokenizer, self.config = tokenizer, config
        self.template = load_template(tokenizer, config)
        if keep_all and special_tokens_in_text == "drop":
            special_tokens_in_text = "escape"
        self.encoder = TextEncoder(tokenizer, escapes=special_tokens_in_text == "escape")
        self.special_tokens_in_text, self.keep_all = special_tokens_in_text, keep_all
        self.counts: Counter[str] = Counter()  # of EVENTS
        end = self.template.end_of_turn
        self.end_of_turn_ids = list(
            dict.fromkeys(
                [
                    *([int(tokenizer.convert_tokens_to_ids(end))] if end else []),
                    int(tokenizer.eos_token_id),
                ]
            )
        )
        self._special_ids = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
        ends = [end, tokenizer.eos_token]
        pattern = "|".join(re.escape(text) for text in ends if text)
        self._trailing_end = re.compile(rf"\s*(?:(?:{pattern})\s*)+\Z")
        self._end_texts = tuple(text for text in ends if text)

    # Texts.

    def clean(self, sample: Sample) -> Sample:
        """The sample without the text of an end token at the end of its references."""
        texts = (sample.response.content, *sample.other_references)
        # Most texts do not end so, and the pattern is slow to find that out.
        if not any(text.rstrip().endswith(self._end_texts) for text in texts):
            return sample
        content, *references = (self._trailing_end.sub("", text) for text in texts)
        if (content, *references) == texts:
            return sample
        self.counts["end_token_removed"] += 1
        response = replace(sample.response, content=content)
        return replace(
            sample, messages=(*sample.prompt, response), other_references=tuple(references)
        )

    def render_prompt(self, sample: Sample) -> str:
        """The text that asks for the sample's last response. Raises DataError."""
        return self.template.render_prompt(sample) if sample.prompt else ""

    def render(self, sample: Sample) -> RenderedConversation:
        """The whole text, and the ranges of characters that train. Raises DataError."""
        if sample.prompt:
            return self.template.render(sample)
        text = sample.response.content  # a text without a prompt needs no template
        return RenderedConversation(
            text, 0, ((0, len(text)),), append_eos=sample.ended, add_special_tokens=True
        )

    # Prompts.

    def tokenize_prompt(self, sample: Sample) -> list[int]:
        """The ids that ask for a sample's last response, at most prompt.max_prompt_tokens.

        A prompt that is too long loses turns and texts as prompt.overlong says, and at last the end
        of its question. Raises DataError if the prompt is empty.
        """
        return self.tokenize_prompts([sample])[0][0]

    def tokenize_prompts(self, samples: Sequence[Sample]) -> tuple[list[list[int]], int]:
        """Tokenize many prompts, and count those that were cut.

        Every prompt needs a response, so none is left out. Raises DataError if a prompt is empty,
        or too long with prompt.overlong=error.
        """
        prepared = [self._escaped(sample) for sample in samples]
        prompts, cut = self._prompt_ids(prepared), 0
        for index, sample in enumerate(prepared):
            if not prompts[index]:
                self._refuse_empty_prompt(sample)
            if len(prompts[index]) <= self.config.max_prompt_tokens:
                continue
            if self.config.overlong == "error":
                self._refuse_overlong(sample, len(prompts[index]), None)
            cut += 1
            shorter = fit_prompt(sample, self._fits, cut_texts=True, cut_question=True)
            ids = self._prompt_ids([shorter or without_text(sample)])[0]
            prompts[index] = ids[: self.config.max_prompt_tokens]
        return prompts, cut

    def _prompt_ids(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [self.render_prompt(sample) for sample in samples]
        encoded = self.encoder.encode(texts, self.config.template != "chat")
        return [result.ids for result in encoded]

    def _fits(self, sample: Sample) -> bool:
        return len(self._prompt_ids([sample])[0]) <= self.config.max_prompt_tokens

    # Prompts with responses.

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Tokenize a sample, which must fit: see `tokenize_many`."""
        (tokenized,) = self.tokenize_many([sample])
        if tokenized is None:
            raise DataError(
                f"{sample.label} is too long or contains a special token, and the recipe leaves "
                "such samples out: change prompt.overlong or data.special_tokens_in_text",
                reason="left out",
            )
        return tokenized

    def tokenize_many(
        self, samples: Sequence[Sample], on_invalid: OnInvalidSample | None = None
    ) -> list[TokenizedSample | None]:
        """Tokenize many samples at once; None for one that is left out, which `counts` counts.

        on_invalid: receives the DataError of a sample that the template refuses, which is then left
        out. Raises DataError if a prompt is empty, or too long with prompt.overlong=error.
        """
        # Render every sample.
        rendered: list[RenderedConversation | None] = []
        prepared: list[Sample] = []
        for sample in samples:
            sample, text = self._render_or_none(self.clean(sample), on_invalid)
            prepared.append(sample)
            rendered.append(text)

        # Encode them together, and find the tokens that train.
        results: list[TokenizedSample | None] = [None] * len(samples)
        for add in (True, False):
            rows = [i for i, r in enumerate(rendered) if r and r.add_special_tokens == add]
            texts = [rendered[i].text for i in rows]  # type: ignore[union-attr]
            for i, encoded in zip(rows, self.encoder.encode(texts, add), strict=True):
                try:
                    results[i] = self._tokenize_rendered(prepared[i], rendered[i], encoded)
                except DataError as error:
                    if on_invalid is None:
                        raise
                    on_invalid(prepared[i], error)
        self._count_altered(rendered, results)
        return results

    def _escaped(self, sample: Sample) -> Sample:
        if self.special_tokens_in_text != "escape":
            return sample
        return escape_sample(self.encoder, sample)

    def _unescaped(self, text: str) -> str:
        return self.encoder.unescape(text) if self.encoder.escapes else text

    def _render_or_none(
        self, sample: Sample, on_invalid: OnInvalidSample | None
    ) -> tuple[Sample, RenderedConversation | None]:
        """The sample as the template gets it, and its text; None if it is left out."""
        if any(map(self.encoder.contains_special_token, sample_texts(sample))):
            self.counts["special_tokens_in_text"] += 1
            if self.special_tokens_in_text == "drop":
                return sample, None
        sample = self._escaped(sample)
        try:
            return sample, self.render(sample)
        except DataError as error:
            if on_invalid is None:
                raise
            on_invalid(sample, error)
            return sample, None

    def _tokenize_rendered(
        self, sample: Sample, rendered: RenderedConversation | None, encoded: EncodedText
    ) -> TokenizedSample | None:
        """The sample's tokens within the limits; None if it is left out."""
        assert rendered is not None
        prompt_tokens, encoded = self._split_at_prompt(sample, rendered, encoded)
        truncated = False
        total = len(encoded.ids) + rendered.append_eos
        if prompt_tokens > self.config.max_prompt_tokens or total > self.config.max_length:
            if self.config.overlong == "error":
                self._refuse_overlong(sample, prompt_tokens, total)
            if self.config.overlong == "drop" and not self.keep_all:
                self.counts["overlong_dropped"] += 1
                return None
            truncated = True
        if prompt_tokens > self.config.max_prompt_tokens:
            shorter = self._shorten(sample)
            if shorter is None:
                self.counts["overlong_dropped"] += 1
                return None
            sample, rendered = shorter, self.render(shorter)
            encoded = self.encoder.encode([rendered.text], rendered.add_special_tokens)[0]
            prompt_tokens, encoded = self._split_at_prompt(sample, rendered, encoded)
        if rendered.empty_thought:
            self.counts["empty_thought"] += 1
        return self._within_limit(rendered, encoded, prompt_tokens, truncated)

    def _split_at_prompt(
        self, sample: Sample, rendered: RenderedConversation, encoded: EncodedText
    ) -> tuple[int, EncodedText]:
        """The number of prompt tokens, and the tokens: apart where one would span the boundary.

        The prompt of a text is its first token.
        """
        if not sample.prompt:
            return max(1, encoded.tokens_before(0)[0]), encoded
        count, exact = encoded.tokens_before(rendered.prompt_length)
        if not exact:
            texts = [rendered.text[: rendered.prompt_length]]
            prompt = self.encoder.encode(texts, rendered.add_special_tokens)[0]
            if prompt.ids != encoded.ids[:count]:
                self.counts["boundary_split"] += 1
                text = rendered.text[rendered.prompt_length :]
                response = self.encoder.encode_continuation(text)
                count = len(prompt.ids)
                encoded = JoinedEncoding(prompt, response, rendered.prompt_length)
        if not count:  # nothing would predict the first token of the response
            self._refuse_empty_prompt(sample)
        return count, encoded

    def _shorten(self, sample: Sample) -> Sample | None:
        """The sample with a prompt that fits; None if it is to be left out."""
        cut_texts = self.config.overlong == "truncate_text" or self.keep_all
        shorter = fit_prompt(sample, self._fits, cut_texts=cut_texts, cut_question=self.keep_all)
        if shorter is None:
            return without_text(sample) if self.keep_all else None
        self.counts["history_truncated"] += len(shorter.messages) < len(sample.messages)
        same = all(message in sample.messages for message in shorter.messages)
        self.counts["text_truncated"] += not same or shorter.input != sample.input
        return shorter

    def _within_limit(
        self,
        rendered: RenderedConversation,
        encoded: EncodedText,
        prompt_tokens: int,
        truncated: bool,
    ) -> TokenizedSample:
        """The first prompt.max_length tokens, with the mask of those that train."""
        ids = list(encoded.ids)
        mask = np.zeros(len(ids) + 1, np.bool_)
        for start, end in rendered.trained[:-1]:
            first, exact = encoded.tokens_before(start)
            if not exact and ids[first] in self._special_ids:  # it took white space of the turn
                first += 1
            last, exact = encoded.tokens_before(end)
            mask[first : last + (not exact)] = True
        start, _ = rendered.trained[-1]
        later = start > rendered.prompt_length  # a template's block that begins after its prompt
        mask[encoded.tokens_before(start)[0] if later else prompt_tokens :] = True
        if rendered.append_eos or len(ids) == prompt_tokens:  # a sample needs a loss token
            ids.append(self.end_of_turn_ids[0])
        if len(ids) > self.config.max_length:
            self.counts["response_truncated"] += 1
            truncated = True
            limit = self.config.max_length
            while limit > prompt_tokens + 1 and encoded.ends_inside_character(limit):
                limit -= 1
            ids = ids[:limit]
        return TokenizedSample(ids, min(prompt_tokens, len(ids)), mask[: len(ids)], truncated)

    # What users are told.

    def _count_altered(
        self,
        rendered: Sequence[RenderedConversation | None],
        results: Sequence[TokenizedSample | None],
    ) -> None:
        """Count samples whose trained tokens do not decode to the text of the record."""
        rows: list[int] = []
        spans: list[list[int]] = []
        for row, result in enumerate(results):
            if result is not None and not result.truncated:
                for run in runs_of(result.loss_mask):
                    rows.append(row)
                    spans.append(result.ids[run])
        decoded = dict.fromkeys(rows, "")
        texts = self.encoder.decode(spans)
        for row, text in zip(rows, texts, strict=True):
            decoded[row] += text
        for row, text in decoded.items():
            conversation = rendered[row]
            expected = conversation.expected if conversation else ()
            trained = _normalize(text)
            self.counts["altered_text"] += any(
                _normalize(self._unescaped(part)) not in trained for part in expected
            )

    def _refuse_empty_prompt(self, sample: Sample) -> None:
        raise DataError(
            f"{sample.label}: prompt.template={self.config.template} gives an empty prompt: fix it",
            reason="empty prompt",
        )

    def _refuse_overlong(self, sample: Sample, prompt_tokens: int, total: int | None) -> None:
        limit, max_length = self.config.max_prompt_tokens, self.config.max_length
        in_all = "" if total is None else f" and {total} in all (limit {max_length})"
        remedy = "raise prompt.max_prompt_tokens"
        raise DataError(
            f"{sample.label} has {prompt_tokens} prompt tokens (limit {limit}){in_all}: {remedy}"
            f"{'' if total is None else ' or prompt.max_length'}, or set prompt.overlong",
            reason="too long",
        )


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.split()))
