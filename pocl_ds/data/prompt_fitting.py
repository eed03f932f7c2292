"""Shorten a conversation until its prompt fits, without cutting the question.

The earliest turns go first, then texts around the question are cut at their ends: the input, tool
results, system text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from pocl_ds.data.conversation import DEVELOPER, SYSTEM, TOOL, USER, Sample

Fits: TypeAlias = Callable[[Sample], bool]


def fit_prompt(sample: Sample, fits: Fits, *, cut_texts: bool, cut_question: bool) -> Sample | None:
    """The sample with the longest prompt that fits; None if none does.

    cut_texts: also shorten input, tool results and system text. cut_question: at last also the
    question, the last user message.
    """
    for shorter in _without_early_turns(sample):
        if fits(shorter):
            return shorter
        sample = shorter
    if not cut_texts:
        return None
    texts = [_INPUT] if sample.input else []
    roles = [message.role for message in sample.prompt]
    texts += [index for index, role in enumerate(roles) if role == TOOL]
    texts += [index for index, role in enumerate(roles) if role in (SYSTEM, DEVELOPER)]
    if cut_question:
        texts += [index for index, role in enumerate(roles) if role == USER][-1:]
    for index in texts:
        cut = _cut_text(sample, index, fits)
        if cut is not None:
            return cut
        sample = _with_text(sample, index, "")
    return None


def without_text(sample: Sample) -> Sample:
    """The sample with empty texts in its prompt, as the shortest one a template can render."""
    for index in range(len(sample.prompt)):
        sample = _with_text(sample, index, "")
    return replace(sample, input="")


_INPUT = -1  # the place of `Sample.input` among the texts


def _without_early_turns(sample: Sample) -> Iterator[Sample]:
    """The sample without its first exchange, its first two, and so on; system text stays."""
    messages = sample.messages
    system = [m for m in messages[:-1] if m.role in (SYSTEM, DEVELOPER)]
    turns = [m for m in messages if m.role not in (SYSTEM, DEVELOPER)]
    questions = [i for i, m in enumerate(turns[:-1]) if m.role == USER]
    yield sample
    for start in questions:
        if start:
            yield replace(sample, messages=(*system, *turns[start:]))


def _cut_text(sample: Sample, index: int, fits: Fits) -> Sample | None:
    """The sample with the longest beginning of one text that fits; None if not even none does."""
    text = sample.input if index == _INPUT else sample.messages[index].content
    low, high = 0, len(text)  # the first `low` characters fit, `high` do not
    if not fits(_with_text(sample, index, "")):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(_with_text(sample, index, text[:middle])):
            low = middle
        else:
            high = middle
    return _with_text(sample, index, text[:low].rstrip())


def _with_text(sample: Sample, index: int, text: str) -> Sample:
    if index == _INPUT:
        return replace(sample, input=text)
    messages = list(sample.messages)
    messages[index] = replace(messages[index], content=text)
    return replace(sample, messages=tuple(messages))
