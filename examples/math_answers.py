"""A difficulty metric that checks answers: is the student's final number the reference's?

A recipe uses it as a plugin, and answers alone are compared if thoughts come before them:

    plugins: [math_answers]
    score: {metrics: [wrong_math_answer], span: answer}
    ranking: {strategy: wrong_math_answer}

The final number of a text is in its last \\boxed{...}, after its last `####` (as in GSM8K), or else
the last number in it. Problems that the student solves come first. Among those, and among the
others, problems whose reference is probable under the student come first.

    python examples/math_answers.py
"""

from __future__ import annotations

import re
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np

from pocl_ds import plugins

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


def final_answer(text: str) -> str:
    """The part of a text that holds its final answer."""
    boxed = text.rpartition("\\boxed{")
    if boxed[1]:
        depth = 1
        for place, character in enumerate(boxed[2]):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return boxed[2][:place]
    return text.rpartition("####")[2]


def final_number(text: str) -> Fraction | None:
    """The last number of the final answer of a text; None without one."""
    answer = LATEX_FRACTION.sub(r"\1/\2", final_answer(text))
    numbers = NUMBER.findall(answer)
    if not numbers:
        return None
    try:
        return Fraction(numbers[-1].replace(",", "").replace(" ", ""))
    except ZeroDivisionError:
        return None


@plugins.metric("wrong_math_answer")
def wrong_math_answer(samples: Any) -> list[float]:
    """Of each sample 1 for a wrong answer, plus the cross-entropy of its reference, below 1."""
    values = []
    for response, references, log_probs in zip(
        samples.responses, samples.references, samples.log_probs, strict=True
    ):
        answer = final_number(response)
        right = answer is not None and answer in map(final_number, references)
        cross_entropy = -float(np.mean(log_probs, dtype=np.float64))
        values.append((not right) + cross_entropy / (1 + cross_entropy))
    return values


def main() -> None:
    problems = [
        ("What is 3/4 of 16?", "Three quarters are 12.", "\\boxed{12}", 0.5),
        ("What is 1/3 + 1/6?", "It is \\boxed{\\frac{1}{2}}", "#### 0.5", 1.5),
        ("What is 7 * 8?", "That is 54.", "#### 56", 0.2),
        ("How many are left?", "I do not know.", "There are 1,024. #### 1,024", 2.0),
    ]
    prompts, responses, references, losses = zip(*problems, strict=True)
    samples = SimpleNamespace(
        responses=responses,
        references=[[reference] for reference in references],
        log_probs=[np.array([-loss]) for loss in losses],
    )
    for prompt, value in zip(prompts, wrong_math_answer(samples), strict=True):
        print(f"{value:.2f}  {'wrong' if value >= 1 else 'right'}  {prompt}")


if __name__ == "__main__":
    main()
