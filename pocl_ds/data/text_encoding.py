"""From text to token ids, with the place of every token in the text."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pocl_ds.data.conversation import Message, Sample

# A character of a private plane stands for each special token that is ordinary text, so that a
# template cannot confuse it with its own tokens. Texts that use this plane are escaped too.
FIRST_PLACEHOLDER = 0xF0000
_PLACEHOLDER = re.compile("[\U000f0000-\U000fffff]")
MAX_GAP = 16  # characters that a tokenizer may leave without a token, such as white space


class EncodedText(Protocol):
    """The tokens of a text."""

    ids: list[int]

    def tokens_before(self, position: int) -> tuple[int, bool]:
        """How many tokens lie before a character, and whether a token begins exactly there."""

    def ends_inside_character(self, count: int) -> bool:
        """Whether the first `count` tokens end within the bytes of a character."""

    def span(self, token: int) -> tuple[int, int]:
        """Start and end of a token in the text, in characters; equal if it has no text."""


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of all special tokens, longest first.

    `all_special_tokens` has only those with a role such as EOS. Others are marked in the vocabulary
    alone, as `<|eot_id|>` in Llama 3's base models and `<|end|>` in Phi-3's.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


class TextEncoder:
    """Encodes texts with one tokenizer."""

    def __init__(self, tokenizer: Any, *, escapes: bool = False) -> None:
        """escapes: the texts to encode went through `escape`."""
        self.tokenizer, self.escapes = tokenizer, escapes
        self._literals = special_tokens(tokenizer)  # what the placeholders stand for
        self._first_letters = {token[0] for token in self._literals if token}
        self._special = re.compile("|".join(map(re.escape, self._literals)) or r"(?!)")
        self._adds_bos = self._has_bos()

    def contains_special_token(self, text: str) -> bool:
        """Whether a text contains the text of a special token."""
        if not any(letter in text for letter in self._first_letters):  # much faster
            return False
        return self._special.search(text) is not None

    def escape(self, text: str) -> str:
        """The text with a placeholder for each special token that it contains."""
        text = _PLACEHOLDER.sub(self._placeholder, text)
        return self._special.sub(self._placeholder, text)

    def _placeholder(self, match: re.Match[str]) -> str:
        if match[0] not in self._literals:
            self._literals.append(match[0])
        return chr(FIRST_PLACEHOLDER + self._literals.index(match[0]))

    def unescape(self, text: str) -> str:
        """The text that `escape` was given."""
        return _PLACEHOLDER.sub(lambda match: self._literal_of(match[0]), text)

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[EncodedText]:
        """Encode texts. A placeholder becomes the ordinary tokens of its special token.

        add_special_tokens: add the tokenizer's BOS, unless the text begins with it, but no EOS.
        """
        results: list[EncodedText | None] = [None] * len(texts)
        plain: dict[bool, list[int]] = {True: [], False: []}
        for index, text in enumerate(texts):
            add = add_special_tokens and not self._begins_with_bos(text)
            if self.escapes and not text.isascii() and _PLACEHOLDER.search(text):
                results[index] = self._encode_pieces(text, add)
            else:
                plain[add].append(index)
        for add, indices in plain.items():
            encoded = self._encode_plain([texts[index] for index in indices], add)
            for index, result in zip(indices, encoded, strict=True):
                results[index] = result
        return [result for result in results if result is not None]

    def decode(self, sequences: Sequence[list[int]]) -> list[str]:
        """The texts of sequences of token ids, special tokens included."""
        if self.tokenizer.is_fast:  # without the conversions of transformers, twice as fast
            backend = self.tokenizer.backend_tokenizer
            return list(backend.decode_batch(sequences, skip_special_tokens=False))
        return list(self.tokenizer.batch_decode(sequences, skip_special_tokens=False))

    def _encode_plain(self, texts: list[str], add_special_tokens: bool) -> list[EncodedText]:
        if not texts:
            return []
        batch = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # the limits of the recipe apply, not those of the tokenizer
        )
        ids, encodings = batch["input_ids"], batch.encodings
        if encodings is None:  # a tokenizer in Python, which gives no offsets
            return [
                _PrefixEncoding(self, text, list(row), add_special_tokens)
                for text, row in zip(texts, ids, strict=True)
            ]
        eos_id = self.tokenizer.eos_token_id
        return [
            _FastEncoding(text, row, encoding, eos_id)
            for text, row, encoding in zip(texts, ids, encodings, strict=True)
        ]

    def _encode_pieces(self, text: str, add_special_tokens: bool | None) -> EncodedText:
        """Encode the text between placeholders, and each placeholder as ordinary text.

        add_special_tokens: None for a text that follows another one.
        """
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []

        position = 0
        for match in [*_PLACEHOLDER.finditer(text), None]:
            end = match.start() if match else len(text)
            if piece := text[position:end]:
                if position or add_special_tokens is None:
                    part = self._encode_plain_continuation(piece)
                else:
                    part = self._encode_plain([piece], add_special_tokens)[0]
                spans = [part.span(number) for number in range(len(part.ids))]
                ids += part.ids
                starts += [position + start for start, _ in spans]
                ends += [position + end for _, end in spans]
            if match:
                begins = add_special_tokens if match.start() == 0 else None
                literal = self._encode_literal(self._literal_of(match[0]), begins)
                ids += literal
                starts += [match.start()] * len(literal)
                ends += [match.end()] * len(literal)
                position = match.end()
        return _PieceEncoding(ids, starts, ends)

    def encode_continuation(self, text: str) -> EncodedText:
        """Encode a text that follows another one, so that a SentencePiece tokenizer puts no space
        before it.
        """
        if self.escapes and _PLACEHOLDER.search(text):
            return self._encode_pieces(text, None)
        return self._encode_plain_continuation(text)

    def _encode_plain_continuation(self, text: str) -> EncodedText:
        # The first lead that shares no token with the text.
        for lead in ("\n", "a", str(self.tokenizer.eos_token)):
            encoded = self._encode_plain([lead + text], add_special_tokens=False)[0]
            first, exact = encoded.tokens_before(len(lead))
            if exact:
                break
        spans = [encoded.span(number) for number in range(first, len(encoded.ids))]
        return _PieceEncoding(
            encoded.ids[first:],
            [start - len(lead) for start, _ in spans],
            [end - len(lead) for _, end in spans],
        )

    def _encode_literal(self, token: str, begins: bool | None) -> list[int]:
        """The ordinary tokens of a special token's text. begins: whether the tokenizer adds its BOS
        to a text that begins with it; None within a text.
        """
        if begins is not None:
            return list(
                self.tokenizer(token, add_special_tokens=begins, split_special_tokens=True)[
                    "input_ids"
                ]
            )
        for lead in ("a", ""):  # no space of a SentencePiece tokenizer before the text
            batch = self.tokenizer(
                lead + token, add_special_tokens=False, split_special_tokens=True
            )
            ids: list[int] = list(batch["input_ids"])
            lead_ids: list[int] = self.tokenizer(lead, add_special_tokens=False)["input_ids"]
            if lead_ids == ids[: len(lead_ids)]:
                return ids[len(lead_ids) :]
        return ids

    def _literal_of(self, placeholder: str) -> str:
        return self._literals[ord(placeholder) - FIRST_PLACEHOLDER]

    def _has_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _begins_with_bos(self, text: str) -> bool:
        return self._adds_bos and text.startswith(str(self.tokenizer.bos_token))


def escape_sample(encoder: TextEncoder, sample: Sample) -> Sample:
    """The sample with placeholders for the special tokens in its texts."""

    def escape(message: Message) -> Message:
        return replace(
            message,
            content=encoder.escape(message.content),
            reasoning_content=encoder.escape(message.reasoning_content),
            tool_calls=tuple(_escape_tree(encoder, call) for call in message.tool_calls),
        )

    return replace(
        sample,
        messages=tuple(map(escape, sample.messages)),
        input=encoder.escape(sample.input),
        tools=tuple(_escape_tree(encoder, tool) for tool in sample.tools),
    )


def sample_texts(sample: Sample) -> list[str]:
    """The texts of a sample that a template shows."""
    texts = [sample.input, *_tree_texts(list(sample.tools))]
    for message in sample.messages:
        texts += [message.content, message.reasoning_content]
        texts += _tree_texts(list(message.tool_calls))
    return texts


def _escape_tree(encoder: TextEncoder, tree: Any) -> Any:
    """A JSON value with its texts escaped."""
    if isinstance(tree, str):
        return encoder.escape(tree)
    if isinstance(tree, dict):
        return {encoder.escape(key): _escape_tree(encoder, tree[key]) for key in tree}
    return [_escape_tree(encoder, item) for item in tree] if isinstance(tree, list) else tree


def _tree_texts(tree: Any) -> Iterator[str]:
    """The texts of a JSON value."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _tree_texts(item)


class _FastEncoding:
    """The tokens of a tokenizer of the library `tokenizers`, which knows their offsets."""

    def __init__(self, text: str, ids: list[int], encoding: Any, eos_id: int | None) -> None:
        self.text, self.ids, self.encoding = text, ids, encoding
        # Some tokenizers append EOS, which is not part of the text.
        while len(ids) > 1 and ids[-1] == eos_id and not self._has_text(len(ids) - 1):
            ids.pop()

    def _has_text(self, token: int) -> bool:
        start, end = self.span(token)
        return end > start

    def span(self, token: int) -> tuple[int, int]:
        """See `EncodedText`."""
        start, end = self.encoding.token_to_chars(token) or (0, 0)
        return int(start), int(end)

    def tokens_before(self, position: int) -> tuple[int, bool]:
        """See `EncodedText`."""
        # The first token that covers this character or a later one.
        token = None
        for place in range(position, min(position + MAX_GAP, len(self.text))):
            token = self.encoding.char_to_token(place)
            if token is not None:
                break
        if token is None:
            return len(self.ids), True
        before = self.span(token - 1) if token else (0, 0)
        gap = before[0] < before[1] < position
        return token, self.span(token)[0] >= position and not gap

    def ends_inside_character(self, count: int) -> bool:
        """See `EncodedText`."""
        if not 0 < count < len(self.ids):
            return False
        return self.span(count - 1)[1] > self.span(count)[0] < self.span(count)[1]


class _PrefixEncoding:
    """The tokens of a tokenizer without offsets: tokenizing a prefix says where it ends."""

    def __init__(
        self, encoder: TextEncoder, text: str, ids: list[int], add_special_tokens: bool
    ) -> None:
        self.encoder, self.text, self.ids = encoder, text, ids
        self.add_special_tokens = add_special_tokens
        if len(ids) > 1 and add_special_tokens and ids[-1] == encoder.tokenizer.eos_token_id:
            ids.pop()

    def tokens_before(self, position: int) -> tuple[int, bool]:
        """See `EncodedText`."""
        if position >= len(self.text):
            return len(self.ids), True
        prefix = self.encoder._encode_plain([self.text[:position]], self.add_special_tokens)[0].ids
        common = 0
        for one, other in zip(prefix, self.ids, strict=False):
            if one != other:
                break
            common += 1
        return common, common == len(prefix)

    def ends_inside_character(self, count: int) -> bool:
        """See `EncodedText`."""
        if not 0 < count < len(self.ids):
            return False
        return str(self.encoder.tokenizer.decode(self.ids[:count])).endswith("\ufffd")

    def span(self, token: int) -> tuple[int, int]:
        """See `EncodedText`."""
        decode = self.encoder.tokenizer.decode
        return len(decode(self.ids[:token])), len(decode(self.ids[: token + 1]))


class _PieceEncoding:
    """Tokens with their offsets in lists."""

    def __init__(self, ids: list[int], starts: list[int], ends: list[int]) -> None:
        self.ids, self.starts, self.ends = ids, starts, ends

    def tokens_before(self, position: int) -> tuple[int, bool]:
        """See `EncodedText`."""
        token = bisect.bisect_right(self.ends, position)
        if token == len(self.ids):
            return token, True
        return token, self.starts[token] >= position

    def ends_inside_character(self, count: int) -> bool:
        """See `EncodedText`."""
        return 0 < count < len(self.ids) and self.ends[count - 1] > self.starts[count]

    def span(self, token: int) -> tuple[int, int]:
        """See `EncodedText`."""
        return self.starts[token], self.ends[token]


class JoinedEncoding:
    """A prompt and a response that were encoded apart."""

    def __init__(self, prompt: EncodedText, response: EncodedText, boundary: int) -> None:
        self.prompt, self.response, self.boundary = prompt, response, boundary
        self.ids = [*prompt.ids, *response.ids]

    def tokens_before(self, position: int) -> tuple[int, bool]:
        """See `EncodedText`."""
        if position < self.boundary:
            return self.prompt.tokens_before(position)
        count, exact = self.response.tokens_before(position - self.boundary)
        return len(self.prompt.ids) + count, exact

    def ends_inside_character(self, count: int) -> bool:
        """See `EncodedText`."""
        return self.response.ends_inside_character(count - len(self.prompt.ids))

    def span(self, token: int) -> tuple[int, int]:
        """See `EncodedText`."""
        if token < len(self.prompt.ids):
            return self.prompt.span(token)
        start, end = self.response.span(token - len(self.prompt.ids))
        return start + self.boundary, end + self.boundary
