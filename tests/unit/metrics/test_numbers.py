"""The number that an answer ends with."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.metrics.numbers import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234),
        ("The answer is 18.", 18),
        ("She pays $3.50", Fraction(7, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("x = -5", -5),
        ("x = \u22123", -3),
        ("10-5", 5),  # a difference
        ("(3)-5", 5),
        ("3 + 4 = 7 apples", 7),
        ("at 3/4", Fraction(3, 4)),
        ("at 1 / 2", Fraction(1, 2)),
        (r"\boxed{\frac{3}{4}}, as 7 shows", Fraction(3, 4)),
        (r"\boxed{1}, no: $\boxed{42}$", 42),
        (r"\boxed{x=\dfrac{1}{2}}", Fraction(1, 2)),
        ("2e5", 200_000),
        ("about .5", Fraction(1, 2)),
        ("**72.00**", 72),
        ("12km", 12),
        ("5 %", 5),
        ("1,000,000", 1_000_000),
        ("", None),
        ("no number", None),
        ("v2", None),
        ("version 1.2.3", None),
        ("1,0000", None),
        ("10,5", None),  # 10.5 in some languages, two numbers in others
        ("7/0", None),
        ("1e999999999", None),
        ("9" * 500, None),
        (r"\boxed{}", None),
        ("１２", None),
    ],
)
def test_the_last_number_counts(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
def test_any_decimal_is_read_exactly(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    text = f"{digits / 10**places:,.{places}f}" if abs(digits) < 10**12 else f"{digits}"
    expected = value if abs(digits) < 10**12 else digits
    assert last_number(f"so 3 and 4 give {text}.") == expected


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    last_number(text)


@pytest.mark.parametrize(
    "unit", ["1,", "111,", "-", "1", "\\boxed{", "\\boxed{{", "1/", "$", "- ", "\\frac{1", "1 "]
)
def test_long_texts_take_no_time(unit: str) -> None:
    start = time.process_time()
    last_number(unit * (300_000 // len(unit)))
    assert time.process_time() - start < 5
