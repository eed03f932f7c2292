"""How many times as fast as rouge-score our ROUGE-L is, by length of text.

Words are drawn as in real text (Zipf: few words often, many rarely), so remembered stems help as
much as they would there and no more. Both sides score pairs of the same pool, in turns, so that a
busy machine slows both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocl_ds.bench.arguments import whole_numbers
from pocl_ds.metrics.rouge import forget_stems, rouge_l_many

# distinct pairs of a round; we score all, rouge-score the first few, compared by the time of one
# pair
PAIRS = 300
ROUGE_SCORE_PAIRS = {
    16: 150,
    64: 60,
    128: 40,
    256: 24,
    512: 12,
}  # chosen for about a second a size and round
VOCABULARY = 6000
SUFFIXES = (
    "",
    "",
    "s",
    "ed",
    "ing",
    "ly",
    "er",
    "ation",
    "ness",
    "ful",
    "ize",
    "ability",
    "ment",
    "ous",
)
SYLLABLES = [
    a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "en", "or", "al", "in", "ter")
]


@dataclass(frozen=True)
class Ratios:
    """Speed ratios of the rounds at one length, and the median microseconds of a pair."""

    words: int
    cold: list[float]
    warm: list[float]
    rouge_score_us: float
    cold_us: float
    warm_us: float


def run(
    lengths: Sequence[int | str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = 5,
    pairs: int = PAIRS,
) -> list[Ratios]:
    """Print and return the ratio at each length in words: median over rounds, with the smallest and
    the largest.

    lengths: words of a text, 16 to 512 where none is given. Raises RecipeError where one is not a
    number of words. cold: no stem is remembered when a round begins; warm: the same pairs once
    more.
    """
    out(
        f"ROUGE-L: times as fast as rouge-score, median of {rounds} rounds (min..max); {pairs} "
        f"distinct pairs a round"
    )
    out(
        f"{'words':>6}  {'stems cold':>22}  {'stems warm':>22}  {'rouge-score':>12}  {'cold':>9}  "
        f"{'warm':>9}"
    )
    table = []
    for words in whole_numbers(lengths, "words") or tuple(ROUGE_SCORE_PAIRS):
        row = measure(words, rounds=rounds, pairs=pairs)
        table.append(row)
        out(
            f"{words:>6}  {_spread(row.cold):>22}  {_spread(row.warm):>22}  "
            f"{row.rouge_score_us:>9.0f} us"
            f"  {row.cold_us:>6.1f} us  {row.warm_us:>6.1f} us"
        )
    return table


def measure(words: int, *, rounds: int, pairs: int) -> Ratios:
    """The ratios at one length."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    theirs: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    for number in range(rounds):
        left, right = texts(pairs, words, seed=2 * number), texts(pairs, words, seed=2 * number + 1)
        references = [[text] for text in right]
        few = min(pairs, ROUGE_SCORE_PAIRS.get(words, 12))
        begin = time.perf_counter()
        expected = [scorer.score(right[i], left[i])["rougeL"].fmeasure for i in range(few)]
        theirs.append((time.perf_counter() - begin) / few)
        forget_stems()
        for times in (cold, warm):
            begin = time.perf_counter()
            found = rouge_l_many(left, references)
            times.append((time.perf_counter() - begin) / pairs)
        if found[:few].tolist() != expected:
            raise RuntimeError(
                f"ROUGE-L differs from rouge-score at {words} words: the benchmark compares nothing"
            )
    return Ratios(
        words,
        [a / b for a, b in zip(theirs, cold, strict=True)],
        [a / b for a, b in zip(theirs, warm, strict=True)],
        *(1e6 * statistics.median(times) for times in (theirs, cold, warm)),
    )


def texts(count: int, words: int, *, seed: int) -> list[str]:
    """Texts of so many words over one vocabulary, word of rank r with weight 1/r."""
    vocabulary = _vocabulary()
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    drawn = random.Random(seed).choices(vocabulary, weights, k=count * words)
    return [" ".join(drawn[i * words : (i + 1) * words]) + "." for i in range(count)]


def _vocabulary() -> list[str]:
    """Distinct made-up words with English endings, so that the stemmer has its usual work."""
    source = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < VOCABULARY:
        found[
            "".join(source.choices(SYLLABLES, k=source.choice((1, 1, 2, 2, 3))))
            + source.choice(SUFFIXES)
        ] = None
    return list(found)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}x ({min(values):.0f}..{max(values):.0f})"
