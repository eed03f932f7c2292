"""Speed of this package's ROUGE-L against the package rouge-score, by length of text.

Words are drawn as in real text (Zipf: few words often, many rarely), so that cached stems help as
much as they would there. Both sides score pairs of the same pool, in turn, so that other work on
the machine slows both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.metrics.rouge import clear_stem_cache, rouge_l_many

# Distinct pairs of a round. This package scores all of them, rouge-score the first few; the time
# of one pair is compared.
PAIRS = 300
# Words of a text -> pairs that rouge-score scores, about a second of work per round.
ROUGE_SCORE_PAIRS = {16: 150, 64: 60, 128: 40, 256: 24, 512: 12}
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
    """Speed ratios of the rounds at one length, and the median microseconds per pair."""

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
    """Print and return the ratio at each length: median over rounds, with the smallest and the
    largest.

    lengths: words of a text, 16 to 512 by default. Raises RecipeError for a value that is not
    a number. cold: no stem is cached at the start of a round; warm: the same pairs a second time.
    """
    out(
        f"ROUGE-L: speed relative to rouge-score, median of {rounds} rounds (min..max); {pairs} "
        f"distinct pairs per round"
    )
    out(
        f"{'words':>6}  {'stems cold':>22}  {'stems warm':>22}  {'rouge-score':>12}  {'cold':>9}  "
        f"{'warm':>9}"
    )
    table = []
    for words in parse_integers(lengths, "words") or tuple(ROUGE_SCORE_PAIRS):
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
    reference: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    for number in range(rounds):
        # rouge-score, on the first pairs.
        predictions = texts(pairs, words, seed=2 * number)
        targets = texts(pairs, words, seed=2 * number + 1)
        references = [[text] for text in targets]
        scored_pairs = min(pairs, ROUGE_SCORE_PAIRS.get(words, 12))
        start = time.perf_counter()
        expected = [
            scorer.score(targets[i], predictions[i])["rougeL"].fmeasure for i in range(scored_pairs)
        ]
        reference.append((time.perf_counter() - start) / scored_pairs)
        clear_stem_cache()
        for times in (cold, warm):
            start = time.perf_counter()
            scores = rouge_l_many(predictions, references)
            times.append((time.perf_counter() - start) / pairs)
        if scores[:scored_pairs].tolist() != expected:
            raise RuntimeError(
                f"ROUGE-L differs from rouge-score at {words} words: the comparison is invalid"
            )
    return Ratios(
        words,
        [a / b for a, b in zip(reference, cold, strict=True)],
        [a / b for a, b in zip(reference, warm, strict=True)],
        *(1e6 * statistics.median(times) for times in (reference, cold, warm)),
    )


def texts(count: int, words: int, *, seed: int) -> list[str]:
    """Random texts with `words` words; the word of rank r has weight 1/r."""
    vocabulary = _vocabulary()
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    sampled = random.Random(seed).choices(vocabulary, weights, k=count * words)
    return [" ".join(sampled[i * words : (i + 1) * words]) + "." for i in range(count)]


def _vocabulary() -> list[str]:
    """Distinct invented words with English endings, so that the stemmer has its usual work."""
    source = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        syllables = source.choices(SYLLABLES, k=source.choice((1, 1, 2, 2, 3)))
        words["".join(syllables) + source.choice(SUFFIXES)] = None
    return list(words)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}x ({min(values):.0f}..{max(values):.0f})"
