"""Where the thought at the beginning of a response ends and its answer begins, as texts and as
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.thoughts import TAGS, open_thought

PROMPT_TAIL = 16  # last tokens of a prompt, which may open a thought
# Tokens that are decoded at once, and those before them that may hold the beginning of a tag.
WINDOW, OVERLAP = 256, 32

TokenIds = Sequence[int] | NDArray[Any]


def answer_of(response: str, *, prompt_opens_thought: bool) -> tuple[str, bool]:
    """The text after a response's thought, and whether the thought has an end. A response without a
    thought is an answer; one that never ends its thought has none.
    """
    for tags in TAGS:
        if tags.closing in response:
            return response.partition(tags.closing)[2].strip(), True
    opens = any(response.lstrip().startswith(tags.opening) for tags in TAGS)
    return ("", False) if opens or prompt_opens_thought else (response, True)


class ThoughtFinder:
    """Finds thoughts in token ids of one tokenizer.

    Where a closing tag is one token, as in the vocabularies of most reasoning models, its id is
    looked for. Other tags are looked for in the decoded text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
        single = []
        for tags in TAGS:
            ids = tokenizer(tags.closing, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and self._decode(ids).strip() == tags.closing:
                single.append(ids[0])
        self._closing_ids = np.array(single, np.int64)

    def prompt_opens(self, prompt: TokenIds) -> bool:
        """Whether a prompt ends with the opening tag of a thought."""
        return open_thought(self._decode(_as_list(prompt[-PROMPT_TAIL:]))) is not None

    def answer_start(self, response: TokenIds) -> int | None:
        """The place of the first token after the thought of a response; None without a closing
        tag.
        """
        ids = np.asarray(response, np.int64)
        places = np.flatnonzero(np.isin(ids, self._closing_ids))
        if len(places):
            return int(places[0]) + 1
        for start in range(0, len(ids), WINDOW):
            first = max(0, start - OVERLAP)
            window = ids[first : start + WINDOW].tolist()
            if self._has_closing_tag(window):
                return first + self._shortest_prefix(window)
        return None

    def thought_tokens(self, prompt: TokenIds, response: TokenIds) -> int:
        """How many tokens at the beginning of a response are its thought, with both tags: all of
        them if it never ends, 0 without a thought. prompt: what comes before the response.
        """
        start = self.answer_start(response)
        if start is not None:
            return start
        beginning = self._decode(_as_list(response[:PROMPT_TAIL])).lstrip()
        opens = any(beginning.startswith(tags.opening) for tags in TAGS)
        return len(response) if opens or self.prompt_opens(prompt) else 0

    def _has_closing_tag(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return any(tags.closing in text for tags in TAGS)

    def _shortest_prefix(self, ids: list[int]) -> int:
        """Length of the shortest prefix whose text has a closing tag: longer ones have it too."""
        shortest, longest = 1, len(ids)
        while shortest < longest:
            middle = (shortest + longest) // 2
            if self._has_closing_tag(ids[:middle]):
                longest = middle
            else:
                shortest = middle + 1
        return longest


def _as_list(ids: TokenIds) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
