"""The number that a text ends with, for answers that are right or wrong (as those of GSM8K)."""

from __future__ import annotations

import re
from fractions import Fraction

BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
# A sign belongs to a number unless something to subtract from stands before it. What goes on in
# another way, as a date or a version does, is no number.
NUMBER = re.compile(
    r"(?<![\w.,)])(?:[-\u2212]\s?)?[$€£]?-?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+|[eE][-+]?\d{1,3}\b)?"
    r"(?![.,]?\d|[eE][-+]?\d)",
    re.ASCII,
)
MAX_DIGITS = 400  # of a number; longer ones are no answers


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; of those in the last \\boxed{...} if there is one. None
    if there is none.

    1,234.50, -3/4, \\frac{3}{4}, 2e5 and $7 are numbers. A percent sign is ignored.
    """
    if boxes := BOXED.findall(text):
        text = boxes[-1]
    text = LATEX_FRACTION.sub(r"\1/\2", text)
    value = None
    for match in NUMBER.finditer(text):
        if (number := _parse(match[0])) is not None:
            value = number
    return value


def _parse(text: str) -> Fraction | None:
    digits = re.sub(r"[\s,$€£]", "", text).replace("\u2212", "-")
    if len(digits) > MAX_DIGITS:
        return None
    try:
        return Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None
