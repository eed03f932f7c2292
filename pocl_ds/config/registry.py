"""Names that recipes may use, to which plugins add theirs. The functions stand elsewhere, so that a
recipe is read without what is heavy; tests hold the two together.
"""

from __future__ import annotations

# Every loss by name, with its options and their defaults (METHOD 3). The function of the same name
# stands in `distill/divergences.py`; a test holds the two together. `sft` has no teacher and so no
# divergence; those across tokenizers stand in `distill/across_tokenizers.py`.
LOSSES: dict[str, dict[str, float | bool]] = {
    "fkl": {},
    "rkl": {},
    "jsd": {"beta": 0.5},
    "tvd": {},
    "skl": {"skew": 0.1},
    "srkl": {"skew": 0.1, "detach_mixture": False},
    "akl": {"mu": 0.5},
    "ab": {"ab_alpha": 0.2, "ab_beta": 0.7},
    "sft": {},
    "uld": {"by_position": False},
    "alm": {},
}
# Losses between a teacher and a student that split text differently; they compare texts, not ids.
ACROSS_TOKENIZERS = ("uld", "alm")

# May the student write?
POLICIES: dict[str, bool] = {
    "off": False,
    "gkd": True,
    "distillm": True,
    "seqkd": False,
    "mixture": True,
}
STRATEGIES = ["fusion", "rouge_l", "cross_entropy", "random"]
METRICS: list[
    str
] = []  # of difficulty, beside ROUGE-L and cross-entropy; each is a ranking strategy too
BENCHMARKS = ("dolly", "self_inst", "vicuna", "sni", "unni")  # see evaluate/benchmarks.py
ALL_LINEAR = "all-linear"  # student.lora.target_modules
